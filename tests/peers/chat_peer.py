"""What transformers' apply_chat_template says: python chat_peer.py DIR CONVERSATIONS.json

CONVERSATIONS.json is a list of lists of messages, or of {"messages", "tools", "enable_thinking"},
the last two where the template is passed them. Prints, per conversation, the text and the ids, each
without and with the generation prompt ("text", "ids", "prompt_text", "prompt_ids"); special tokens
that a message spells are encoded as text ("sanitize_control_tokens").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizer_peer


def answers(path: Path, conversations: list[list[dict] | dict]) -> list[dict]:
    tokenizer = tokenizer_peer.load(path)

    def apply(asked: list[dict] | dict, generate: bool, tokenize: bool) -> str | list[int]:
        given = asked if isinstance(asked, dict) else {"messages": asked}
        variables = {name: value for name, value in given.items() if name != "messages"}
        return tokenizer.apply_chat_template(
            given["messages"],
            **variables,
            add_generation_prompt=generate,
            tokenize=tokenize,
            return_dict=False,
            sanitize_control_tokens=tokenize,
        )

    return [
        {
            "text": apply(messages, False, False),
            "ids": apply(messages, False, True),
            "prompt_text": apply(messages, True, False),
            "prompt_ids": apply(messages, True, True),
        }
        for messages in conversations
    ]


if __name__ == "__main__":
    print(json.dumps(answers(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))

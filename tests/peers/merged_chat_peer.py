"""How transformers asks a model directory and when it stops: python merged_chat_peer.py DIR CHATS

CHATS is a JSON file with a list of lists of messages. Prints, per conversation, the ids of the
prompt ("prompts") and of the greedy answer to it, up to 24 tokens, with its end token ("answers"),
the text that its `pipeline` answers ("texts"); and the ids that stop generation ("ends").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline


def main(path: Path, conversations: list[list[dict]]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ask = pipeline("text-generation", model=str(path), dtype=torch.float32, device="cpu")
    prompts, answers, texts = [], [], []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        prompts.append(ids)
        answers.append(made[0, len(ids) :].tolist())
        (said,) = ask(messages, max_new_tokens=24, do_sample=False)
        texts.append(said["generated_text"][-1]["content"])
    ends = GenerationConfig.from_pretrained(path).eos_token_id
    return {"prompts": prompts, "answers": answers, "texts": texts, "ends": ends}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))

"""Thoughts whose tags are tokens of their own (Qwen3, SmolLM3), also where a checkpoint marks them
special: what is learnt, what is judged, what carries the loss."""

from __future__ import annotations

import json

import pytest

from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row
from engine.data.thinking import thinks
from engine.distill.cascade import AssistantTurn, TurnAttempts
from engine.distill.config import DistillConfig
from engine.distill.writer import judged_attempt
from engine.sampling.requests import Completion
from model.chat import Chat
from model.tokenizer import load_tokenizer
from tests.helpers.data_files import bot, user
from tests.helpers.llama_dirs import write_llama
from tests.helpers.tokenizer_dirs import FLAGS, write_json
from tests.helpers.tool_templates import THINKING

OPENS, CLOSES = 259, 260  # ids of <think> and </think>
# SmolLM3's way of not thinking: every answer stands behind an empty thought.
EMPTY_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
)
EMPTY = [OPENS, *b"\n\n", CLOSES]


@pytest.fixture(scope="module", params=["text", "special", "special in the settings alone"])
def tokenizer(request, tmp_path_factory):
    """A token a byte, and the two tags, marked as the parameter says."""
    path = write_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)
    document = json.loads((path / "tokenizer.json").read_text())
    tags = {OPENS: "<think>", CLOSES: "</think>"}
    for id, tag in tags.items():
        token = {"id": id, "content": tag, "special": request.param == "special", **FLAGS}
        document["added_tokens"].append(token)
    write_json(path / "tokenizer.json", document)
    if request.param != "text":
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings["additional_special_tokens"] = list(tags.values())
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: token[key] for key in token if key != "id"} | {"special": True}
            for token in document["added_tokens"]
        }
        write_json(path / "tokenizer_config.json", settings)
    return load_tokenizer(path)


def test_the_tags_are_tokens_of_text(tokenizer):
    for template in (THINKING, EMPTY_THOUGHTS):
        chat = Chat(template, tokenizer)
        assert not {"<think>", "</think>"} & {*chat.tokenizer.special}
        assert chat.tokenizer.decode([OPENS, *b"Hm.", CLOSES]) == "<think>Hm.</think>"
        assert chat.tokenizer.special["<|im_end|>"] == chat.end_id


def test_answer_only_finds_thoughts_in_references(tokenizer):
    chat = Chat(THINKING, tokenizer)
    answers = {
        "<think>Hm.</think>It is 4.": [OPENS, *b"\nHm.\n", CLOSES, *b"\n\n"],
        "It is 4.": [*EMPTY, *b"\n\n"],  # as the template writes it
    }
    for answer, thought in answers.items():
        row = Row("r", (user("2 + 2?"), bot(answer)), thinking="answer-only")
        (example,), counts = encode([row], chat, EncodeRules(max_length=99, answer_only=True))
        assert example.ids[example.n_prompt :] == [*b"It is 4.", chat.end_id]
        prompt = chat.prompt_ids(row.messages[:1])
        assert example.ids[: example.n_prompt] == [*prompt, *thought]
        assert counts.thought == len(thought)
        (whole,), _ = encode([row], chat, EncodeRules(max_length=99))
        assert whole.ids == example.ids and whole.n_prompt == len(prompt)


def test_thoughts_of_sampled_ids_are_seen(tokenizer):
    chat = Chat(THINKING, tokenizer)
    thinking = [OPENS, *b"Hm.", CLOSES, *b"So: 4."]
    for mode, sampled, expected in (
        ("keep", thinking, "accepted"),
        ("answer-only", thinking, "accepted"),
        ("answer-only", [OPENS, *b"So: 4."], "empty"),  # never closed
        ("strip", thinking, "thinks"),
        ("strip", [*EMPTY, *b"\n\nSo: 4."], "accepted"),
        ("strip", [*EMPTY, *b"\n\nIt is 4."], "identical"),
        ("strip", [*EMPTY, *b"\n\n"], "empty"),
    ):
        turn = AssistantTurn.first(Row("r", (user("2 + 2?"), bot("It is 4.")), thinking=mode))
        config = DistillConfig(verify="number")
        attempts = TurnAttempts(turn, config.stages)
        completion = Completion("r/0", 0, sampled, "", "stop", [], 9)
        attempt = judged_attempt(chat, config, attempts, completion)
        assert attempt.status == expected, (mode, attempt.text)
        assert attempt.ids == sampled  # kept as they were sampled


def test_a_prompt_that_closes_the_thought_leaves_the_answer_alone(tokenizer):
    chat = Chat(EMPTY_THOUGHTS, tokenizer)
    prompt = chat.prompt_ids([user("2 + 2?")])
    assert prompt[-5:] == [*EMPTY, *b"\n"]
    target = chat.target([user("2 + 2?")], "It is 4.")
    assert target.prompt == prompt and target.answer == [*b"It is 4."] and target.as_rendered
    later = chat.prompt_ids([user("2 + 2?"), bot("It is 4."), user("Sure?")])
    assert later[: len(prompt) + 9] == [*prompt, *target.answer, chat.end_id]


def test_an_empty_thought_is_none():
    assert thinks("<think>\nHm.\n</think>\n\n4") and thinks("Hm.</think>4") and thinks("<think>Hm")
    for text in (
        "4",
        "",
        "<think>\n\n</think>\n\n4",
        "\n</think>4",
        "<think></think><think> </think>",
    ):
        assert not thinks(text)

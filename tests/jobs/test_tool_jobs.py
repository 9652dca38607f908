"""The main job end to end on a file with tool calls and on one with thoughts, on a tiny model."""

from __future__ import annotations

import json

import pytest

from engine.data.distilled import load_distilled
from engine.report.load import load_run
from engine.runtime.files import read_jsonl
from model.llama import Llama
from model.peft_format import load_lora
from tests.helpers.data_files import bot, jsonl, user
from tests.helpers.scripts import run_script as script
from tests.helpers.tool_templates import HERMES, WEATHER, call, calling, result

FLAGS = ["--max-new-tokens", "8", "--eval-max-new", "6", "--retention-max-new", "4"]
FLAGS += ["--epochs", "1", "--batch-rows", "4", "--rank", "2", "--report-rows", "2"]
FLAGS += ["--report-answers", "1", "--max-length", "3000"]


@pytest.fixture
def tool_dir(tiny_llama_dir):
    """A random Llama with a template of Hermes' style; a token is a byte, so rows are long."""
    path = tiny_llama_dir(tokenizer=True, max_position_embeddings=4096)
    (path / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    return path


def tool_record(city: str) -> dict:
    """A row with a call, its result and the answer."""
    messages = [
        user(f"Weather in {city}?"),
        calling(call("get_weather", city=city)),
        result("18"),
        bot(f"In {city} it is 18."),
    ]
    return {"messages": messages, "tools": [WEATHER]}


def written(city: str) -> str:
    """The call as the template writes it."""
    source = f'{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}'
    return f"<tool_call>\n{source}\n</tool_call>"


def run(model, train, test, out, *flags):
    """The main job; returns its summary and what it printed."""
    args = ["--model", model, "--data", train, "--eval-data", test, "--out", out]
    printed = script("sdft", *args, *FLAGS, *flags)
    for arm in ("sft", "sdft"):
        Llama.from_pretrained(model).bind(load_lora(out / arm))
    return json.loads((out / "summary.json").read_text()), printed


def test_the_main_job_on_a_file_with_tool_calls(tool_dir, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", *map(tool_record, ("Oslo", "Rome")))
    only_call = tool_record("Bonn")
    only_call["messages"] = only_call["messages"][:2]
    test = jsonl(tmp_path / "test.jsonl", only_call)
    result_of_job, _ = run(tool_dir, train, test, tmp_path / "run", "--verify", "call")

    lines = load_distilled(tmp_path / "run" / "distilled.jsonl")
    assert [line.id.rpartition("/")[2] for line in lines] == ["0", "1"] * 2
    for line, city in zip(lines[::2], ("Oslo", "Rome"), strict=True):
        assert line.reference == line.target == written(city)  # noise makes no call
        assert line.answer == calling(call("get_weather", city=city))
        assert line.messages[0]["tools"] == [WEATHER]
    assert lines[1].messages[1:] == [calling(call("get_weather", city="Oslo")), result("18")]
    assert result_of_job["evaluation"]["seed"]["n"] == 1
    for line in read_jsonl(tmp_path / "run" / "evaluation.jsonl"):
        assert not line["ok"] and line["reason"] in ("no_call", "mismatch")
    assert result_of_job["training"]["sft"]["steps"] == 1
    shown = read_jsonl(tmp_path / "run" / "tokens.jsonl")
    assert any("<tool_call>" in "".join(line["sft"]["pieces"]) for line in shown)
    first = load_run(tmp_path / "run", "run").rows[0]  # as the report shows it
    assert first["messages"][0] == {"role": "tools", "content": json.dumps(WEATHER["function"])}


def test_the_main_job_on_a_file_with_thoughts(tool_dir, tmp_path):
    def record(number: int) -> dict:
        thought = f"<think>\n{number} and {number}.\n</think>\n\n"
        return {"messages": [user(f"{number} + {number}?"), bot(f"{thought}It is {2 * number}.")]}

    train = jsonl(tmp_path / "train.jsonl", *map(record, range(1, 4)))
    test = jsonl(tmp_path / "test.jsonl", record(7))
    flags = ("--verify", "number", "--thinking", "answer-only")
    result_of_job, printed = run(tool_dir, train, test, tmp_path / "run", *flags)
    assert "thought " in printed  # the count of tokens without a loss
    # "It is 2." and the end token: the thought of every reference carries no loss
    assert result_of_job["training"]["sft"]["steps"] == 1
    lines = load_distilled(tmp_path / "run" / "distilled.jsonl")
    assert all("<think>" in line.reference for line in lines)
    shown = read_jsonl(tmp_path / "run" / "tokens.jsonl")
    for line in shown:
        pieces = line["sft"]["pieces"]
        with_loss = "".join(pieces[line["sft"]["prompt"] : -1])
        assert with_loss.startswith("It is ") and "think" not in with_loss
    # another way with thoughts is another run
    args = ["--model", tool_dir, "--data", train, "--eval-data", test, "--out", tmp_path / "run"]
    said = script("sdft", *args, *FLAGS, "--verify", "number", code=2)
    assert "sha256" in said or "another" in said

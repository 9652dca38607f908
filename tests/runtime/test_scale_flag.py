"""`--scale`: the strengths of adapters in the scripts; their names, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from engine.runtime.files import read_jsonl
from engine.session import parse_scales, scaled_name
from model.llama import Llama
from model.peft_format import save_lora
from tests.helpers.adapters import random_lora


@pytest.fixture
def made(tiny_llama_dir, tmp_path):
    """(model directory, adapter directory)."""
    path = tiny_llama_dir(tokenizer=True)
    lora = random_lora(Llama.from_pretrained(path), "all")
    lora.params.mul_(4)
    save_lora(lora, tmp_path / "tuned")
    return path, tmp_path / "tuned"


def test_lists_of_scales_are_read_and_name_their_arms():
    assert parse_scales(None) == (1.0,) and parse_scales("0, .5,1") == (0.0, 0.5, 1.0)
    assert [scaled_name("sft", x) for x in (0.0, 0.25, 1.0, 1.5)] == [
        "sft@0", "sft@0.25", "sft", "sft@1.5",
    ]  # fmt: skip
    for text in ("", "half", "0.5,", "1,1", "0.5,0.50000000001"):
        with pytest.raises(ValueError, match="expected numbers joined by commas, each once"):
            parse_scales(text)
    for text in ("-1", "0.5,nan", "11"):
        with pytest.raises(ValueError, match="expected a number from 0"):
            parse_scales(text)


def test_evaluation_and_retention_list_an_adapter_at_every_scale(made, script, tmp_path):
    """At 0 answers and drift are the seed's, at 1 the adapter's; no file goes on at others."""
    model, adapter = made
    data = tmp_path / "test.json"
    data.write_text(json.dumps([{"instruction": f"Say {w}", "output": w} for w in "ab"]))
    common = ["--model", model, "--adapter", adapter, "--max-new-tokens", "6"]
    evaluate = ["evaluate", *common, "--data", data, "--verify", "exact", "--out"]
    code, said = script(*evaluate, tmp_path / "e.jsonl", "--scale", "0,0.5,1")
    assert code == 0 and "tuned@0.5" in said, said
    code, said = script(*evaluate, tmp_path / "plain.jsonl")
    assert code == 0, said
    arms = {}
    for line in read_jsonl(tmp_path / "e.jsonl"):
        arms.setdefault(line["arm"], []).append(line["ids"])
    plain = [x["ids"] for x in read_jsonl(tmp_path / "plain.jsonl") if x["arm"] == "tuned"]
    assert list(arms) == ["seed", "tuned@0", "tuned@0.5", "tuned"]
    assert arms["tuned@0"] == arms["seed"] != arms["tuned"] == plain
    nats = {}
    for line in read_jsonl(tmp_path / "e.jsonl.nll.jsonl"):
        nats.setdefault(line["arm"], []).append(line["nll"])
    assert nats["tuned@0"] == nats["seed"] != nats["tuned"]
    assert nats["tuned@0.5"] not in (nats["seed"], nats["tuned"])
    code, said = script(*evaluate, tmp_path / "e.jsonl", "--scale", "0,0.25,1")
    assert code == 2 and "begun with other settings" in said and "tuned@0.25" in said

    data.write_text(json.dumps([{"instruction": "Why?"}, {"instruction": "How?"}]))
    retention = ["retention", *common, "--data", data, "--out", tmp_path / "r.jsonl"]
    code, said = script(*retention, "--scale", "0,1")
    assert code == 0, said
    lines = read_jsonl(tmp_path / "r.jsonl")
    assert {line["kl"] for line in lines if line["arm"] == "tuned@0"} == {0.0}
    assert all(line["kl"] > 0 for line in lines if line["arm"] == "tuned")


def test_generate_and_merge_use_the_scale(made, script, tmp_path):
    """A model merged at 0.5 answers as the adapter at 0.5 does; its merge.json tells the scale."""
    model, adapter = made
    ask = ["generate", "--prompt", "Say a word", "--temperature", "0", "--max-new-tokens", "8"]
    said = {}
    for scale in ("0", "0.5", "1"):
        out = tmp_path / f"{scale}.jsonl"
        flags = ["--model", model, "--adapter", adapter, "--scale", scale, "--out", out]
        assert script(*ask, *flags)[0] == 0
        said[scale] = read_jsonl(out)[0]["answer"]
    script(*ask, "--model", model, "--out", tmp_path / "seed.jsonl")
    assert read_jsonl(tmp_path / "seed.jsonl")[0]["answer"] == said["0"] != said["1"]
    merged = tmp_path / "merged"
    flags = ["--model", model, "--adapter", adapter, "--scale", "0.5", "--out", merged]
    code, printed = script("merge", *flags)
    assert code == 0 and "merged in at scale 0.5" in printed
    script(*ask, "--model", merged, "--out", tmp_path / "merged.jsonl")
    assert read_jsonl(tmp_path / "merged.jsonl")[0]["answer"] == said["0.5"]

    # under a merged checkpoint there is nothing to scale, or it would count twice
    data = tmp_path / "d.json"
    data.write_text(json.dumps([{"instruction": "Why?", "output": "So."}]))
    for name, flags, reason in (
        (
            "generate",
            ["--prompt", "Hi"],
            "no --adapter to scale; .* is a merged checkpoint",
        ),
        ("evaluate", ["--data", data, "--out", tmp_path / "x"], "no --adapter to scale; "),
        (
            "retention",
            ["--adapter", adapter, "--out", tmp_path / "x"],
            "is already merged into .* and would count twice; give --model ",
        ),
        ("merge", ["--adapter", adapter, "--out", tmp_path / "x"], "is already merged into"),
    ):
        code, printed = script(name, "--model", merged, *flags, "--scale", "0.5")
        assert code == 2
        assert re.search(f"error: --scale 0.5: .*{reason}", printed), printed
        assert str(model) in printed and not (tmp_path / "x").exists()
    code, printed = script("generate", "--model", model, "--prompt", "Hi", "--scale", "0.5")
    assert code == 2 and "--scale 0.5: there is no --adapter to scale; give the adapter" in printed

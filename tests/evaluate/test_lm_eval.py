"""lm-evaluation-harness over our model beside its own `hf` model, on tasks made here, in processes
of their own; and the command a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.evaluate.lm_eval_harness import _cell, _figures
from engine.runtime.files import read_jsonl
from model.llama import Llama
from model.peft_format import save_lora
from tests.conftest import _need
from tests.helpers.adapters import new_lora

ROOT = Path(__file__).resolve().parents[2]
OURS = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from engine.evaluate.lm_eval_harness import harness_model
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session
model, tasks, names = sys.argv[1:]
session = Session.open(ModelConfig(model, dtype="float32"))
found = simple_evaluate(
    harness_model(session, None, SamplerConfig()), tasks=names.split(","),
    task_manager=TaskManager(include_path=tasks),
)
answers = {
    name: [s["filtered_resps"] for s in sorted(found["samples"][name], key=lambda s: s["doc_id"])]
    for name in names.split(",")
}
print()
print(json.dumps({"answers": answers, "results": found["results"]}, default=str))
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Three tasks in the harness's YAML over files beside them, one per kind of request."""
    _need("lm_eval")
    path = tmp_path / "tasks"
    path.mkdir()
    facts = [("fire", "hot"), ("ice", "cold"), ("coal", "black"), ("snow", "white"),
             ("a feather", "light"), ("an anvil", "heavy")]  # fmt: skip
    choices = [colour for _, colour in facts]
    kinds = {
        "choice": [
            {"question": f"What is {thing} like?", "choices": choices, "label": i}
            for i, (thing, _) in enumerate(facts)
        ],
        "text": [{"text": f"{thing} is {what}. " * (5 + 20 * i)} for i, (thing, what) in
                 enumerate(facts[:3])],
        "text_generation": [{"question": f"Say a word about {thing}.", "answer": what}
                            for thing, what in facts[:4]],
    }  # fmt: skip
    details = {
        "choice": "output_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n',
        "text_generation": "output_type: generate_until\n"
        'doc_to_text: "{{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 12\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n",
    }
    for name, rows in kinds.items():
        data = path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / f"made_{name}.yaml").write_text(
            f"task: made_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {data}\ntest_split: test\n{details[name]}"
        )
    return path


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}


def beside_hf(run_peer, tasks, tmp_path, model, names) -> tuple[dict, dict]:
    """What ours and the harness's own model answer."""
    theirs = run_peer("lm_eval_peer.py", model, tasks, names)
    done = subprocess.run(
        [sys.executable, "-c", OURS, str(model), str(tasks), names],
        capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), theirs


def numbers(answers: list) -> torch.Tensor:
    """Every log-likelihood of a task's answers, in order."""
    flat = [pair[0] if isinstance(pair, list) else pair for one in answers for pair in one]
    return torch.tensor([float(value) for value in flat], dtype=torch.float64)


@pytest.mark.peers
def test_a_tiny_model_answers_as_the_harness_own_does(run_peer, tasks, tmp_path, tiny_llama_dir):
    """Log-likelihoods to 1e-3 nats of up to 300, greedy flags, windows of a text longer than the
    model, generated texts."""
    model = tiny_llama_dir(tokenizer=True, max_position_embeddings=256)
    names = "made_choice,made_text,made_text_generation"
    ours, theirs = beside_hf(run_peer, tasks, tmp_path, model, names)
    for name in ("made_choice", "made_text"):
        a, b = (numbers(side["answers"][name]) for side in (ours, theirs))
        assert len(a) == (36 if name == "made_choice" else 3) and (b < -1).all()
        print(f"{name}: largest difference {(a - b).abs().max():.2e} nats")
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    assert ours["answers"]["made_text_generation"] == theirs["answers"]["made_text_generation"]
    flags = [[pair[1] for pair in one] for one in theirs["answers"]["made_choice"]]
    assert [[pair[1] for pair in one] for one in ours["answers"]["made_choice"]] == flags


@pytest.mark.peers
def test_the_real_model_answers_as_the_harness_own_does(run_peer, tasks, tmp_path, smollm2_dir):
    names = "made_choice,made_text_generation"
    ours, theirs = beside_hf(run_peer, tasks, tmp_path, smollm2_dir, names)
    a, b = (numbers(side["answers"]["made_choice"]) for side in (ours, theirs))
    print(f"largest difference {(a - b).abs().max():.2e} nats of {b.abs().max():.1f}")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    flags = [[pair[1] for pair in one] for one in theirs["answers"]["made_choice"]]
    assert [[pair[1] for pair in one] for one in ours["answers"]["made_choice"]] == flags
    assert ours["answers"]["made_text_generation"] == theirs["answers"]["made_text_generation"]
    for metric in ("acc,none", "acc_norm,none"):
        figures = [side["results"]["made_choice"][metric] for side in (ours, theirs)]
        assert figures[0] == figures[1]


def test_the_command(tasks, tmp_path, tiny_llama_dir):
    """Seed and adapter, the table, nothing done twice, an unknown task refused."""
    model = tiny_llama_dir(tokenizer=True)
    save_lora(new_lora(Llama.from_pretrained(model), rank=2), tmp_path / "tuned")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", str(model)]
    command += ["--adapter", str(tmp_path / "tuned"), "--lm-eval-path", str(tasks)]
    command += ["--lm-eval-limit", "4", "--out", str(out), "--lm-eval"]
    run = {"capture_output": True, "text": True, "cwd": "/", "env": environment(tmp_path)}
    done = subprocess.run([*command, "made_choice"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_jsonl(out / "lm_eval.jsonl")
    assert [(x["task"], x["arm"], x["n"]) for x in lines] == [
        ("made_choice", "seed", 4), ("made_choice", "tuned", 4)]  # fmt: skip
    assert lines[0]["metrics"]["acc,none"] == sum(lines[0]["right"]) / 4
    assert lines[0]["right"] == lines[1]["right"]  # a fresh adapter changes nothing
    assert "made_choice" in done.stdout and "p 1.000" in done.stdout
    before = (out / "lm_eval.jsonl").read_bytes()
    again = subprocess.run([*command, "made_choice"], **run)
    assert (out / "lm_eval.jsonl").read_bytes() == before
    assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
    refused = subprocess.run([*command, "made_up"], **run)
    assert refused.returncode == 2 and "['made_up']" in refused.stderr


def test_without_the_extra_it_says_what_to_install(tiny_llama_dir, tmp_path):
    """An empty package of that name stands for its absence."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('not here')")
    model = tiny_llama_dir(tokenizer=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", str(model),
         "--lm-eval", "mmlu", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and "pip install -e '.[eval]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_figures_and_their_comparison():
    found = {
        "results": {"x": {"alias": "x", "acc,none": 0.75, "acc_stderr,none": 0.2}},
        "samples": {"x": [{"doc_id": i, "acc": v} for i, v in enumerate((1.0, 0.0, 1.0, 1.0))]},
    }
    line = _figures("x", found)
    assert line == {"n": 4, "metrics": {"acc,none": 0.75, "acc_stderr,none": 0.2},
                    "right": [True, False, True, True]}  # fmt: skip
    worse = {**line, "metrics": {"acc,none": 0.0}, "right": [False] * 4}
    arms = {"seed": line, "tuned": worse}
    assert _cell(arms, "seed", "acc,none") == "75.0% (30.1-95.4)"
    assert _cell(arms, "tuned", "acc,none") == "0.0% (0.0-49.0), p 0.250"
    partly = {"results": found["results"], "samples": {"x": [{"doc_id": 0, "acc": 0.3}] * 2}}
    assert (_figures("x", partly)["right"], _figures("x", partly)["n"]) == (None, 1)

"""lm-evaluation-harness over our model beside its own `hf` model, on tasks made here, each model in
its own process; and scripts/evaluate.py --lm-eval."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from engine.evaluate.lm_eval_harness import _cell, _figures
from engine.runtime.files import read_jsonl
from model.llama import Llama
from model.peft_format import save_lora
from tests.conftest import _need
from tests.helpers import programs
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
    task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0,
)
answers = {}
for name in names.split(","):
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    answers[name] = [sample["filtered_resps"] for sample in samples]
print()
print(json.dumps({"answers": answers, "results": found["results"]}, default=str))
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Three tasks in the harness's YAML over files beside them, one per kind of request."""
    _need("lm_eval")
    path = tmp_path / "tasks"
    path.mkdir()
    facts = [
        ("fire", "hot"),
        ("ice", "cold"),
        ("coal", "black"),
        ("snow", "white"),
        ("a feather", "light"),
        ("an anvil", "heavy"),
    ]
    choices = [quality for _, quality in facts]
    kinds: dict[str, list[dict]] = {"choice": [], "text": [], "text_generation": []}
    for i, (thing, quality) in enumerate(facts):
        question = {"question": f"What is {thing} like?", "choices": choices, "label": i}
        kinds["choice"].append(question)
        if i < 3:
            repeats = 5 + 20 * i
            kinds["text"].append({"text": f"{thing} is {quality}. " * repeats})
        if i < 4:
            question = {"question": f"Say a word about {thing}.", "answer": quality}
            kinds["text_generation"].append(question)
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
    """The answers and results of our model, and of the harness's own."""
    theirs = run_peer("lm_eval_peer.py", model, tasks, names)
    command = [sys.executable, "-c", OURS, model, tasks, names]
    done = programs.run(command, kind="harness", cwd=ROOT, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), theirs


def numbers(answers: list) -> torch.Tensor:
    """Every log-likelihood of a task's answers, in order."""
    values = []
    for of_question in answers:
        for answer in of_question:  # (log-likelihood, flag), or a log-likelihood alone
            value = answer[0] if isinstance(answer, list) else answer
            values.append(float(value))
    return torch.tensor(values, dtype=torch.float64)


def greedy_flags(answers: list) -> list[list]:
    """Of every question's answers, whether greedy decoding would choose them."""
    return [[flag for _, flag in of_question] for of_question in answers]


@pytest.mark.peers
def test_a_tiny_model_scores_as_the_harness_own_model(run_peer, tasks, tmp_path, tiny_llama_dir):
    """Log-likelihoods to 1e-3 nats of up to 300, greedy flags, windows of a text longer than the
    model, generated texts."""
    model = tiny_llama_dir(tokenizer=True, max_position_embeddings=256)
    names = "made_choice,made_text,made_text_generation"
    ours, theirs = beside_hf(run_peer, tasks, tmp_path, model, names)
    for name in ("made_choice", "made_text"):
        a, b = numbers(ours["answers"][name]), numbers(theirs["answers"][name])
        assert len(a) == (36 if name == "made_choice" else 3) and (b < -1).all()
        print(f"{name}: largest difference {(a - b).abs().max():.2e} nats")
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    assert ours["answers"]["made_text_generation"] == theirs["answers"]["made_text_generation"]
    flags = greedy_flags(theirs["answers"]["made_choice"])
    assert greedy_flags(ours["answers"]["made_choice"]) == flags


@pytest.mark.peers
def test_the_real_model_scores_as_the_harness_own_model(run_peer, tasks, tmp_path, smollm2_dir):
    names = "made_choice,made_text_generation"
    ours, theirs = beside_hf(run_peer, tasks, tmp_path, smollm2_dir, names)
    a, b = numbers(ours["answers"]["made_choice"]), numbers(theirs["answers"]["made_choice"])
    print(f"largest difference {(a - b).abs().max():.2e} nats of {b.abs().max():.1f}")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    flags = greedy_flags(theirs["answers"]["made_choice"])
    assert greedy_flags(ours["answers"]["made_choice"]) == flags
    assert ours["answers"]["made_text_generation"] == theirs["answers"]["made_text_generation"]
    our_results, their_results = ours["results"]["made_choice"], theirs["results"]["made_choice"]
    for metric in ("acc,none", "acc_norm,none"):
        assert our_results[metric] == their_results[metric]


def test_the_command_scores_each_arm_and_continues(tasks, tmp_path, tiny_llama_dir):
    """Seed and adapter, the table, nothing is computed twice, an unknown task is refused."""
    model = tiny_llama_dir(tokenizer=True)
    save_lora(new_lora(Llama.from_pretrained(model), rank=2), tmp_path / "tuned")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", str(model)]
    command += ["--adapter", str(tmp_path / "tuned"), "--lm-eval-path", str(tasks)]
    command += ["--lm-eval-limit", "4", "--out", str(out), "--lm-eval"]
    how = {"kind": "harness", "cwd": "/", "env": environment(tmp_path)}
    done = programs.run([*command, "made_choice"], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_jsonl(out / "lm_eval.jsonl")
    assert [(x["task"], x["arm"], x["n"]) for x in lines] == [
        ("made_choice", "seed", 4), ("made_choice", "tuned", 4)]  # fmt: skip
    assert lines[0]["metrics"]["acc,none"] == sum(lines[0]["right"]) / 4
    assert lines[0]["right"] == lines[1]["right"]  # a new adapter changes nothing
    assert "made_choice" in done.stdout and "p 1.000" in done.stdout
    before = (out / "lm_eval.jsonl").read_bytes()
    again = programs.run([*command, "made_choice"], **how)
    assert (out / "lm_eval.jsonl").read_bytes() == before
    assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
    refused = programs.run([*command, "made_up"], **how)
    assert refused.returncode == 2 and "['made_up']" in refused.stderr


def test_without_the_extra_the_message_names_what_to_install(tiny_llama_dir, tmp_path):
    """An empty package of that name stands for its absence."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('not here')")
    model = tiny_llama_dir(tokenizer=True)
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", str(model)]
    command += ["--lm-eval", "mmlu", "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = programs.run(command, cwd="/", env=env)
    assert done.returncode == 2 and "pip install -e '.[eval]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_acc_gets_wilsons_interval_and_mcnemars_p_against_the_seed():
    samples = [{"doc_id": i, "acc": acc} for i, acc in enumerate((1.0, 0.0, 1.0, 1.0))]
    found = {
        "results": {"x": {"alias": "x", "acc,none": 0.75, "acc_stderr,none": 0.2}},
        "samples": {"x": samples},
    }
    line = _figures("x", found)
    assert line == {
        "n": 4,
        "metrics": {"acc,none": 0.75, "acc_stderr,none": 0.2},
        "right": [True, False, True, True],
    }
    worse = {**line, "metrics": {"acc,none": 0.0}, "right": [False] * 4}
    arms = {"seed": line, "tuned": worse}
    assert _cell(arms, "seed", "acc,none") == "75.0% (30.1-95.4)"
    assert _cell(arms, "tuned", "acc,none") == "0.0% (0.0-49.0), p 0.250"
    # one question, listed for two answer filters, whose "acc" is neither right nor wrong
    partly = {"results": found["results"], "samples": {"x": [{"doc_id": 0, "acc": 0.3}] * 2}}
    figures = _figures("x", partly)
    assert (figures["right"], figures["n"]) == (None, 1)

"""Drift on held-out prompts: the seed's answers are reused by their ids; fp64; kills; resuming."""

import json

import pytest

import engine.evaluate.task_retention as task_retention_module
from engine.data.rows import load_rows
from engine.evaluate.further_measures import further_measures
from engine.evaluate.retention import retention
from engine.evaluate.target_task import evaluate
from engine.evaluate.task_retention import row_answers, task_retention, task_retention_table
from engine.measure.intervals import bootstrap
from engine.measure.seed_answers import seed_answers
from engine.runtime.files import read_jsonl, write_jsonl
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from model.chat import Chat
from model.llama import Llama
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora

QUESTIONS = ("Why?", "How far?", "Say it again.")


@pytest.fixture
def tiny(tiny_llama_dir):
    path = tiny_llama_dir(tokenizer=True)
    return Llama.from_pretrained(path), Chat.from_dir(path, load_tokenizer(path))


@pytest.fixture
def rows(tmp_path):
    made = [{"id": f"r{i}", "question": q, "answer": "7"} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return load_rows(tmp_path / "rows.json")


def generator(tiny, max_new):
    model, chat = tiny
    return ChatGenerator(model, chat, SamplerConfig(max_new_tokens=max_new, temperature=0.0))


@pytest.fixture
def judged(tiny, rows, tmp_path):
    """evaluation.jsonl: answers of the seed and of an adapter, of nine tokens at most."""
    model, _ = tiny
    other = new_lora(model, modules="all")
    other.params.add_(0.2)
    file = tmp_path / "evaluation.jsonl"
    evaluate(generator(tiny, 9), rows, "number", {"seed": None, "other": other}, file, {})
    answers = {(line["arm"], line["id"]): line["ids"] for line in read_jsonl(file)}
    assert all(answers["seed", row.id] != answers["other", row.id] for row in rows)
    return file


def test_judged_answers_are_reused_and_cut_as_sampling_would_cut_them(tiny, rows, judged, tmp_path):
    out = tmp_path / "retention_task.jsonl"
    reused = row_answers(generator(tiny, 5), rows, out, {}, judged)
    assert list(tmp_path.glob("retention_task*")) == [], "nothing was sampled"
    # the same ids as the same prompts get where they are sampled under the lower limit
    prompts = [("a", question) for question in QUESTIONS]
    sampled = seed_answers(generator(tiny, 5), tmp_path / "seed.jsonl", {}, prompts)
    assert [answer.ids for answer in reused] == [answer.ids for answer in sampled]
    assert [answer.n_prompt for answer in reused] == [answer.n_prompt for answer in sampled]
    assert all(len(answer.ids) - answer.n_prompt <= 5 for answer in reused)
    # without judged answers, or with those of an older run that kept no ids, they are sampled
    again = row_answers(generator(tiny, 5), rows, out, {})
    assert [answer.ids for answer in again] == [answer.ids for answer in reused]
    assert len(read_jsonl(tmp_path / "retention_task.jsonl.seed.jsonl")) == 3
    first, *others = read_jsonl(judged)
    del first["ids"]
    write_jsonl(judged, [first, *others])
    other = tmp_path / "other.jsonl"
    mixed = row_answers(generator(tiny, 5), rows, other, {}, judged)
    assert [answer.ids for answer in mixed] == [answer.ids for answer in reused]
    assert [line["id"] for line in read_jsonl(tmp_path / "other.jsonl.seed.jsonl")] == ["r0"]


def test_drift_is_that_of_general_prompts_with_the_same_answers(tiny, rows, judged, tmp_path):
    """The same estimators: the same prompts as general ones give the same figures; fp64 agrees."""
    model, _ = tiny
    lora = new_lora(model, modules="all")
    lora.params.add_(0.1)
    arms = {"seed": None, "x": lora}
    answers = row_answers(generator(tiny, 5), rows, tmp_path / "t.jsonl", {}, judged)
    found = task_retention(model, answers, arms, tmp_path / "t.jsonl", {})
    prompts = [("a", question) for question in QUESTIONS]
    general = seed_answers(generator(tiny, 5), tmp_path / "seed.jsonl", {}, prompts)
    expected = retention(model, general, arms, tmp_path / "r.jsonl", {})["x"]
    del expected["categories"]
    assert found == {"x": expected} and expected["kl"] > 0
    lines = read_jsonl(tmp_path / "t.jsonl")
    assert [(line["arm"], line["id"]) for line in lines] == [("x", "r0"), ("x", "r1"), ("x", "r2")]
    kl = [line["kl"] for line in lines]
    assert found["x"]["kl_interval"] == bootstrap(kl, [line["tokens"] for line in lines])
    for answer, line in zip(answers, lines, strict=True):
        position = slice(answer.n_prompt - 1, -1)
        log_p = model.logits(answer.ids).double().log_softmax(-1)[position]
        log_q = model.logits(answer.ids, lora).double().log_softmax(-1)[position]
        exact = (log_p.exp() * (log_p - log_q)).sum()
        assert line["kl"] == pytest.approx(exact.item(), rel=1e-4)
        assert line["tokens"] == len(log_p)
    text = task_retention_table(found)
    assert f"{found['x']['kl']:.4f}" in text and "3 held-out prompts" in text


def test_a_killed_measurement_ends_with_the_same_bytes(tiny, rows, judged, tmp_path):
    model, _ = tiny
    arms = {"seed": None}
    for number, name in enumerate(("sft", "sdft")):
        arms[name] = new_lora(model, modules="all", seed=number)
        arms[name].params.add_(0.05)
    out = tmp_path / "t.jsonl"
    answers = row_answers(generator(tiny, 5), rows, out, {}, judged)
    whole = task_retention(model, answers, arms, out, {"n": 1})
    undisturbed = out.read_bytes()
    for kept in range(len(undisturbed)):
        if kept % 97:  # some places in the middle of lines, and their ends
            continue
        out.write_bytes(undisturbed[:kept])
        assert task_retention(model, answers, arms, out, {"n": 1}) == whole
        assert out.read_bytes() == undisturbed
    assert task_retention(None, answers, arms, out, {"n": 1}) == whole, "complete: no model needed"
    with pytest.raises(ValueError, match="n: 1 -> 2"):
        task_retention(model, answers, arms, out, {"n": 2})
    assert task_retention(None, [], arms, tmp_path / "none.jsonl", {}) == {}


def test_the_seeds_states_are_computed_once_for_all_arms(tiny, rows, judged, tmp_path, monkeypatch):
    """Arms come one after another in a study; where the states are too large, as often as asked."""
    model, _ = tiny
    forwards = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: forwards.append(1) or forward(*a, **k))
    counts, contents = [], []
    for limit in (task_retention_module.KEPT_BYTES, 0):
        monkeypatch.setattr(task_retention_module, "KEPT_BYTES", limit)
        answers = row_answers(generator(tiny, 5), rows, tmp_path / "t.jsonl", {}, judged)
        for seed in (1, 2):
            arm = new_lora(model, modules="all", seed=seed)
            arm.params.add_(0.05)
            before = len(forwards)
            file = tmp_path / f"{limit}-{seed}.jsonl"
            task_retention(model, answers, {f"arm{seed}": arm}, file, {})
            counts.append(len(forwards) - before)
            contents.append(file.read_bytes())
    assert counts == [2, 1, 2, 2]  # of three rows: the seed and the arm, then the arm alone
    assert contents[:2] == contents[2:]


def test_an_arm_without_effect_has_no_drift(tiny, rows, judged, tmp_path):
    model, _ = tiny
    answers = row_answers(generator(tiny, 5), rows, tmp_path / "t.jsonl", {}, judged)
    found = task_retention(model, answers, {"x": new_lora(model)}, tmp_path / "t.jsonl", {})
    assert found["x"]["kl"] == 0 and found["x"]["agreement"] == 1


def test_the_small_table_has_a_line_for_every_trained_arm():
    drift = {"sft": {"kl": 0.5, "kl_interval": (0.4, 0.6)}}
    norms = {"sft": {"norm": 2.0, "relative": 0.0125}, "sdft": {"norm": 1.5, "relative": 0.01}}
    lines = further_measures(drift, norms).splitlines()
    assert "update norm" in lines[0] and "parameter shift" in lines[-1]
    of_arms = [line for line in lines if line.startswith("S")]
    sft, sdft = of_arms
    assert sft.split() == ["SFT", "0.5000", "0.4000", "-", "0.6000", "2.000", "1.25%"]
    assert sdft.split() == ["SDFT", "-", "-", "1.500", "1.00%"]
    assert further_measures({}, {}) == ""

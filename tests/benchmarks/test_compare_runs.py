"""The comparer of two runs: equal texts, ties, differences, rows that one run lacks."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compare_runs
from benchmarks.compare_runs import TextRow, compare_rows, first_difference
from engine.session import ModelConfig, Session
from kernels.packed import Packed

END = 99
PROMPT = [{"role": "user", "content": "Say a"}]


def rows(*texts, ended=True):
    return {f"r{i}": TextRow(f"r{i}", PROMPT, ids, ended) for i, ids in enumerate(texts)}


def fixed_scorer(first, second):
    asked = []

    def score(row, before, tokens):
        asked.append((row.key, before, tokens))
        return first, second

    return score, asked


def test_equal_rows_need_no_scorer():
    score, asked = fixed_scorer(0.0, 0.0)
    found = compare_rows(rows([1, 2], [3]), rows([1, 2], [3]), END, score)
    assert (found.equal, found.differences, found.missing, asked) == (2, [], [], [])
    assert found.is_good(0.0) and found.record(0.0)["share_equal"] == 1.0


@pytest.mark.parametrize(("gap", "tie"), [(0.0005, True), (0.002, False)])
def test_a_difference_is_a_tie_within_the_tolerance_only(gap, tie):
    score, asked = fixed_scorer(-1.0, -1.0 - gap)
    found = compare_rows(rows([1, 2, 3], [5]), rows([1, 7, 3], [5]), END, score)
    assert asked == [("r0", [1], (2, 7))], "the model is asked behind what both texts share"
    (difference,) = found.differences
    assert (difference.position, difference.tokens) == (1, (2, 7))
    assert difference.is_tie(1e-3) is tie and found.is_good(1e-3) is tie
    record = found.record(1e-3)
    assert (record["equal"], record["rows"], record["share_equal"]) == (1, 2, 0.5)
    assert record["differences"][0]["tie"] is tie and record["good"] is tie


def test_a_row_that_one_run_lacks_is_named():
    found = compare_rows(rows([1], [2]), rows([1]), END, None)
    assert found.missing == ["r1"] and found.equal == 1 and not found.is_good(1.0)


def test_an_end_is_a_token_and_a_cut_text_has_none():
    score, asked = fixed_scorer(-1.0, -1.0)
    found = compare_rows(rows([1, 2]), rows([1, 2, 3]), END, score)
    assert asked == [("r0", [1, 2], (END, 3))] and found.differences[0].is_tie(0.0)
    # cut at its limit, the first text has no token to compare with 3
    cut = compare_rows(rows([1, 2], ended=False), rows([1, 2, 3]), END, score)
    assert cut.differences[0].tokens == (-1, 3) and cut.differences[0].logprobs is None
    assert not cut.is_good(10.0) and len(asked) == 1


def test_without_a_model_a_difference_is_no_tie():
    found = compare_rows(rows([1]), rows([2]), END, None)
    assert not found.differences[0].is_tie(100.0)


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([], [5]) == 0


# ---- files


def write_run(folder: Path, *, rewrite=(5, 6), kl=0.1, losses=(2.0, 1.0)) -> Path:
    """The files of a finished job, as far as they are compared."""
    context = [{"role": "user", "content": "What is 1 + 1?"}]
    line = {"id": "train-0/0", "messages": context, "reference": "2", "finish": "stop"}
    write_lines(folder / "distilled.jsonl", [line | {"response_ids": list(rewrite)}])
    meta = {"distill": {"template": "gsm8k"}, "chat": "checkpoint"}
    (folder / "distilled.jsonl.meta.json").write_text(json.dumps(meta))
    answers = []
    for arm in ("seed", "sft", "sdft"):
        answer = {"arm": arm, "id": "test-0", "messages": context, "ids": [9], "finish": "stop"}
        answers.append(answer)
    write_lines(folder / "evaluation.jsonl", answers)
    write_lines(folder / "seed_answers.jsonl", [{"prompt": "Hello", "ids": [4, 258]}])
    summary = {
        "distilled": {"counts": {"accepted": 1}},
        "evaluation": {arm: {"n": 1, "right": 1, "nll": 1.5} for arm in ("seed", "sft", "sdft")},
        "retention": {"sft": {"kl": kl, "reverse_kl": kl, "agreement": 0.9}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for arm in ("sft", "sdft"):
        write_lines(folder / arm / "metrics.jsonl", [{"loss": loss} for loss in losses])
    return folder


def write_lines(file: Path, lines) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def last_line(capsys):
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_two_run_directories(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", kl=0.2, losses=(2.0, 1.5))
    compare_runs.main([str(run), str(other)])
    out, found = last_line(capsys)
    assert found["good"] and found["texts"]["rewrites"]["equal"] == 1
    assert found["arms"]["sft"]["other"]["kl"] == 0.2 and found["arms"]["sft"]["run"]["kl"] == 0.1
    assert found["losses"]["sft"] == {"steps": 2, "nats": 0.5, "share": 0.5}
    assert "differ by at most 0.5 nats, 50.00%" in out
    (figure,) = (tmp_path / "out" / "figures.jsonl").read_text().splitlines()
    assert json.loads(figure)["good"] is True


def test_a_text_that_differs_ends_in_code_1_and_missing_files_in_a_message(tmp_path, capsys):
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", rewrite=(5, 7))
    with pytest.raises(SystemExit) as ended:
        compare_runs.main([str(run), str(other)])
    assert ended.value.code == 1
    out, found = last_line(capsys)
    assert not found["good"] and "token 1 is 6 and 7" in out
    (other / "seed_answers.jsonl").unlink()
    with pytest.raises(SystemExit, match="seed_answers.jsonl is not there"):
        compare_runs.main([str(run), str(other)])


def test_answers_of_trained_arms_are_counted_and_not_judged(tmp_path, capsys):
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    lines = compare_runs.read_lines(other / "evaluation.jsonl")
    lines[1]["ids"] = [8]
    write_lines(other / "evaluation.jsonl", lines)
    compare_runs.main([str(run), str(other)])
    _, found = last_line(capsys)
    assert found["good"] and found["texts"]["sft, held-out"]["equal"] == 0


def test_the_scorer_gives_the_models_log_probabilities(tiny_llama_dir):
    session = Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True)), ops="torch"))
    row = TextRow("r", PROMPT, [3, 4], True)
    first, second = compare_runs.scorer(session)(row, [3], (4, 7))
    ids = torch.tensor([*session.chat.prompt_ids(PROMPT), 3])
    hidden = session.model.forward(ids, Packed.from_lengths([len(ids)], session.model.device))
    logprobs = session.model.head(hidden)[-1].double().log_softmax(-1)
    assert first == pytest.approx(logprobs[4].item(), abs=1e-5)
    assert second == pytest.approx(logprobs[7].item(), abs=1e-5)

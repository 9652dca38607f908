"""The cascade on a tiny model: which stage is asked when, who wins, and that nothing else counts.

The tiny model writes noise, so a stand-in for `judge` accepts by a hash of the text: every stage
then fails and succeeds often enough.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.data.distilled import KEPT, load_distilled
from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row, load_rows
from engine.distill import writer as writer_module
from engine.distill.cascade import (
    AssistantTurn,
    Attempt,
    Stage,
    TurnAttempts,
    check_temperature,
    parse_cascade,
)
from engine.distill.config import DistillConfig
from engine.distill.distill import distill
from engine.distill.rewrite_prompts import TEMPLATES
from engine.distill.rewrite_prompts import prompt as rewrite_prompt
from engine.distill.selection import PAPER
from engine.measure.likelihood import nll
from engine.sampling import chat_generator
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.verify.answer_numbers import last_number
from tests.helpers.distillation import (
    CASCADE,
    SAMPLING,
    judge_by_hash,
    load,
    rows,
    run_distillation,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tiny_llama_dir):
    return tiny_llama_dir(tokenizer=True)


def go(path, out, config=CASCADE, sampling=SAMPLING, **settings):
    return run_distillation(path, out, config, sampling, **settings)


@pytest.fixture
def by_hash(monkeypatch):
    monkeypatch.setattr(writer_module, "judge", judge_by_hash)


# ---- what may be asked for


def test_cascades_are_read():
    assert parse_cascade("unguided:2, guided:3,cooler:1") == (
        Stage("unguided", 2), Stage("guided", 3), Stage("cooler", 1))  # fmt: skip
    assert [s.temperature(0.8) for s in parse_cascade("unguided:1,guided:1,cooler:1")] == [
        0.8, 0.8, 0.4]  # fmt: skip
    assert not parse_cascade("unguided:1")[0].guided and parse_cascade("cooler:1")[0].guided


@pytest.mark.parametrize(
    "text", ["", "guided", "guided:0", "guided:-1", "guided:65", "guided:1,guided:2", "hot:1",
             "guided:1,", "guided:x", "guided=1"],
)  # fmt: skip
def test_cascades_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="expected STAGE:TRIES.*unguided, guided, cooler"):
        DistillConfig(cascade=text).check()


def test_settings_that_contradict_each_other_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="choose 'best': expected likelihood or first"):
        DistillConfig(choose="best").check()
    with pytest.raises(ValueError, match="the published code asks once"):
        DistillConfig(cascade="guided:2", paper_exact=True).check()
    for text in ("guided:2", "unguided:2", "guided:1,cooler:1"):
        with pytest.raises(ValueError, match="temperature 0 writes the same text"):
            check_temperature(parse_cascade(text), 0.0)
        check_temperature(parse_cascade(text), 0.1)
    check_temperature(parse_cascade("unguided:1,guided:1"), 0.0)
    greedy = SamplerConfig(temperature=0.0)
    with pytest.raises(ValueError, match="temperature 0"):
        go(tiny, tmp_path / "d.jsonl", sampling=greedy)
    assert not (tmp_path / "d.jsonl").exists()


# ---- what is written


def test_each_line_has_its_tries_and_the_winner_is_the_likeliest(tiny, tmp_path, by_hash):
    report = go(tiny, tmp_path / "d.jsonl")
    lines = load_distilled(tmp_path / "d.jsonl")
    model, chat = load(tiny)
    made = {}  # everything that was asked, made again one by one, without a cascade
    order = ["unguided", "guided", "cooler"]
    several = 0
    for line in lines:
        # stages are asked in order, each in full, and only after the one before failed
        assert list(line.tries) == order[: len(line.tries)]
        assert [len(t) for t in line.tries.values()] == [3, 2, 1][: len(line.tries)]
        *failed, last = line.tries.values()
        assert not any(status in KEPT for tries in failed for status in tries)
        won = [n for n, status in enumerate(last) if status in KEPT]
        assert won or len(line.tries) == 3
        assert line.stage == (order[len(line.tries) - 1] if won else "reference")
        assert line.status == ("accepted" if won else last[0])
        assert line.target == (line.response if won else line.reference)

        # the response is one of the stage's samples, as a sampler of its own writes them
        stage = order[len(line.tries) - 1]
        prompt = chat.prompt_ids(line.messages)
        if stage != "unguided":
            asked = rewrite_prompt(chat, TEMPLATES["using"], line.messages, line.reference)
            prompt = chat.prompt_ids(asked)
        name = line.id if stage == "guided" else f"{line.id}#{stage}"
        temperature = 0.5 if stage == "cooler" else 1.0
        config = SamplerConfig(rows=1, temperature=temperature, top_k=60, seed=1)
        with Sampler(model, chat.tokenizer.decode, chat.end_ids, config) as sampler:
            requests = [Request(name, prompt, 9, sample=n) for n in range(len(last))]
            written = {c.sample: c.ids for c in sampler.run(requests)}
        made[line.id] = written
        if len(won) < 2:
            assert line.response_ids == written[won[0] if won else 0]
            continue
        several += 1
        plain = chat.prompt_ids(line.messages)
        means = [nll(model, plain, [*written[n], chat.end_id]).mean().item() for n in won]
        best = min(range(len(won)), key=means.__getitem__)
        assert line.response_ids == written[won[best]]
    assert several >= 2, "the choice was put to the test"
    assert {line.stage for line in lines} == {*order, "reference"}

    # and the report counts them
    text = report.text()
    for stage in order:
        asked = [line.tries[stage] for line in lines if stage in line.tries]
        counts = Counter(status for tries in asked for status in tries)
        decided = sum(line.stage == stage for line in lines)
        total = sum(map(len, asked))
        assert f"{stage}: {decided} of {len(asked)} turns decided by {total} tries (" in text
        assert all(f"{status} {n}" in text for status, n in counts.items())
    assert f"reference: {sum(line.stage == 'reference' for line in lines)} turns" in text


def test_attempts_are_scored_under_the_plain_prompt_with_the_end_token(tiny):
    _, chat = load(tiny)
    turn = AssistantTurn.first(conversation()).following("Mine.")
    seen = []

    class Spy:
        class owner:
            class config:
                max_position = len(chat.prompt_ids(turn.context)) + 4

        def losses(self, batch):
            seen.extend(batch)
            nats = {4: [3.0, 1.0], 5: [1.0, 3.0], 6: [2.5, 2.5, 2.5], 8: [0.0, 0.0, 4.0]}
            return [[nats[a[0]] if a else [] for a in asked.answers] for asked in batch]

    def choice(*tries):
        attempts = TurnAttempts(turn, [Stage("guided", len(tries))])
        for n, (ids, fit) in enumerate(tries):
            status = "accepted" if fit else "empty"
            attempts.add(Attempt(n, ids, "", status, "stop", 1, fit))
        won = attempts.winner(chat, Spy())
        return won and won.ids

    a, b, c, long, d = [4], [5], [6, 6], [7] * 4, [8, 8]
    assert choice((a, True), (b, True)) == a, "the first of equals"
    assert choice((c, True), (b, True), (a, True)) == b, "means per token"
    assert choice((c, True), (d, True), (b, False)) == d
    assert choice((long, True), (c, True)) == c, "no room for it behind the plain prompt"
    before = len(seen)
    assert choice((a, False), (b, True)) == b and choice((a, False)) is None
    assert len(seen) == before, "one fit try needs no weighing"
    assert all(asked.prompt == chat.prompt_ids(turn.context) for asked in seen)
    assert [m["content"] for m in turn.context] == ["Question 0?", "Mine.", "Question 1?"]
    assert seen[0].answers == [[4, chat.end_id], [5, chat.end_id]] and seen[3].answers[0] == []


def test_choose_first_takes_the_first(tiny, tmp_path, by_hash):
    config = DistillConfig(max_new_tokens="9", cascade="unguided:3", choose="first")
    likeliest = DistillConfig(max_new_tokens="9", cascade="unguided:3")
    single = [row for row in rows(30) if len(row.turns) == 1]
    first = go(tiny, tmp_path / "first.jsonl", config, given=single).lines
    best = go(tiny, tmp_path / "best.jsonl", likeliest, given=single).lines
    model, chat = load(tiny)
    differ = 0
    for a, b in zip(first, best, strict=True):
        assert a.tries == b.tries and a.stage == b.stage
        if a.response_ids != b.response_ids:
            differ += 1
            assert sum(status in KEPT for status in a.tries["unguided"]) > 1
            plain = chat.prompt_ids(a.messages)
            one, other = (nll(model, plain, [*x.response_ids, chat.end_id]).mean() for x in (a, b))
            assert other < one
    assert differ


def test_a_guided_attempt_does_not_depend_on_earlier_stages(tiny, tmp_path, by_hash):
    """The numbers of a guided try do not depend on what was tried before it."""
    single = [row for row in rows() if len(row.turns) == 1]
    plain = {
        line.id: line
        for line in go(
            tiny, tmp_path / "p.jsonl", DistillConfig(max_new_tokens="9"), given=single
        ).lines
    }
    config = DistillConfig(max_new_tokens="9", cascade="unguided:1,guided:1")
    lines = go(tiny, tmp_path / "c.jsonl", config, given=single).lines
    guided = [line for line in lines if "guided" in line.tries]
    assert len(guided) > 3
    for line in guided:
        assert line.response_ids == plain[line.id].response_ids
        assert line.tries["guided"] == [plain[line.id].status]
    assert all(list(line.tries) == ["guided"] for line in plain.values())


def test_rows_run_together_do_not_change_a_cascade(tiny, tmp_path, by_hash):
    go(tiny, tmp_path / "three.jsonl")
    for count in (1, 16):
        sampling = SamplerConfig(rows=count, temperature=1.0, top_k=60, seed=1)
        go(tiny, tmp_path / f"{count}.jsonl", sampling=sampling)
        assert (tmp_path / f"{count}.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


def test_later_turns_are_asked_with_the_earlier_targets(tiny, tmp_path, by_hash):
    lines = {line.id: line for line in go(tiny, tmp_path / "d.jsonl").lines}
    for row in rows():
        for k in range(len(row.turns)):
            messages = lines[f"{row.id}/{k}"].messages
            earlier = [m["content"] for m in messages if m["role"] == "assistant"]
            assert earlier == [lines[f"{row.id}/{j}"].target for j in range(k)]


JOB = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from engine.distill import writer
from engine.runtime.distributed import start
from tests.helpers.distillation import CASCADE, judge_by_hash, run_distillation
torch.set_num_threads(1)
world = start()
writer.judge = judge_by_hash
judged_attempt, count = writer.judged_attempt, []
def killed_attempt(*args):
    count.append(1)
    if world.rank == {rank} and len(count) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return judged_attempt(*args)
writer.judged_attempt = killed_attempt
out = Path({out!r})
begun = bool(list(out.parent.glob(out.name + "*")))
run_distillation({model!r}, out, CASCADE, resume=begun, world=world)
"""


def test_killed_and_resumed_is_byte_identical(tiny, tmp_path, by_hash):
    """SIGKILL while the n-th try is judged."""
    go(tiny, tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    for kill in (2, 17, 31, 0):
        script = JOB.format(root=str(ROOT), model=str(tiny), out=str(out), kill=kill, rank=0)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == (-9 if kill else 0), done.stderr[-2000:]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_processes_write_what_one_does(tiny, tmp_path, by_hash):
    go(tiny, tmp_path / "one.jsonl")
    script, out = tmp_path / "job.py", tmp_path / "two.jsonl"
    script.write_text(JOB.format(root=str(ROOT), model=str(tiny), out=str(out), kill=0, rank=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_request_of_another_temperature_changes_no_other(tiny):
    """Requests with temperatures of their own, together and alone."""
    model, chat = load(tiny)
    prompts = {f"r{i}": chat.prompt_ids([{"role": "user", "content": f"{i}?"}]) for i in range(6)}
    temperatures = {"r0": None, "r1": 0.5, "r2": 0.0, "r3": 0.5, "r4": 1.0, "r5": None}

    def write(requests, **settings):
        config = SamplerConfig(**{"temperature": 1.0, "top_k": 60, **settings})
        with Sampler(model, chat.tokenizer.decode, chat.end_ids, config) as sampler:
            return {c.id: (c.ids, c.logprobs) for c in sampler.run(requests)}

    for penalty in (1.0, 1.3):
        together = write(
            [Request(n, p, 12, temperature=temperatures[n]) for n, p in prompts.items()],
            repetition_penalty=penalty,
        )
        for name, ids in prompts.items():
            temperature = 1.0 if temperatures[name] is None else temperatures[name]
            alone = write(
                [Request(name, ids, 12)], temperature=temperature, repetition_penalty=penalty
            )
            assert together[name] == alone[name]


# ---- tests of programs, long references, the published defects


def test_a_rows_tests_are_of_its_last_answer(tiny, tmp_path, monkeypatch):
    seen = {}

    def spy(context, reference, text, finish, verifier, *, rules, tests):
        seen[reference] = tests
        return "accepted"

    monkeypatch.setattr(writer_module, "judge", spy)
    said = [
        {"role": role, "content": f"{role} {turn}"}
        for turn in range(2)
        for role in ("user", "assistant")
    ]
    go(
        tiny,
        tmp_path / "d.jsonl",
        DistillConfig(max_new_tokens="4"),
        given=[Row("a", tuple(said), "t")],
    )
    assert seen == {"assistant 0": "", "assistant 1": "t"}


def test_a_reference_of_2048_tokens_is_never_cut(tiny_llama_dir, tmp_path, monkeypatch):
    """One token a byte: shown whole to the model, room for more than it, whole in training."""
    path = tiny_llama_dir(tokenizer=True, max_position_embeddings=16384)
    model, chat = load(path)
    reference = ("word " * 410)[:2047] + "."
    assert len(chat.response_ids(reference)) == 2048
    row = Row(
        "long", ({"role": "user", "content": "Q?"}, {"role": "assistant", "content": reference})
    )
    asked = []

    class Spy(Sampler):
        def submit(self, request):
            asked.append(request)
            super().submit(Request(request.id, request.prompt, 3, request.sample))

    monkeypatch.setattr(chat_generator, "Sampler", Spy)
    config = DistillConfig(cascade="unguided:1,guided:1", verify="number")
    report = distill(model, chat, [row], tmp_path / "d", config, SAMPLING, settings={})
    unguided, guided = asked
    assert reference in chat.tokenizer.decode(guided.prompt)
    assert chat.tokenizer.decode(guided.prompt).rstrip().endswith("assistant")
    assert reference not in chat.tokenizer.decode(unguided.prompt)
    assert guided.max_new_tokens == unguided.max_new_tokens == 64 + 3 * 2048
    (line,) = report.lines
    assert line.target == line.reference == reference and line.status not in KEPT
    (example,), counts = encode(report.lines, chat, EncodeRules(max_length=4096))
    assert len(example.ids) - example.n_prompt == 2049 and counts.truncated == 0
    with pytest.raises(ValueError, match="longer than max_length=1024"):
        encode(report.lines, chat, EncodeRules(max_length=1024))


def conversation():
    said = []
    for turn in range(3):
        said += [
            {"role": "user", "content": f"Question {turn}?"},
            {"role": "assistant", "content": f"Answer {turn}."},
        ]
    return Row("talk", tuple(said))


def test_the_published_defects_and_nothing_else(tiny_llama_dir, tmp_path):
    """paper.md 1.2 and 'Defects': (b) cut rewrites end, (c) no prefix, (d) last turn, (e) 1024."""
    long = Row("long", (
        {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "x " * 600},
    ))  # fmt: skip
    model, chat = load(tiny_llama_dir(tokenizer=True, max_position_embeddings=2048))
    base = {"template": "gsm8k", "max_new_tokens": "9"}
    given = [conversation(), long]
    paper = go_with(model, chat, given, tmp_path / "p", DistillConfig(**base, paper_exact=True))
    ours = go_with(model, chat, given, tmp_path / "o", DistillConfig(**base))

    # (d) only the last turn of the conversation was asked for; it saw the given answers
    assert [line.status for line in paper[:2]] == ["not_asked", "not_asked"]
    assert [line.target for line in paper[:2]] == ["Answer 0.", "Answer 1."]
    assert [m["content"] for m in paper[2].messages if m["role"] == "assistant"] == [
        "Answer 0.", "Answer 1."]  # fmt: skip
    assert all(line.tries for line in ours)

    # (c) and (b) on what was asked: nine sampled tokens, no prefix, kept although they were cut
    cut = [line for line in paper[2:] if line.finish == "length"]
    assert cut
    for line in cut:
        assert line.response_tokens == 9 and line.status == "accepted"
        assert not line.response.startswith("Great!")
        assert line.target == line.response
    prefix = len(chat.prefix_ids("Great! Let's think step by step. "))
    assert all(x.response_tokens == 9 + prefix for x in ours if x.finish == "length")
    assert all(x.response.startswith("Great!") and x.status not in KEPT for x in ours)
    examples, counts = encode(paper, chat, EncodeRules(max_length=2048))
    assert counts.end_added == len(cut) and counts.unfinished == 0
    by_id = {e.id: e for e in examples}
    for line in cut:
        example = by_id[line.id]
        assert example.ids[example.n_prompt :] == [*line.response_ids, chat.end_id]
    assert by_id["talk/0"].ids[by_id["talk/0"].n_prompt :][:-1] == chat.response_ids("Answer 0.")

    # (e) the prompt lost its end: the rest of the reference, the answer's beginning
    assert PAPER.cut_prompts == 1024
    assert paper[3].prompt_tokens == 1024 < ours[3].prompt_tokens


def go_with(model, chat, given, out, config):
    out.mkdir()
    return distill(model, chat, given, out / "d.jsonl", config, SAMPLING, settings={}).lines


def test_the_report_says_how_many_prompts_were_cut(tiny, tmp_path):
    report = go(tiny, tmp_path / "d.jsonl", DistillConfig(max_new_tokens="4", paper_exact=True))
    assert "prompts cut at 1024 tokens (or just as long): 0" in report.text()
    assert "prompts cut" not in go(tiny, tmp_path / "o.jsonl").text()


def test_real_rows_and_the_real_model(shared_data, smollm2_dir, tmp_path):
    """Six word problems: what is kept has the right number, whoever wrote it."""
    model, chat = load(smollm2_dir)
    given = load_rows(shared_data / "gsm8k_train.json", limit=6)
    config = DistillConfig("gsm8k", "number", "unguided:2,guided:1,cooler:1", max_new_tokens="96")
    sampling = SamplerConfig(temperature=0.95, top_p=0.7, top_k=50, seed=0)
    lines = distill(model, chat, given, tmp_path / "d", config, sampling, settings={}).lines
    assert len(lines) == 6 and any(line.stage != "reference" for line in lines)
    for line in lines:
        assert last_number(line.target) == last_number(line.reference)
        assert (line.status in KEPT) == (line.stage != "reference")
    assert [json.loads(x)["id"] for x in (tmp_path / "d").read_text().splitlines()] == [
        line.id for line in lines]  # fmt: skip
    torch.testing.assert_close(model.weights["embed"], load(smollm2_dir)[0].weights["embed"])

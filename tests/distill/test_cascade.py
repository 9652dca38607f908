"""The cascade on a tiny model: when a stage is sampled, which attempt wins, and that kills, batch
size and processes change nothing.

The tiny model writes noise, so a stand-in for `judge` accepts by a hash of the text: every stage
then fails and succeeds often enough.
"""

import json
import signal
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
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.verify.answer_numbers import last_number
from tests.helpers import programs
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


def run_cascade(path, out, config=CASCADE, sampling=SAMPLING, **settings):
    return run_distillation(path, out, config, sampling, **settings)


@pytest.fixture
def by_hash(monkeypatch):
    """Attempts are judged by `judge_by_hash`."""
    monkeypatch.setattr(writer_module, "judge", judge_by_hash)


def single_turn_rows(count=14):
    return [row for row in rows(count) if len(row.turns) == 1]


# ---- settings


def test_cascades_are_read():
    stages = parse_cascade("unguided:2, guided:3,cooler:1")
    assert stages == (Stage("unguided", 2), Stage("guided", 3), Stage("cooler", 1))
    assert [stage.temperature(0.8) for stage in stages] == [0.8, 0.8, 0.4]
    assert [stage.guided for stage in stages] == [False, True, True]


@pytest.mark.parametrize(
    "text", ["", "guided:", "guided:0", "guided:-1", "guided:65", "guided:1,guided:2", "hot:1",
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
        run_cascade(tiny, tmp_path / "d.jsonl", sampling=greedy)
    assert not (tmp_path / "d.jsonl").exists()


# ---- lines and winners


STAGES = ["unguided", "guided", "cooler"]  # of CASCADE, with 3, 2 and 1 tries
TRIES = [3, 2, 1]


def sampled_again(model, chat, line, stage, tries):
    """The samples of a stage of a line's turn, made one by one without a cascade: sample -> ids."""
    prompt = chat.prompt_ids(line.messages)
    if stage != "unguided":
        messages = rewrite_prompt(chat, TEMPLATES["using"], line.messages, line.reference)
        prompt = chat.prompt_ids(messages)
    name = line.id if stage == "guided" else f"{line.id}#{stage}"
    temperature = 0.5 if stage == "cooler" else 1.0
    config = SamplerConfig(rows=1, temperature=temperature, top_k=60, seed=1)
    requests = [Request(name, prompt, 9, sample=n) for n in range(tries)]
    with Sampler(model, chat.tokenizer.decode, chat.end_ids, config) as sampler:
        return {completion.sample: completion.ids for completion in sampler.run(requests)}


def mean_nats(model, chat, messages, ids):
    """Nats per token of an answer with its end token under the plain prompt."""
    prompt = chat.prompt_ids(messages)
    return nll(model, prompt, [*ids, chat.end_id]).mean().item()


def test_each_line_has_its_tries_and_the_winner_is_the_likeliest(tiny, tmp_path, by_hash):
    report = run_cascade(tiny, tmp_path / "d.jsonl")
    lines = load_distilled(tmp_path / "d.jsonl")
    model, chat = load(tiny)
    choices = 0  # lines with several accepted attempts
    for line in lines:
        # stages are sampled in order, each in full, and only after the one before it failed
        count = len(line.tries)
        assert list(line.tries) == STAGES[:count]
        assert [len(statuses) for statuses in line.tries.values()] == TRIES[:count]
        *failed, last = line.tries.values()
        for statuses in failed:
            assert not any(status in KEPT for status in statuses)
        accepted = [n for n, status in enumerate(last) if status in KEPT]
        stage = STAGES[count - 1]
        if accepted:
            assert line.stage == stage
            assert line.status == "accepted"
            assert line.target == line.response
        else:
            assert count == 3
            assert line.stage == "reference"
            assert line.status == last[0]
            assert line.target == line.reference

        # the response is the likeliest accepted sample; without one it is the first sample
        samples = sampled_again(model, chat, line, stage, len(last))
        if not accepted:
            assert line.response_ids == samples[0]
            continue
        means = {n: mean_nats(model, chat, line.messages, samples[n]) for n in accepted}
        likeliest = min(accepted, key=lambda n: means[n])
        assert line.response_ids == samples[likeliest]
        if len(accepted) > 1:
            choices += 1
    assert choices >= 2, "several attempts were accepted in two lines at least"
    assert {line.stage for line in lines} == {*STAGES, "reference"}

    # the report counts them
    text = report.text()
    for stage in STAGES:
        tries = [line.tries[stage] for line in lines if stage in line.tries]
        counts = Counter()
        for statuses in tries:
            counts.update(statuses)
        decided = sum(line.stage == stage for line in lines)
        total = counts.total()
        assert f"{stage}: {decided} of {len(tries)} turns decided by {total} tries (" in text
        for status, count in counts.items():
            assert f"{status} {count}" in text
    references = sum(line.stage == "reference" for line in lines)
    assert f"reference: {references} turns" in text


def test_attempts_are_scored_under_the_plain_prompt_with_the_end_token(tiny):
    _, chat = load(tiny)
    turn = AssistantTurn.first(conversation()).following("Mine.")
    seen = []
    # by the first token of an answer; the last loss is that of the end token
    nats = {4: [3.0, 1.0], 5: [1.0, 3.0], 6: [2.5, 2.5, 2.5], 8: [0.0, 0.0, 4.0]}

    class Spy:
        """A scorer of made losses for a model with room for four tokens."""

        class owner:
            class config:
                max_position = len(chat.prompt_ids(turn.context)) + 4

        def losses(self, batch):
            seen.extend(batch)
            losses = []
            for request in batch:
                losses.append([nats[answer[0]] if answer else [] for answer in request.answers])
            return losses

    def winner(*tries):
        """The ids of the winner of attempts (ids, whether accepted), None without one."""
        attempts = TurnAttempts(turn, [Stage("guided", len(tries))])
        for sample, (ids, accepted) in enumerate(tries):
            status = "accepted" if accepted else "empty"
            attempts.add(Attempt(sample, ids, "", status, "stop", 1, accepted))
        won = attempts.winner(chat, Spy())
        return None if won is None else won.ids

    a = [4]
    b = [5]
    c = [6, 6]
    d = [8, 8]
    long = [7] * 4
    assert winner((a, True), (b, True)) == a, "the first of equals"
    assert winner((c, True), (b, True), (a, True)) == b, "means per token"
    assert winner((c, True), (d, True), (b, False)) == d
    assert winner((long, True), (c, True)) == c, "no room for it behind the plain prompt"
    before = len(seen)
    assert winner((a, False), (b, True)) == b
    assert winner((a, False)) is None
    assert len(seen) == before, "a single accepted attempt is not scored"
    assert all(request.prompt == chat.prompt_ids(turn.context) for request in seen)
    assert [m["content"] for m in turn.context] == ["Question 0?", "Mine.", "Question 1?"]
    assert seen[0].answers == [[4, chat.end_id], [5, chat.end_id]]
    assert seen[3].answers[0] == []


def test_choose_first_takes_the_first_and_likelihood_a_likelier_one(tiny, tmp_path, by_hash):
    config = DistillConfig(max_new_tokens="9", cascade="unguided:3", choose="first")
    likeliest = DistillConfig(max_new_tokens="9", cascade="unguided:3")
    given = single_turn_rows(30)
    first = run_cascade(tiny, tmp_path / "first.jsonl", config, given=given).lines
    best = run_cascade(tiny, tmp_path / "best.jsonl", likeliest, given=given).lines
    model, chat = load(tiny)
    differing = 0
    for a, b in zip(first, best, strict=True):
        assert a.tries == b.tries
        assert a.stage == b.stage
        if a.response_ids == b.response_ids:
            continue
        differing += 1
        assert sum(status in KEPT for status in a.tries["unguided"]) > 1
        nats_of_first = mean_nats(model, chat, a.messages, a.response_ids)
        nats_of_best = mean_nats(model, chat, a.messages, b.response_ids)
        assert nats_of_best < nats_of_first
    assert differing


def test_a_guided_attempt_does_not_depend_on_earlier_stages(tiny, tmp_path, by_hash):
    given = single_turn_rows()
    guided_only = DistillConfig(max_new_tokens="9")
    report = run_cascade(tiny, tmp_path / "p.jsonl", guided_only, given=given)
    plain = {line.id: line for line in report.lines}
    config = DistillConfig(max_new_tokens="9", cascade="unguided:1,guided:1")
    lines = run_cascade(tiny, tmp_path / "c.jsonl", config, given=given).lines
    guided = [line for line in lines if "guided" in line.tries]
    assert len(guided) > 3
    for line in guided:
        assert line.response_ids == plain[line.id].response_ids
        assert line.tries["guided"] == [plain[line.id].status]
    assert all(list(line.tries) == ["guided"] for line in plain.values())


def test_the_number_of_running_sequences_does_not_change_a_cascade(tiny, tmp_path, by_hash):
    run_cascade(tiny, tmp_path / "three.jsonl")
    for count in (1, 16):
        sampling = SamplerConfig(rows=count, temperature=1.0, top_k=60, seed=1)
        run_cascade(tiny, tmp_path / f"{count}.jsonl", sampling=sampling)
        assert (tmp_path / f"{count}.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


def test_later_turns_have_the_earlier_targets_in_their_context(tiny, tmp_path, by_hash):
    lines = {line.id: line for line in run_cascade(tiny, tmp_path / "d.jsonl").lines}
    for row in rows():
        for number in range(len(row.turns)):
            messages = lines[f"{row.id}/{number}"].messages
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            targets = [lines[f"{row.id}/{earlier}"].target for earlier in range(number)]
            assert answers == targets


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
judged_attempt = writer.judged_attempt
calls = []
def killed_attempt(*args):
    calls.append(1)
    if world.rank == {rank} and len(calls) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return judged_attempt(*args)
writer.judged_attempt = killed_attempt
out = Path({out!r})
begun = bool(list(out.parent.glob(out.name + "*")))
run_distillation({model!r}, out, CASCADE, resume=begun, world=world)
"""


def job_script(model, out, *, kill, rank):
    """A job whose process `rank` kills itself while the attempt of number `kill` is judged."""
    return JOB.format(root=str(ROOT), model=str(model), out=str(out), kill=kill, rank=rank)


def test_killed_and_resumed_is_byte_identical(tiny, tmp_path, by_hash):
    """SIGKILL while the n-th attempt is judged."""
    run_cascade(tiny, tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    for kill in (2, 17, 31, 0):  # 0: not killed
        script = job_script(tiny, out, kill=kill, rank=0)
        done = programs.run([sys.executable, "-c", script])
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-2000:]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_processes_write_what_one_does(tiny, tmp_path, by_hash):
    run_cascade(tiny, tmp_path / "one.jsonl")
    script = tmp_path / "job.py"
    out = tmp_path / "two.jsonl"
    script.write_text(job_script(tiny, out, kill=0, rank=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = programs.run([*command, script], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_request_of_another_temperature_changes_no_other(tiny):
    """Requests with temperatures of their own, sampled together and alone."""
    model, chat = load(tiny)
    temperatures = {"r0": None, "r1": 0.5, "r2": 0.0, "r3": 0.5, "r4": 1.0, "r5": None}
    prompts = {}
    for number, name in enumerate(temperatures):
        prompts[name] = chat.prompt_ids([{"role": "user", "content": f"{number}?"}])

    def sample(requests, temperature, penalty):
        """Token ids and log-probabilities by request."""
        config = SamplerConfig(temperature=temperature, top_k=60, repetition_penalty=penalty)
        with Sampler(model, chat.tokenizer.decode, chat.end_ids, config) as sampler:
            return {c.id: (c.ids, c.logprobs) for c in sampler.run(requests)}

    for penalty in (1.0, 1.3):
        requests = []
        for name, prompt in prompts.items():
            requests.append(Request(name, prompt, 12, temperature=temperatures[name]))
        together = sample(requests, 1.0, penalty)
        for name, prompt in prompts.items():
            temperature = 1.0 if temperatures[name] is None else temperatures[name]
            alone = sample([Request(name, prompt, 12)], temperature, penalty)
            assert together[name] == alone[name]


# ---- tests of programs, long references, the published defects


def test_a_rows_tests_belong_to_its_last_answer(tiny, tmp_path, monkeypatch):
    seen = {}

    def spy(context, reference, text, finish, verifier, *, rules, tests):
        seen[reference] = tests
        return "accepted"

    monkeypatch.setattr(writer_module, "judge", spy)
    messages = (
        {"role": "user", "content": "user 0"},
        {"role": "assistant", "content": "assistant 0"},
        {"role": "user", "content": "user 1"},
        {"role": "assistant", "content": "assistant 1"},
    )
    config = DistillConfig(max_new_tokens="4")
    run_cascade(tiny, tmp_path / "d.jsonl", config, given=[Row("a", messages, "t")])
    assert seen == {"assistant 0": "", "assistant 1": "t"}


def test_a_reference_of_2048_tokens_is_never_cut(tiny_llama_dir, tmp_path, monkeypatch):
    """One token a byte: shown whole to the model, room for more than it, whole in training."""
    path = tiny_llama_dir(tokenizer=True, max_position_embeddings=16384)
    model, chat = load(path)
    reference = ("word " * 410)[:2047] + "."
    assert len(chat.response_ids(reference)) == 2048
    row = question_row("long", reference)
    submitted = []

    class Spy(Sampler):
        """Notes the requests, and samples three tokens of each."""

        def submit(self, request):
            submitted.append(request)
            super().submit(Request(request.id, request.prompt, 3, request.sample))

    monkeypatch.setattr(chat_generator, "Sampler", Spy)
    config = DistillConfig(cascade="unguided:1,guided:1", verify="number")
    generator = ChatGenerator(model, chat, SAMPLING)
    report = distill(generator, [row], tmp_path / "d", config, settings={})
    unguided, guided = submitted
    assert reference in chat.tokenizer.decode(guided.prompt)
    assert chat.tokenizer.decode(guided.prompt).rstrip().endswith("assistant")
    assert reference not in chat.tokenizer.decode(unguided.prompt)
    assert guided.max_new_tokens == unguided.max_new_tokens == 64 + 3 * 2048
    (line,) = report.lines
    assert line.target == line.reference == reference
    assert line.status not in KEPT
    (example,), counts = encode(report.lines, chat, EncodeRules(max_length=4096))
    assert len(example.ids) - example.n_prompt == 2049 and counts.truncated == 0
    with pytest.raises(ValueError, match="longer than max_length=1024"):
        encode(report.lines, chat, EncodeRules(max_length=1024))


def question_row(name, reference):
    question = {"role": "user", "content": "Q?"}
    return Row(name, (question, {"role": "assistant", "content": reference}))


def conversation():
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        messages.append({"role": "assistant", "content": f"Answer {turn}."})
    return Row("talk", tuple(messages))


def test_paper_exact_has_the_published_defects_and_no_others(tiny_llama_dir, tmp_path):
    """Of the published code (engine/presets.py): (b) a rewrite that was cut is trained to end
    there, (c) the forced beginning is dropped, (d) only the last turn is rewritten, (e) prompts are
    cut at 1,024 tokens."""
    long = question_row("long", "x " * 600)
    model, chat = load(tiny_llama_dir(tokenizer=True, max_position_embeddings=2048))
    base = {"template": "gsm8k", "max_new_tokens": "9"}
    given = [conversation(), long]
    paper_config = DistillConfig(**base, paper_exact=True)
    paper = lines_of(model, chat, given, tmp_path / "p", paper_config)
    ours = lines_of(model, chat, given, tmp_path / "o", DistillConfig(**base))

    # (d) only the last turn of the conversation is rewritten; it sees the given answers
    assert [line.status for line in paper[:2]] == ["not_asked", "not_asked"]
    assert [line.target for line in paper[:2]] == ["Answer 0.", "Answer 1."]
    context = [m["content"] for m in paper[2].messages if m["role"] == "assistant"]
    assert context == ["Answer 0.", "Answer 1."]
    assert all(line.tries for line in ours)

    # (c) and (b) on rewritten turns: nine sampled tokens, no prefix, kept although they were cut
    cut = [line for line in paper[2:] if line.finish == "length"]
    assert cut
    for line in cut:
        assert line.response_tokens == 9
        assert line.status == "accepted"
        assert not line.response.startswith("Great!")
        assert line.target == line.response
    prefix = chat.prefix_ids("Great! Let's think step by step. ")
    for line in ours:
        assert line.response.startswith("Great!")
        assert line.status not in KEPT
        if line.finish == "length":
            assert line.response_tokens == 9 + len(prefix)
    examples, counts = encode(paper, chat, EncodeRules(max_length=2048))
    assert counts.end_added == len(cut)
    assert counts.unfinished == 0
    answers = {example.id: example.ids[example.n_prompt :] for example in examples}
    for line in cut:
        assert answers[line.id] == [*line.response_ids, chat.end_id]
    assert answers["talk/0"][:-1] == chat.response_ids("Answer 0.")

    # (e) the prompt lost its end: the rest of the reference, the answer's beginning
    assert PAPER.cut_prompts == 1024
    assert paper[3].prompt_tokens == 1024 < ours[3].prompt_tokens


def lines_of(model, chat, given, out, config):
    """The distilled lines of `given`, written into the new directory `out`."""
    out.mkdir()
    generator = ChatGenerator(model, chat, SAMPLING)
    return distill(generator, given, out / "d.jsonl", config, settings={}).lines


def test_the_report_says_how_many_prompts_were_cut(tiny, tmp_path):
    paper_config = DistillConfig(max_new_tokens="4", paper_exact=True)
    report = run_cascade(tiny, tmp_path / "d.jsonl", paper_config)
    assert "prompts cut at 1024 tokens (or just as long): 0" in report.text()
    assert "prompts cut" not in run_cascade(tiny, tmp_path / "o.jsonl").text()


def test_every_target_of_real_problems_has_the_right_number(shared_data, smollm2_dir, tmp_path):
    """Six word problems and the real model: rewrites and references alike."""
    model, chat = load(smollm2_dir)
    given = load_rows(shared_data / "gsm8k_train.json", limit=6)
    config = DistillConfig("gsm8k", "number", "unguided:2,guided:1,cooler:1", max_new_tokens="96")
    sampling = SamplerConfig(temperature=0.95, top_p=0.7, top_k=50, seed=0)
    generator = ChatGenerator(model, chat, sampling)
    lines = distill(generator, given, tmp_path / "d", config, settings={}).lines
    assert len(lines) == 6
    assert any(line.stage != "reference" for line in lines)
    for line in lines:
        assert last_number(line.target) == last_number(line.reference)
        assert (line.status in KEPT) == (line.stage != "reference")
    records = [json.loads(text) for text in (tmp_path / "d").read_text().splitlines()]
    assert [record["id"] for record in records] == [line.id for line in lines]
    fresh, _ = load(smollm2_dir)
    torch.testing.assert_close(model.weights["embed"], fresh.weights["embed"])

"""Distillation: the templates, the content of lines, and that kills at any moment lose nothing."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from engine.data.distilled import load_distilled
from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row
from engine.distill import writer as writer_module
from engine.distill.config import DistillConfig
from engine.distill.distill import distill
from engine.distill.distill_report import DistillReport
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.seed_likelihoods import score
from engine.runtime.stopping import Stopped
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig, SamplerStats
from model.chat import Chat
from model.llama import Llama
from model.tokenizer import load_tokenizer
from tests.helpers import programs
from tests.helpers.distillation import CONFIG, SAMPLING, load, rows, run_distillation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tiny_llama_dir):
    return tiny_llama_dir(tokenizer=True)


INSTRUCTION = (
    "Below are an instruction that describes a task along with a reference answer. Using the "
    "reference answer as a guide, write your own response."
)


def test_templates_have_the_wording_of_the_paper():
    """2402.13669, section 3, in the raw Alpaca form and in a model's own chat format."""

    class AlpacaChat:
        name = "alpaca"

    class OtherChat:
        name = "checkpoint"

    context = [{"role": "user", "content": "Add {2} and 3."}]
    body = "Add {2} and 3.\n\n### Reference Answer:\n5"
    assert prompt(AlpacaChat, TEMPLATES["using"], context, "5") == [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": body},
    ]
    raw = f"{INSTRUCTION}\n\n### Instruction:\n{body}\n\n### Response:\n"
    assert prompt(OtherChat, TEMPLATES["using"], context, "5") == [{"role": "user", "content": raw}]
    (refer,) = prompt(OtherChat, TEMPLATES["refer"], context, "5")
    assert "Refer to the reference answer and write your own response." in refer["content"]
    system, user = prompt(OtherChat, TEMPLATES["gsm8k"], context, "5")
    assert system["content"].startswith("You are an expert in math. Below are a math question")
    assert user["content"] == "Add {2} and 3.\n\n5"


def test_the_rendered_alpaca_prompt_is_the_text_of_the_paper(tiny):
    chat = Chat.from_dir(tiny, load_tokenizer(tiny), "alpaca")
    messages = prompt(chat, TEMPLATES["using"], [{"role": "user", "content": "Hi?"}], "Hello.")
    assert chat.render(messages, add_generation_prompt=True).endswith(
        f"{INSTRUCTION}\n\n### Instruction:\nHi?\n\n"
        "### Reference Answer:\nHello.\n\n### Response:\n"
    )


def test_lines_are_valid_and_in_the_order_of_the_data(tiny, tmp_path):
    report = run_distillation(tiny, tmp_path / "d.jsonl")
    lines = load_distilled(tmp_path / "d.jsonl")
    turn_ids = []
    for row in rows():
        turn_ids += [f"{row.id}/{number}" for number in range(len(row.turns))]
    assert [line.id for line in lines] == turn_ids
    assert [line.id for line in report.lines] == turn_ids
    assert sum(report.counts.values()) == len(turn_ids)
    by_id = {line.id: line for line in lines}
    for row in rows():
        for number, position in enumerate(row.turns):
            line = by_id[f"{row.id}/{number}"]
            assert line.reference == row.messages[position]["content"]
            answers = [m["content"] for m in line.messages if m["role"] == "assistant"]
            targets = [by_id[f"{row.id}/{earlier}"].target for earlier in range(number)]
            assert answers == targets, "earlier answers are replaced by their targets"


def test_the_forced_beginning_is_part_of_the_text_and_the_ids(tiny, tmp_path):
    _, chat = load(tiny)
    config = DistillConfig(template="gsm8k", max_new_tokens="9")
    for line in run_distillation(tiny, tmp_path / "d.jsonl", config=config).lines:
        assert line.response.startswith("Great! Let's think step by step.")
        assert chat.tokenizer.decode(line.response_ids).strip() == line.response


def test_auto_max_new_tokens_follows_the_reference():
    auto = DistillConfig()
    assert auto.limit(5) == 128
    assert auto.limit(400) == 64 + 3 * 400
    assert DistillConfig(max_new_tokens="40").limit(400) == 40
    for bad in ({"max_new_tokens": "-3"}, {"template": "x"}, {"verify": "y"}):
        with pytest.raises(ValueError):
            DistillConfig(**bad).check()


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from engine.distill import writer
from tests.helpers.distillation import run_distillation
decided_line = writer.decided_line
calls = []
def killed_line(*args):
    calls.append(1)
    if len(calls) == {kill}:
        if {torn}:
            with open({out!r}, "a") as file:
                file.write('{{"id": "r0')
        os.kill(os.getpid(), signal.SIGKILL)
    return decided_line(*args)
writer.decided_line = killed_line
run_distillation({model!r}, {out!r}, resume=os.path.exists({out!r}))
"""


@pytest.mark.parametrize("kills", [[1, 1], [2, 9, 3], [5, 6, 4, 2], [20, 3]], ids=str)
def test_killed_and_resumed_is_byte_identical(tiny, tmp_path, kills):
    """SIGKILL while the n-th line of each start is made, every other time with a torn line."""
    run_distillation(tiny, tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    paths = {"root": str(ROOT), "model": str(tiny), "out": str(out)}
    for number, kill in enumerate([*kills, 0]):  # 0: not killed
        script = KILLED.format(**paths, kill=kill, torn=number % 2)
        done = programs.run([sys.executable, "-c", script])
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-2000:]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


PROCESSES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from engine.distill import writer
from engine.distill.distill import distill
from engine.distill.seed_likelihoods import score
from engine.runtime.distributed import start
from engine.sampling.chat_generator import ChatGenerator
from tests.helpers.distillation import CONFIG, SAMPLING, load, rows
torch.set_num_threads(1)
world = start()
decided_line = writer.decided_line
calls = []
def killed_line(*args):
    calls.append(1)
    if world.rank == 1 and len(calls) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return decided_line(*args)
writer.decided_line = killed_line
model, chat = load({model!r})
out = Path({out!r})
report = distill(ChatGenerator(model, chat, SAMPLING), rows(), out, CONFIG,
    settings={{"sampling": "as above"}}, resume=True, world=world)
score(model, chat, report.lines, Path({out!r} + ".scores.jsonl"), {{}}, world)
"""


def test_two_processes_write_what_one_does_also_after_one_died(tiny, tmp_path):
    """torchrun, gloo; rank 1 is killed at its third line, the second job finishes the file."""
    model, chat = load(tiny)
    whole = run_distillation(tiny, tmp_path / "one.jsonl")
    score(model, chat, whole.lines, tmp_path / "one.jsonl.scores.jsonl", {})
    out = tmp_path / "two.jsonl"
    script = tmp_path / "job.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"root": str(ROOT), "model": str(tiny), "out": str(out)}
    for kill in (3, 0):  # 0: not killed
        script.write_text(PROCESSES.format(**paths, kill=kill))
        done = programs.run([*command, script], timeout=300)
        assert (done.returncode == 0) == (kill == 0), done.stderr[-2000:]
        parts = list(tmp_path.glob("two.jsonl.part*"))
        assert len(parts) == (2 if kill else 0)
        if kill:
            assert len((tmp_path / "two.jsonl.part1").read_text().splitlines()) == 2
    for ending in (".jsonl", ".jsonl.scores.jsonl"):
        one = tmp_path / f"one{ending}"
        two = tmp_path / f"two{ending}"
        assert one.read_bytes() == two.read_bytes()


@pytest.fixture
def ctrl_c_is_handled():
    """Ctrl-C has Python's handler, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_running_turns_and_a_resume_the_rest(
    tiny, tmp_path, monkeypatch, ctrl_c_is_handled, number
):
    handler = signal.getsignal(number)
    run_distillation(tiny, tmp_path / "whole.jsonl")
    out = tmp_path / "d.jsonl"
    decided_line = writer_module.decided_line
    written = []

    def line_after_signal(*args):
        if not written:
            signal.raise_signal(number)
        written.append(1)
        return decided_line(*args)

    monkeypatch.setattr(writer_module, "decided_line", line_after_signal)
    with pytest.raises(Stopped, match="3 of 24 turns are in") as stopped:
        run_distillation(tiny, out)
    assert stopped.value.code == 128 + number
    assert len(load_distilled(out)) == len(written) == SAMPLING.rows, "the running turns alone"
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    run_distillation(tiny, out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_signal_during_the_last_running_turns_stops_the_job(
    tiny, tmp_path, monkeypatch, ctrl_c_is_handled
):
    """All turns are running, so no turn is left; the caller must be stopped all the same, or it
    would go on to training."""
    everything = dataclasses.replace(SAMPLING, rows=64)
    decided_line = writer_module.decided_line

    def line_after_signal(*args):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(writer_module, "decided_line", decided_line)
        return decided_line(*args)

    monkeypatch.setattr(writer_module, "decided_line", line_after_signal)
    out = tmp_path / "d.jsonl"
    single = [row for row in rows() if len(row.turns) == 1]
    model, chat = load(tiny)
    with pytest.raises(Stopped, match=f"{len(single)} of {len(single)} turns are in"):
        distill(ChatGenerator(model, chat, everything), single, out, CONFIG, settings={})
    assert len(load_distilled(out)) == len(single)


def test_a_full_disk_keeps_the_finished_lines(tiny, tmp_path):
    run_distillation(tiny, tmp_path / "whole.jsonl")
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(OSError, match="finished lines are kept"):
            run_distillation(tiny, disk / "d.jsonl")
        kept = load_distilled(disk / "d.jsonl")
        assert 0 < len(kept) < 24
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        run_distillation(tiny, disk / "d.jsonl", resume=True)
        assert (disk / "d.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_vanishes_stops_the_run(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run" / "d.jsonl"
    decided_line = writer_module.decided_line
    written = []

    def line_after_renaming(*args):
        written.append(1)
        if len(written) == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return decided_line(*args)

    monkeypatch.setattr(writer_module, "decided_line", line_after_renaming)
    with pytest.raises(OSError, match="no longer there"):
        run_distillation(tiny, out)
    assert len(load_distilled(tmp_path / "elsewhere" / "d.jsonl")) == 4


def test_a_prompt_that_is_too_long_keeps_its_reference(tiny, tmp_path):
    model, chat = load(tiny)
    question = {"role": "user", "content": "x" * 600}
    long = Row("long", (question, {"role": "assistant", "content": "y"}))
    out = tmp_path / "d.jsonl"
    generator = ChatGenerator(model, chat, SAMPLING)
    report = distill(generator, [*rows(2), long], out, CONFIG, settings={})
    assert report.lines[-1].status == "prompt_too_long"
    assert report.lines[-1].target == "y"
    assert report.counts["prompt_too_long"] == 1


def test_the_number_of_running_sequences_does_not_change_the_file(tiny, tmp_path):
    run_distillation(tiny, tmp_path / "three.jsonl")
    for count in (1, 16):
        sampling = SamplerConfig(rows=count, temperature=1.0, top_k=60, seed=1)
        run_distillation(tiny, tmp_path / f"{count}.jsonl", sampling=sampling)
        three = (tmp_path / "three.jsonl").read_bytes()
        assert (tmp_path / f"{count}.jsonl").read_bytes() == three


def test_resume_is_refused_under_other_settings_naming_them(tiny, tmp_path):
    out = tmp_path / "d.jsonl"
    run_distillation(tiny, out, settings={"seed": 1, "template": {"name": "a"}})
    with pytest.raises(ValueError, match="exists already"):
        run_distillation(tiny, out)
    with pytest.raises(ValueError, match="template.name: 'a' -> 'b'"):
        run_distillation(tiny, out, resume=True, settings={"seed": 1, "template": {"name": "b"}})
    before = out.read_bytes()
    same_settings = {"seed": 1, "template": {"name": "a"}}
    report = run_distillation(tiny, out, resume=True, settings=same_settings)
    assert report.written == 0
    assert out.read_bytes() == before


def test_a_row_that_the_chat_template_refuses_is_named(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = Chat(template, tokenizer)
    model = Llama.from_pretrained(tiny)
    good = rows(2)
    system = {"role": "system", "content": "Be brief."}
    bad = [*good, Row("bad", (system, *good[0].messages))]
    with pytest.raises(ValueError, match="bad/0.*no system"):
        encode(bad, chat, EncodeRules(max_length=400))
    generator = ChatGenerator(model, chat, SAMPLING)
    with pytest.raises(ValueError, match="row bad/0.*no system"):
        distill(generator, bad, tmp_path / "d.jsonl", CONFIG, settings={})


def test_the_report_warns_where_targets_hardly_differ(tiny, tmp_path):
    report = run_distillation(tiny, tmp_path / "d.jsonl")
    same = [dataclasses.replace(line, target=line.reference) for line in report.lines]
    text = DistillReport(same, SamplerStats(), seconds=1.0, written=0).text()
    assert "differ from the reference: 0.0%" in text
    assert "nearly be the same run" in text


def test_scores_are_the_nll_under_the_plain_prompt_and_are_resumed(tiny, tmp_path):
    model, chat = load(tiny)
    report = run_distillation(tiny, tmp_path / "d.jsonl")
    out = tmp_path / "d.jsonl.scores.jsonl"
    sums = score(model, chat, report.lines, out, {})
    whole = out.read_bytes()
    total = 0.0  # nats
    tokens = 0
    for line, text in zip(report.lines, out.read_text().splitlines(), strict=True):
        record = json.loads(text)
        answer = [*chat.response_ids(line.reference), chat.end_id]
        ids = torch.tensor([*chat.prompt_ids(line.messages), *answer])
        logits = model.logits(ids)[-len(answer) - 1 : -1]  # (A, V)
        nats = cross_entropy(logits, ids[-len(answer) :], reduction="sum").item()
        assert record["reference_nll"] == pytest.approx(nats / len(answer), rel=1e-5)
        total += nats
        tokens += len(answer)
    assert sums.reference / sums.reference_tokens == pytest.approx(total / tokens, rel=1e-5)
    out.write_bytes(whole[: len(whole) // 2])  # a kill leaves a torn line
    again = score(model, chat, report.lines, out, {})
    assert out.read_bytes() == whole
    assert again == sums

"""A session on a card: the parts and their budget, processes, the checkpoint, what is measured."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import _common, graph_clock, kernel_forms, worth
from benchmarks import kernels as kernels_benchmark
from benchmarks.card import __main__ as session
from benchmarks.card import checkpoint, jobs, measure, product
from benchmarks.card.gpu_tests import FILES
from benchmarks.card.parts import PARTS, Part, Setting, budget_of, chosen, seconds_for
from benchmarks.operations import CALLS
from benchmarks.work import WORK
from engine.sampling.cuda_graphs import why_not_captured
from kernels.launch import triton_launch
from kernels.registry import SPECS, TORCH, TRITON

ROOT = Path(__file__).resolve().parents[2]


# ---- parts and their budget


def test_a_budget_cuts_from_the_end():
    tests, product_part = PARTS["tests"], PARTS["product"]
    assert seconds_for(product_part, None) == product_part.limit
    assert seconds_for(product_part, product_part.limit + 1) == product_part.limit
    assert seconds_for(product_part, 100.7) == 100, "what is left, where it is worth a start"
    assert seconds_for(product_part, product_part.least - 1) is None
    assert seconds_for(tests, tests.limit - 1) is None, "half of the tests say nothing"
    assert seconds_for(tests, tests.limit) == tests.limit
    assert seconds_for(product_part, None, dry=True) == product_part.dry_limit


def test_budgets_that_are_none():
    assert budget_of("") is None and budget_of("90") == 90
    for text in ("0", "-3", "soon", "nan", "inf"):
        with pytest.raises(ValueError, match=f"BUDGET={text}: expected seconds above 0"):
            budget_of(text)


def test_parts_run_in_the_order_of_their_worth():
    everything = ["product", "measure", "tests", "decode", "kernels", "tune"]
    assert [part.name for part in chosen([])] == everything == list(PARTS)
    assert [part.name for part in chosen(["tune", "measure"])] == ["measure", "tune"]
    with pytest.raises(ValueError, match="unknown part step, foo; expected parts among product"):
        chosen(["measure", "step", "foo"])


def gpu_sh(*arguments, **environment):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), *arguments]
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


def test_the_script_names_unknown_parts_and_skips_what_no_budget_allows(tmp_path):
    wrong = gpu_sh("--dry", "kernel")
    assert wrong.returncode == 2 and "unknown part kernel" in wrong.stderr
    wrong = gpu_sh("--dry", BUDGET="much")
    assert wrong.returncode == 2 and "BUDGET=much" in wrong.stderr
    short = gpu_sh("--dry", BUDGET="2", OUT=str(tmp_path), WORK=str(tmp_path / "work"))
    assert short.returncode == 0, short.stderr
    assert len(re.findall(r"^\w+ +0  skipped: 2 s of BUDGET=2", short.stdout, re.M)) == len(PARTS)


def python_part(name, code, **limits):
    fields = {"limit": 20, "dry_limit": 20, "least": 1} | limits
    command = [sys.executable, "-c", code]
    return Part(name=name, command=lambda setting, seconds: command, about="", **fields)


@pytest.fixture
def setting(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    return Setting(sys.executable, out, work, dry=True)


def test_a_part_that_fails_or_hangs_leaves_the_others_and_its_figures(setting, capsys, monkeypatch):
    monkeypatch.setattr(session, "KILL_AFTER", 1)
    figure = "open(__import__('os').environ['OUT'] + '/figures.jsonl', 'a').write('{}\\n')"
    listed = [
        python_part("bad", "print('no'); raise SystemExit(3)"),
        python_part("hangs", f"{figure}; import time; time.sleep(60)", dry_limit=1),
        python_part("good", "print('x' * 500)"),
    ]
    outcomes = session.run_parts(listed, None, setting)
    assert [o.failed for o in outcomes] == [True, True, False]
    assert "FAILED (3)" in outcomes[0].text and "ran past 1 s" in outcomes[1].text
    assert (setting.out / "figures.jsonl").read_text() == "{}\n"
    assert "x" * 500 in (setting.out / "gpu.log").read_text()
    assert "x" * 401 not in capsys.readouterr().out


def test_what_a_budget_leaves_goes_to_the_last_part(setting, monkeypatch):
    given = []

    def run_part(part, seconds, setting):
        given.append((part.name, seconds))
        clock[0] += min(seconds, 30)
        return session.Outcome(part.name, 30.0, "ok")

    clock = [0.0]
    monkeypatch.setattr(session, "run_part", run_part)
    monkeypatch.setattr(session.time, "monotonic", lambda: clock[0])
    listed = [python_part(name, "", dry_limit=50, limit=50, least=10) for name in "abcd"]
    outcomes = session.run_parts(listed, 75.0, setting)
    assert given == [("a", 50), ("b", 45), ("c", 15)]
    assert [o.name for o in outcomes if o.text.startswith("skipped: 0 s of BUDGET=75")] == ["d"]


def test_tests_without_a_gpu_are_no_failure_in_a_rehearsal_only():
    tests = PARTS["tests"]
    assert not session.outcome(tests, 5, 1.0, 60, dry=True).failed
    assert session.outcome(tests, 5, 1.0, 60, dry=False).failed
    assert all((ROOT / file).exists() for file in FILES)


def test_tiles_come_back_in_one_file(setting):
    session.pack_tiles(setting)
    assert not list(setting.out.iterdir())
    tiles = setting.work / "tiles"
    tiles.mkdir()
    (tiles / "rope.json").write_text("{}")
    session.pack_tiles(setting)
    listed = subprocess.run(
        ["tar", "tf", setting.out / "tiles.tar"], capture_output=True, text=True
    )
    assert "tiles/rope.json" in listed.stdout


def test_every_command_of_a_part_is_a_module_of_ours(setting):
    for part in PARTS.values():
        command = part.command(setting, 100)
        name = command[command.index("-m") + 1]
        assert (ROOT / (name.replace(".", "/") + ".py")).exists()
        assert command[-1] == "--dry" or "--kernel" in command
        assert "--dry" not in part.command(dataclasses.replace(setting, dry=False), 100)


# ---- processes of a product run


def test_a_job_is_watched_and_killed_on_purpose(tmp_path):
    file, log = tmp_path / "lines", tmp_path / "logs" / "a.log"
    code = f"import time; open({str(file)!r}, 'w').write('a\\n'); print('hi', flush=True)"
    done = jobs.run_job("a", [sys.executable, "-c", code], log, 20, watch=file)
    assert done.code == 0 and not done.failed and log.read_text() == "hi\n"
    hang = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    killed = jobs.run_job("b", hang, log, 20, kill_when=file)
    assert killed.killed and not killed.failed and killed.code == -signal.SIGKILL
    late = jobs.run_job("c", hang, log, 0.3, watch=file)
    assert late.failed and not late.killed and late.first_s is not None
    assert time.monotonic() - started < 15


LOG = """ops: checking the kernels on NVIDIA H100 (once per card, version and widths)
ops: checked in 12.5 s; remembered in /x
model: m, 134.5 M parameters, torch.bfloat16 on cuda, loaded in 1.5 s
distill: 10%\rdistill: 100%
memory was short: 3 sequences were preempted and begun again; 8 of 9 decode steps replayed, of 2 \
graphs captured in 0.1 s
recompute none: predicted peak 1.25 GB (held 0.50)
"""


def test_what_a_log_says():
    facts = jobs.facts_of_log(LOG)
    assert (facts["check_s"], facts["load_s"]) == (12.5, 1.5)
    assert facts["plan"] == [{"policy": "none", "gb": 1.25}]
    assert len(facts["said"]) == 2 and "3 sequences were preempted" in facts["said"][0]


# ---- the checkpoint


@pytest.fixture
def folders(tmp_path, monkeypatch):
    prepared, model = tmp_path / ".gpu", tmp_path / "models" / "demo"
    prepared.mkdir()
    model.parent.mkdir()
    monkeypatch.setattr(checkpoint, "PREPARED", prepared)
    monkeypatch.setattr(checkpoint, "MODEL", model)
    return prepared, model


def test_the_halves_are_joined_from_two_calls(folders, tmp_path):
    prepared, model = folders
    source = tmp_path / "m.gguf"
    source.write_bytes(bytes(range(251)))
    digest = checkpoint.split_file(source, prepared)
    (prepared / "manifest.json").write_text(json.dumps({"sha256": digest}))
    assert abs((prepared / "part0").stat().st_size - 251 / 2) <= 1
    (prepared / "part0").rename(model.parent / "part0")  # an earlier call brought it
    joined = checkpoint.join_halves(tmp_path / "joined")
    assert joined.read_bytes() == source.read_bytes()
    (prepared / "part1").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the joined model has the hash"):
        checkpoint.join_halves(tmp_path / "joined")
    (prepared / "part1").unlink()
    with pytest.raises(ValueError, match="part1 of the model is neither in"):
        checkpoint.join_halves(tmp_path / "joined")


def test_the_job_is_the_quickstarts_on_word_problems():
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    _, word_problems = script.split("--word-problems)\n")
    word_problems, common = word_problems.split("\n    ;;\n", 1)
    flags = shlex.split(re.search(r"SDFT_FLAGS=\((.*?)\)", word_problems, re.S)[1])
    assert "--verify number" in common
    job = list(product.JOB)
    at = job.index("--verify")
    assert job[at : at + 2] == ["--verify", "number"]
    del job[at : at + 2]
    assert job == flags
    counts = tuple(int(n) for n in re.findall(r"^ *\w+_ROWS=(\d+)$", word_problems, re.M))
    assert counts == product.ROWS[False]


# ---- the product run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return product.Product(tmp_path, seconds=100.0, dry=True)


def test_sub_parts_that_fail_or_have_no_time_are_faults(run, monkeypatch, capsys):
    def fails(run):
        raise RuntimeError("no card")

    late = ("late", 1000, fails)
    works = ("works", 1, lambda run: run.note("works", value=1))
    monkeypatch.setattr(product, "SUB_PARTS", (("fails", 1, fails), late, works))
    product.run_all(run)
    assert [line["what"] for line in run.results] == ["fails", "left out", "works"]
    assert len(run.faults) == 2 and "no card" in run.faults[0] and "late" in run.faults[1]
    figures = (run.work / "out" / "figures.jsonl").read_text().splitlines()
    assert [json.loads(line)["what"] for line in figures] == ["fails", "left out", "works"]
    assert "NOT GOOD: fails: RuntimeError: no card" in capsys.readouterr().out


def training_run(folder, adapter=b"weights", loss=1.0, speed=10.0):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(adapter)
    line = {"step": 1, "loss": loss, "tokens_s": speed}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_same_training_means_bytes_and_losses(tmp_path):
    one = training_run(tmp_path / "one")
    assert product.same_training(one, training_run(tmp_path / "same", speed=99.0))
    assert not product.same_training(one, training_run(tmp_path / "bytes", adapter=b"weightz"))
    assert not product.same_training(one, training_run(tmp_path / "loss", loss=1.1))
    assert not product.same_training(one, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("share", "good", "faults"), [(1.0, True, 0), (0.96, True, 0), (0.9, True, 1), (0.96, False, 1)]
)
def test_fp32_texts_must_be_nearly_equal_and_the_rest_ties(run, share, good, faults):
    found = {"texts": {"rewrites": {"share_equal": share}}, "good": good}
    product.judge(run, "compare", found, strict=True)
    assert len(run.faults) == faults
    product.judge(run, "compare", found | {"good": False}, strict=False)
    assert len(run.faults) == faults, "nothing is asked of bf16"


# ---- what is measured


def test_the_plan_has_every_combination_once():
    measurements = measure.plan(measure.ON_A_CARD)
    assert len(set(measurements)) == len(measurements)
    steps = [m.case for m in measurements if m.kind == "train" and m.model == "llama-2-7b"]
    for shape in ((2304, 288), (8192, 2048)):
        for modules in ("qv", "all"):
            for dropout in (0.0, 0.1):
                for micro in (0, 1024):
                    case = measure.StepCase(*shape, 8, modules, dropout, micro)
                    assert case in steps
    assert {case.policy for case in steps} == {"none", "selective", "full"}
    decodings = [m.case for m in measurements if m.kind == "decode"]
    for rows in (64, 128, 256):
        for setting in ("greedy", "paper"):
            for adapter in ("", "all"):
                case = measure.DecodeCase(rows, 150, 140, 2 * rows, setting, adapter=adapter)
                assert case in decodings
    assert 0 in {case.rows for case in decodings}, "as the sampler chooses"
    small = [m for m in measurements if m.model == "smollm2-135m"]
    assert {m.ops for m in small} == {"triton", "torch"}
    first = measurements[0].case
    assert (first.tokens, first.modules, first.dropout) == (2304, "all", 0.1), "SDFT's own step"
    assert measurements[-1].kind == "peer"


def test_a_rehearsal_interprets_one_measurement_of_each_kind():
    rehearsed = measure.for_rehearsal(measure.plan(measure.TINY))
    kinds = [m.kind for m in rehearsed if m.ops == "triton"]
    assert sorted(kinds) == ["decode", "train"] and len(rehearsed) > 15


@pytest.fixture
def few_measurements(monkeypatch, tmp_path):
    """Two measurements, a third that fails, on torch's forms; the machine is not measured."""
    sizes = measure.TINY
    step = measure.Measurement("train", "tiny", measure.StepCase(16, 8), "torch")
    decoding = measure.Measurement("decode", "tiny", measure.DecodeCase(1, 4, 2), "torch")
    bad = dataclasses.replace(step, ops="nothing")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(measure, "plan", lambda _: [bad, step, decoding])
    monkeypatch.setattr(measure, "for_rehearsal", lambda measurements: measurements)
    monkeypatch.setattr(measure, "ceilings", lambda *_: {"flops": 1e12, "bytes": 1e11})
    return tmp_path, sizes


def test_measurements_are_figures_at_once_and_one_record(few_measurements, capsys):
    out, _ = few_measurements
    with pytest.raises(SystemExit) as ended:
        measure.main(["--dry", "--seconds", "60"])
    assert ended.value.code == 1, "one of them failed"
    lines = [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["ceilings", "train", "train", "decode"]
    assert lines[0]["sustained_flops"] > 0 and "nothing" in lines[1]["failed"]
    assert 0 < lines[2]["mfu_burst"] and lines[2]["tokens_s"] > 0
    assert lines[3]["useful_tokens_s"] > 0 and lines[3]["captured"] == 0
    record = json.loads((out / "measure.jsonl").read_text())
    assert record["benchmark"] == "measure" and record["left_out"] == []
    assert [r["what"] for r in record["results"]] == [line["what"] for line in lines]
    assert {"commit", "device", "date"} <= record["environment"].keys()


def test_what_no_time_is_left_for_is_named(few_measurements, capsys):
    out, _ = few_measurements
    measure.main(["--dry", "--only", "train", "--seconds", "8"])
    record = json.loads((out / "measure.jsonl").read_text())
    assert [line["what"] for line in record["left_out"]] == ["train", "train"]
    assert "1 results, 2 left out, 0 failed" in capsys.readouterr().out


# ---- kernels by worth, and with graphs


def test_every_call_worth_timing_is_known_and_fits_its_operation():
    timed = worth.by_worth()
    assert len(timed) == len(set(timed)) > 60
    operations = [operation for operation, _, _ in timed[: len(worth.GROUPS)]]
    assert set(operations) >= {"lora_linear", "cached_attention", "sample", "attention"}
    assert timed[0][1] == "backward, dropout", "what a step with dropout runs, never timed before"
    for operation, call, shape in timed:
        assert (operation, call) in CALLS
        flops, size = WORK[operation, call](*shape, e=2)
        assert flops + size > 0
    for operation, shape in {(operation, shape) for operation, _, shape in timed}:
        table = _common.tables(SPECS[operation])[-1]  # of `linear` the only one with a kernel
        launches = _common.record(SPECS[operation], table, shape, torch.bfloat16, "sm_90")
        assert launches, f"{operation} {shape} launches no kernel of ours"


def test_kernels_by_worth_stop_when_the_seconds_are_over(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(kernels_benchmark, "ceilings", lambda *_: {"flops": 1e12, "bytes": 1e11})
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: "no card here")
    asked = ["--worth", "--graph", "--dry", "--device", "cpu", "--dtype", "fp32"]
    kernels_benchmark.main([*asked, "--kernel", "lora_linear"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (torch_form,) = document["results"]
    assert torch_form["form"] == "torch", "a mask of their own is no part of the forms by hand"
    assert torch_form["call"] == "backward, dropout" and torch_form["host_ms"] > 0
    assert len((tmp_path / "figures.jsonl").read_text().splitlines()) == 1
    kernels_benchmark.main([*asked, "--seconds", "0.001"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    operations = {operation for operation, _, _ in worth.by_worth()}
    assert document["left_out"] == len(operations) - 1, "the first is always timed"
    kernels_benchmark.main([*asked, "--kernel", "swiglu"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_form = {r["form"]: r for r in document["results"]}
    assert by_form.keys() == {"eager", "torch"}
    assert "host_ms" in by_form["torch"] and "host_ms" not in by_form["eager"]
    with pytest.raises(SystemExit):
        kernels_benchmark.parse_args(["--worth", "--rows", "8"])
    assert "--worth has its own shapes" in capsys.readouterr().err


def test_rotating_inputs_are_more_than_the_cache_holds():
    assert graph_clock.inputs_needed(100 << 20, 50 << 20) == 2
    assert graph_clock.inputs_needed(30 << 20, 50 << 20) == 4
    assert graph_clock.inputs_needed(1000, 50 << 20) == graph_clock.MOST_INPUTS


def test_after_a_failed_capture_none_is_tried(monkeypatch):
    clock = graph_clock.GraphClock("cpu")
    calls = []
    assert clock.measure([lambda: calls.append(1)] * 3)["host_ms"] > 0
    assert len(calls) == 6, "once to compile, once timed"
    clock.gpu = True
    monkeypatch.setattr(clock, "_wait", lambda: None)
    monkeypatch.setattr(graph_clock.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "_replayed", lambda calls: 1 / 0)
    assert "division by zero" in clock.measure([lambda: None] * 2)["not_captured"]
    monkeypatch.setattr(clock, "_replayed", lambda calls: 1.0)
    assert "division by zero" in clock.measure([lambda: None] * 2)["not_captured"]


def test_only_what_reads_nothing_on_the_host_is_captured():
    """A capture that fails ends all further ones, so torch's paged attention is never tried."""
    on_host = why_not_captured(TORCH)
    for operation in kernel_forms.CAPTURED_IN_TORCH:
        assert kernel_forms.is_capturable(operation, TORCH)
        assert not set(SPECS[operation].fields) & set(re.findall(r"\w+", on_host))
    assert not kernel_forms.is_capturable("cached_attention", TORCH)
    assert kernel_forms.is_capturable("cached_attention", TRITON)
    assert not kernel_forms.is_capturable("swiglu", dataclasses.replace(TORCH, name="eager"))

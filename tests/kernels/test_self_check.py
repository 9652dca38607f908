"""Checks in a process of their own: compiled in parallel, and no kernel harms the run."""

import dataclasses
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from kernels import select_ops
from kernels.cpu import native
from kernels.launch import compile_ahead
from kernels.launch.compile_ahead import Compilers, Workers
from kernels.registry import REFERENCE, SPECS, TORCH
from kernels.self_check import process, program
from kernels.self_check.cases import cases, why_failing
from kernels.self_check.process import NoProcess, Result, Running, check_in_process
from kernels.self_check.request import request_for
from tests.conftest import ROOT

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    native.why_unavailable()  # compiles, if need be, into the cache of this machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdft-engine"


# ---- forms of an operation: right, wrong, raising, and three ways to end the process


def right_swiglu(gate_up):
    return TORCH.swiglu_forward(gate_up)


def wrong_swiglu(gate_up):
    return TORCH.swiglu_forward(gate_up) * 1.01


def raising_swiglu(gate_up):
    raise RuntimeError("no room for 300 KiB of shared memory\nand a long trace")


def full_swiglu(gate_up):
    raise torch.OutOfMemoryError("3 GiB are taken by another process")


def crashing_swiglu(gate_up):
    os.kill(os.getpid(), signal.SIGSEGV)


def killed_swiglu(gate_up):
    os.kill(os.getpid(), signal.SIGKILL)


def right_rope(*args, **kwargs):
    return TORCH.rope_(*args, **kwargs)


def crashing_rope(*args, **kwargs):
    os.abort()


def wrong_rope(*args, **kwargs):
    qkv = TORCH.rope_(*args, **kwargs)
    args[0].mul_(1.01)
    return qkv


def wrong_norm(*args):
    return TORCH.grad_norm(*args) * 1.01


def right_norm(*args):
    return TORCH.grad_norm(*args)


FORMS = {
    "swiglu_forward": [right_swiglu, wrong_swiglu, raising_swiglu, full_swiglu, crashing_swiglu],
    "rope_": [right_rope, wrong_rope, crashing_rope],
    "grad_norm": [right_norm, wrong_norm],
}
CRASHING = {crashing_swiglu: "SIGSEGV", crashing_rope: "SIGABRT"}
OPERATION = {"swiglu_forward": "swiglu", "rope_": "rope", "grad_norm": "adamw"}


def table(**functions):
    return dataclasses.replace(TORCH, name="triton", **functions)


def forked(request):
    """As `process.start`, but a fork of this process: quick, and fake devices stay."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()  # pytest's would print the test's stack
            torch.set_num_threads(1)  # a fork lacks OpenMP's threads and would wait for them
            os.close(ours)
            with open(theirs, "w", encoding="utf-8") as lines:
                program.serve(request, lines)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    ends = []

    def ended():
        if not ends:
            ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit code {ends[0]}: "

    lines = open(ours, "rb")

    def kill():
        if not ends:
            os.kill(pid, signal.SIGKILL)
            ended()
        lines.close()

    return Running(lines, ended, kill)


def checked(ops, operations, start=forked):
    said = []
    found = check_in_process(request_for(ops, operations, CPU, BF16, None), said.append, start)
    return list(found), said


def expected(field, form):
    """What this process finds for a form that does not end it."""
    name = OPERATION[field]
    if form in CRASHING:
        return f"its check ended with {CRASHING[form]}"
    spec = SPECS[name]
    return why_failing(spec, table(**{field: form}), REFERENCE, CPU, cases(spec, BF16, None)) or ""


def test_any_table_gets_the_verdicts_of_its_operations_one_by_one():
    """Random tables, in random order, some of whose kernels end the process: each loses its own."""
    alone = {(f, form): expected(f, form) for f, forms in FORMS.items() for form in forms}
    assert {reason == "" for reason in alone.values()} == {True, False}
    rng = random.Random(19)
    for _ in range(8):
        chosen = {field: rng.choice(forms) for field, forms in FORMS.items()}
        operations = [OPERATION[field] for field in chosen]
        rng.shuffle(operations)
        found, _ = checked(table(**chosen), operations)
        assert [result.operation for result in found] == operations
        by_operation = {result.operation: result.reason for result in found}
        for field, form in chosen.items():
            assert by_operation[OPERATION[field]] == alone[field, form], (chosen, operations)


def test_a_real_process_survives_a_kernel_that_crashes():
    """The whole way of a GPU: another program, its own session, the results on disk."""
    ops = table(swiglu_forward=crashing_swiglu, rope_=right_rope)
    found, said = checked(ops, ["rope", "swiglu"], start=process.start)
    assert found == [Result("rope", ""), Result("swiglu", "its check ended with SIGSEGV")]
    assert "checking swiglu, 1 of 2 operations are checked" in said


@pytest.mark.parametrize(
    ("form", "reason", "lasting"),
    [
        (right_swiglu, "", True),
        (crashing_swiglu, "its check ended with SIGSEGV", True),
        # the system ended it, for memory: another time it may pass
        (killed_swiglu, "its check ended with SIGKILL", False),
        (full_swiglu, "OutOfMemoryError: 3 GiB are taken by another process", False),
    ],
)
def test_only_what_would_fail_again_is_remembered(monkeypatch, cache, form, reason, lasting):
    monkeypatch.setattr(select_ops, "check_in_process", through(forked))
    wanted = select_ops.Checked(table(swiglu_forward=form), CPU, BF16, None)
    monkeypatch.setattr(select_ops.Checked, "here", lambda self, names: self.apart(names, print))
    assert select_ops.results_of(wanted, ["swiglu"], [].append) == {"swiglu": reason}
    assert bool(list(cache.glob("check-swiglu-*"))) == lasting


def through(start):
    def check(request, progress):
        return check_in_process(request, progress, start)

    return check


def test_a_device_that_a_check_broke_is_left_to_another_process(monkeypatch):
    """The first check raises and its process can use the device no more; the others are checked."""
    broken = []

    def breaking(*args):
        broken.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    started = []

    def start(request):
        started.append(list(request.operations))
        return forked(request)

    monkeypatch.setattr(program, "why_unusable", lambda _: "it hangs" if broken else None)
    monkeypatch.setattr(sys.modules[__name__], "raising_swiglu", breaking)
    breaking.__name__ = "raising_swiglu"
    ops = table(swiglu_forward=breaking, rope_=right_rope)
    found, _ = checked(ops, ["swiglu", "rope"], start)
    reason = "RuntimeError: an illegal memory access was encountered"
    assert found == [Result("swiglu", reason), Result("rope", "")]
    assert started == [["swiglu", "rope"], ["rope"]]


def test_without_a_process_the_checks_run_here(monkeypatch, cache):
    """A GPU that one process alone may use; a function that cannot be imported; no fork."""

    def local_rope(*args, **kwargs):
        return right_rope(*args, **kwargs)

    said = []
    ops = table(swiglu_forward=wrong_swiglu, rope_=right_rope)
    wanted = select_ops.Checked(ops, CPU, BF16, None)
    monkeypatch.setattr(program, "why_unusable", lambda device: "CUDA error: device is busy")
    monkeypatch.setattr(select_ops, "check_in_process", through(forked))
    for _ in range(2):
        found = {name: why for name, why, _ in wanted.apart(["rope", "swiglu"], said.append)}
        assert found["rope"] == "" and "over the bound" in found["swiglu"]
        monkeypatch.undo()
        wanted = dataclasses.replace(
            wanted, candidate=table(rope_=local_rope, swiglu_forward=wrong_swiglu)
        )
    assert "CUDA error: device is busy" in said[0] and "cannot be imported" in said[1]

    def no_process(request):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(select_ops, "check_in_process", through(no_process))
    wanted = select_ops.Checked(ops, CPU, BF16, None)
    assert [why == "" for _, why, _ in wanted.apart(["rope", "swiglu"], said.append)] == [
        True,
        False,
    ]


def test_a_process_that_fails_before_a_check_blames_no_operation():
    with pytest.raises(NoProcess, match="exit code 1"):
        checked(table(rope_=right_rope), ["rope"], lambda request: forked(None))


def test_a_check_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 0.5)
    monkeypatch.setattr(program, "why_failing", lambda *_: time.sleep(60))
    found, _ = checked(table(rope_=right_rope), ["rope"])
    assert found == [Result("rope", "its check did not end within 0.5 s")]


def test_one_of_several_processes_checks_and_the_others_find_its_results(monkeypatch, cache):
    """As the ranks of torchrun on a node, which start together."""
    count = cache.parent / "checked"

    def start_run():
        pid = os.fork()
        if pid:
            return pid
        try:
            torch.set_num_threads(1)  # as in `forked`
            ops = table(swiglu_forward=wrong_swiglu, rope_=right_rope)
            real = select_ops.why_failing

            def counted(spec, *rest):
                with open(count, "a") as file:
                    file.write(spec.name + "\n")
                time.sleep(0.2)
                return real(spec, *rest)

            select_ops.why_failing = counted
            _, reasons = select_ops.with_fallback(ops, TORCH, CPU, BF16, None, [].append)
            os._exit(0 if list(reasons) == ["swiglu"] else 3)
        finally:
            os._exit(1)

    pids = [start_run() for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    assert sorted(count.read_text().split()) == ["rope", "swiglu"], "each once, by one of them"


def test_a_killed_check_loses_no_result_and_holds_no_lock(monkeypatch, cache):
    """What was found is on disk at once; the lock goes with the process."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # as in `forked`
        select_ops.why_failing = lambda spec, *_: spec.name == "swiglu" and time.sleep(60) or None
        ops = table(swiglu_forward=right_swiglu, rope_=right_rope)
        select_ops.with_fallback(ops, TORCH, CPU, BF16, None, [].append)
        os._exit(1)
    limit = time.monotonic() + 30
    while not list(cache.glob("check-rope-*")) and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    seen = []
    monkeypatch.setattr(select_ops, "why_failing", lambda spec, *_: seen.append(spec.name))
    ops = table(swiglu_forward=right_swiglu, rope_=right_rope)
    select_ops.with_fallback(ops, TORCH, CPU, BF16, None, [].append)
    assert seen == ["swiglu"]


# ---- compiling ahead, for a card that is not here

SCRIPT = """
import json, os, sys, torch, triton
from pathlib import Path
from kernels.launch import triton_launch, tile_config
from kernels.launch.compile_ahead import Compilers, Target, compiling_for
from kernels.registry import SPECS, TRITON
from kernels.self_check.cases import cases
from kernels.self_check.program import launches_of, recorded
from kernels.spec import Widths, cast

target = Target("sm_90", 132, "cuda", 90, 32)
at = {"rope": cases(SPECS["rope"], torch.bfloat16, None)[:1]}
launches, wanted = launches_of(TRITON, at, target)

# the check's own launches, on tensors with values: triton derives its own keys
def launch(kernel, grid, args, options):
    kernel.warmup(*args, grid=grid, **options)

def forget():  # as in a process that has launched nothing yet
    for one in launches:
        one.kernel.device_caches.clear()

found = {}
for processes in (1, 3):
    folder = Path(sys.argv[1]) / str(processes)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    counts = []
    forget()
    compilers = Compilers(launches, target, processes)
    compilers.wait_for(wanted["rope"], counts.append)
    compilers.close()
    ahead = {path.name for path in folder.iterdir()}
    forget()
    with (compiling_for(target), tile_config.pretending("sm_90", 132),
          triton_launch.recording_launches(launch)):
        for shape, dtype in at["rope"]:
            inputs = SPECS["rope"].make_inputs(shape, torch.Generator().manual_seed(0))
            SPECS["rope"].run(TRITON, cast(inputs, dtype))
    late = {path.name for path in folder.iterdir()} - ahead
    cubins = {str(file.relative_to(folder)): file.stat().st_size
              for file in folder.rglob("*.cubin")}
    found[processes] = {"counts": counts, "ahead": sorted(ahead), "late": sorted(late),
                        "cubins": cubins}

# every kernel of every operation: the key that triton looks it up by, of the launch that was
# recorded and of the check's own; nothing is compiled
keys = set()

def note(*, key, fn, **_):
    keys.add((fn.name, key))
    return True

triton.knobs.runtime.jit_cache_hook = note
different, count = [], 0
for name, spec in SPECS.items():
    at = cases(spec, torch.bfloat16, Widths(D=256, F=384, H=4, G=2, d=64, V=512))
    forget()
    with compiling_for(target):
        for one in recorded(TRITON, name, at, target):
            launch(one.kernel, one.grid, one.args, one.options)
        of_recorded, keys = keys, set()
        with (tile_config.pretending("sm_90", 132),
              triton_launch.recording_launches(lambda k, g, a, o: 0 in g or launch(k, g, a, o))):
            for shape, dtype in at:
                inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
                spec.run(TRITON, cast(inputs, dtype))
    count += len(keys)
    if keys != of_recorded:
        different.append(name)
    keys = set()
print(json.dumps([found, different, count]))
"""


def test_launches_find_what_other_processes_compiled(tmp_path):
    """Nothing is compiled a second time, and one process or three make the same kernels."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, different, count = json.loads(done.stdout.splitlines()[-1])
    assert different == [] and count > 100
    one, three = found.values()
    assert len(one["cubins"]) == len(one["counts"]) >= 2
    assert one["ahead"] and one["late"] == []
    assert three == one


def test_a_compiler_that_dies_loses_its_kernel_only(tmp_path):
    """The others go on; the end is noticed where one is missing."""

    def work(index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 4:
            raise RuntimeError("a kernel that does not compile")
        (tmp_path / str(index)).write_text(str(os.getpid()))

    workers = Workers(work, 9, 3)
    done = [workers.next_done() for _ in range(8)]
    assert workers.next_done() is None
    workers.close()
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == list("012567") + [
        "8"
    ]


def test_compilers_change_no_verdict(monkeypatch):
    """Whatever they do: those that fail, die, or are late leave the check as it is."""
    ops = table(swiglu_forward=wrong_swiglu, rope_=right_rope)
    alone, _ = checked(ops, ["rope", "swiglu"])
    rng = random.Random(5)

    def compile_launch(launch):
        deed = rng.choice(["pass", "fail", "die"])
        if deed == "fail":
            raise RuntimeError("no")
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(compile_ahead, "compile_launch", compile_launch)
    monkeypatch.setattr(Compilers, "_prepare", lambda self: rng.seed(os.getpid()))
    monkeypatch.setattr(
        program, "launches_of", lambda ops, at, target: (list(range(6)), halves(at))
    )

    def halves(at):
        return {name: set(range(3 * i, 3 * i + 3)) for i, name in enumerate(at)}

    for processes in (1, 2, 5):
        request = request_for(ops, ["rope", "swiglu"], CPU, BF16, None)
        target = ["sm_90", 132, "cuda", 90, 32]
        request = dataclasses.replace(request, target=target, processes=processes)
        assert list(check_in_process(request, [].append, forked)) == alone

"""Ahead-of-time compilation and tuning: what is recorded, what is derived, what is refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks._common import jitted, record, tables  # noqa: E402
from benchmarks.clock import Clock  # noqa: E402
from benchmarks.tuning import candidates, exploring, measuring, searches, tune, turns  # noqa: E402
from benchmarks.tuning import compile as aot  # noqa: E402
from benchmarks.tuning.ahead import Target, Workers  # noqa: E402
from kernels.launch import tile_config, triton_launch  # noqa: E402
from kernels.launch.compile_ahead import Launch, Pointer, recording  # noqa: E402
from kernels.registry import SPECS, TORCH, TRITON  # noqa: E402
from tests.conftest import ROOT  # noqa: E402


def run(module, *args, **env):
    """(exit code, last line as JSON, stderr) of a benchmark in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    last = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return done.returncode, last, done.stderr


# ---- recording


def test_every_kernel_is_recorded_and_every_helper_called():
    ran = set()
    for spec in SPECS.values():
        for ops in tables(spec):
            for shape in dict.fromkeys(spec.bench_shapes):
                ran |= {
                    x.kernel.__name__ for x in record(spec, ops, shape, torch.bfloat16, "sm_90")
                }
    assert aot.uncovered("", ran) == []
    assert "rms_norm_forward_kernel" in aot.uncovered("", ran - {"rms_norm_forward_kernel"})


def test_recording_launches_nothing_and_ends():
    x = torch.full((4, 64), 7.0)
    with recording("sm_90") as launches:
        y = torch.full_like(x, 3.0)
        tables(SPECS["swiglu"])[0].rms_norm_forward(x, x[0], 1e-5)
    assert [x.kernel.__name__ for x in launches] == ["rms_norm_forward_kernel"]
    with tile_config.pretending("sm_90"):
        config = tile_config.tile_config("rms_norm_forward_kernel", x.device, "D64")
    assert config.items() <= launches[0].options.items() and y.eq(3).all()
    with recording("sm_80") as later:
        pass
    assert later == [] and len(launches) == 1
    assert tile_config.device_class(x.device) == "interpreter"


def test_contexts_end_with_their_block():
    """Also where it raises: launches are made, and look-ups are those of the files, again."""
    cpu, kernel = torch.device("cpu"), "rms_norm_forward_kernel"
    before, seen, recorded = tile_config.tile_config(kernel, cpu), [], []
    with pytest.raises(KeyError, match="inside"):
        with (
            tile_config.pretending("sm_90"),
            tile_config.watching(seen.append),
            tile_config.overriding({(kernel, "D8"): {"BT": 3}}),
            triton_launch.recording_launches(lambda *launch: recorded.append(launch)),
        ):
            assert tile_config.device_class(cpu) == "sm_90"
            assert tile_config.tile_config(kernel, cpu, "D8") == {"BT": 3}
            with tile_config.overriding({(kernel, ""): {"BT": 5}}):
                assert tile_config.tile_config(kernel, cpu, "D16") == {"BT": 5}
                assert tile_config.tile_config(kernel, cpu, "D8") == {"BT": 3}
            assert tile_config.tile_config(kernel, cpu, "D16") != {"BT": 5}
            raise KeyError("inside")
    assert [look[:2] for look in seen] == [(kernel, c) for c in ("D8", "D16", "D8", "D16")]
    assert tile_config.tile_config(kernel, cpu) == before and len(seen) == 4
    assert tile_config.device_class(cpu) == "interpreter"
    x = torch.randn(4, 64)
    if triton_launch.why_unavailable("cpu") is None:
        y, _ = TRITON.rms_norm_forward(x, x[0], 1e-5)
        torch.testing.assert_close(y, TORCH.rms_norm_forward(x, x[0], 1e-5)[0])
    assert recorded == []


# ---- what triton would specialise


def toy_kernel(x_ptr, y_ptr, none_ptr, n, stride, one, big, step, scale, BM: "tl.constexpr"):  # noqa: F821
    pass


@pytest.fixture
def derived():
    """The toy's job for a target and the options given."""

    def derive(target, **pointers):
        kernel = JITFunction(toy_kernel, do_not_specialize=["step"])
        x = Pointer(torch.bfloat16, pointers.get("offset", 0), pointers.get("bytes", 1024))
        y = Pointer(torch.float32, 0, 1024)
        args = (x, y, None, 17, 64, 1, 2**40, 32, 0.5)
        options = {"BM": 64, "num_warps": 8, "num_stages": 3}
        return aot.job(Launch(kernel, (1,), args, options), target, "bf16")

    return derive


def test_types_and_constants_are_specialised(derived):
    job = derived("sm_90")
    assert job.signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "none_ptr": "constexpr",
        "n": "i32",
        "stride": "i32",
        "one": "constexpr",
        "big": "i64",
        "step": "i32",
        "scale": "fp32",
        "BM": "constexpr",
    }
    assert job.constexprs == {(2,): None, (5,): 1, (9,): 64}
    assert job.constants == {"BM": 64} and job.tile == "BM=64 w8 s3"
    assert (job.options.num_warps, job.options.num_stages) == (8, 3)


def test_divisibility_is_specialised(derived):
    """Aligned pointers and multiples of 16; not 17, nor what varies from step to step."""
    sixteen = [["tt.divisibility", 16]]
    found = {k: v for k, v in derived("sm_90").attrs.items() if v}
    assert found == {(0,): sixteen, (1,): sixteen, (4,): sixteen, (6,): sixteen}
    assert not derived("sm_90", offset=8).attrs.get((0,))


def test_pointer_range_of_amd(derived):
    assert ["tt.pointer_range", 32] in derived("gfx942").attrs[(0,)]
    assert ["tt.pointer_range", 32] not in derived("gfx942", bytes=2**31).attrs[(0,)]


def test_equal_configurations_are_compiled_once(derived):
    assert derived("sm_90").key == derived("sm_90").key != derived("sm_90", offset=8).key


# ---- the verdict


def row(**changes):
    good = {"kernel": "toy_kernel", "target": "sm_90", "dtype": "bf16", "tile": "BM=64 w8 s3"}
    good |= {"registers": 90, "stack": 0, "spilled": 0, "shared": 98304, "serial": False}
    good |= {"dots": [aot.Dot(128, "bf16", "wgmma")], "mma": {"wgmma": 4}}
    return good | {"load": 16, "store": 16, "wide": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"spilled": 8, "stack": 8}, ["spill"]),
        ({"registers": 32, "stack": 4096}, ["spill"]),
        ({"shared": 232449}, ["shared"]),
        ({"shared": 101377, "target": "sm_80", "dots": []}, ["shared"]),
        ({"shared": 65537, "target": "gfx942", "dots": []}, ["shared"]),
        ({"mma": {}}, ["mma"]),
        ({"dots": [aot.Dot(128, "bf16", "fma")]}, ["mma"]),
        ({"dots": [aot.Dot(64, "f16", "mma")], "mma": {"mma.sync": 8}}, ["mma"]),
        ({"dots": [aot.Dot(32, "f16", "mma")], "mma": {"mma.sync": 8}}, []),
        ({"dots": [aot.Dot(128, "bf16", "mma")], "target": "sm_80"}, []),
        ({"dots": [], "mma": {}}, []),
        ({"dots": [aot.Dot(64, "f32", "fma")], "mma": {}}, []),
        ({"dots": [aot.Dot(64, "f32", "mma", tf32=True)]}, ["tf32"]),
        ({"serial": True}, ["serial"]),
        ({"wide": 0.49, "load": 16}, ["loads"]),
        ({"error": "PassManager::run failed"}, ["compiler"]),
    ],
)
def test_complaints_of_a_compiled_kernel(changes, kinds):
    assert list(aot.complaints(row(**changes))) == kinds


def test_an_exception_excuses_one_complaint(monkeypatch):
    monkeypatch.setitem(aot.EXCEPTIONS, ("loads", "toy_*", "sm_90", "*"), "reads four bytes")
    assert aot.excused("loads", row()) == "reads four bytes"
    assert aot.excused("spill", row()) is None
    assert aot.excused("loads", row(target="sm_80")) is None


def test_products_are_read_from_the_intermediate_code():
    mma = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>"
    blocked = mma.replace("#mma", "#blocked2")
    code = f"""
    %1 = ttng.warp_group_dot %a, %b, %c {{p = 0 : i32}} : !ttg.memdesc<128x64xbf16, #s> * x -> y
    %2 = tt.dot %a, %b, %c : tensor<16x32xf16, {mma}> * tensor<32x8xf16, ...> -> y
    %3 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x16xf32, {blocked}> * x -> y
    %4 = tt.dot %a, %b, %c : tensor<64x16xf32, {blocked}> * tensor<16x64xf32, ...> -> y
    %5 = tt.load %p : tensor<64x16xbf16, #blocked>
    """
    dots = [(128, "bf16", "wgmma"), (16, "f16", "mma"), (64, "f32", "fma", True)]
    dots += [(64, "f32", "fma")]
    assert aot.dots(code) == [aot.Dot(*d) for d in dots]


def test_widths_of_loads_and_stores():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.param.b64 %rd1, [p_param_0];
    cp.async.cg.shared.global [ %r8 + 0 ], [ %rd3 + 0 ], 0x10, %r9;
    cp.async.ca.shared.global [ %r8 + 0 ], [ %rd3 + 0 ], 4;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd4];
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r1, %r2}], [%r3];
    st.global.v2.b64 [ %rd5 + 0 ], { %rd6, %rd7 };
    """
    assert sorted(aot.ptx_widths(ptx, "ld")) == [2, 4, 16, 16, 64]
    assert aot.ptx_widths(ptx, "st") == [16, 64]
    gcn = """
    \tglobal_load_dwordx4 v[4:7], v0, s[0:1]
    \tbuffer_load_ushort v3, v1, s[4:7], 0 offen
    \tglobal_load_short_d16_hi v3, v1, s[4:5]
    \ts_load_dwordx4 s[0:3], s[4:5], 0x0
    \tbuffer_store_dwordx2 v[0:1], v2, s[0:3], 0 offen
    """
    assert aot.gcn_widths(gcn, "load") == [16, 2, 2] and aot.gcn_widths(gcn, "store") == [8]


def test_compile_as_a_command():
    """From the interpreter's environment too: it starts itself anew."""
    asked = ("--kernel", "rms_norm_forward", "--target", "sm_90", "--dtype", "bf16", "--jobs", "1")
    code, last, stderr = run("tuning.compile", *asked, TRITON_INTERPRET="1")
    assert code == 0 and last["failures"] == [] and last["configurations"] >= 2, stderr
    assert re.fullmatch(r"[\d.]+", last["triton"]) and last["kernels"] >= 1
    assert all(cells[-1] == "ok" and int(cells[4]) > 0 for cells in last["rows"])


# ---- tuning


@pytest.fixture
def reread(monkeypatch):
    """`reread(folder)`: configurations are of that folder, and of their own after the test."""

    def read(folder):
        monkeypatch.setattr(tile_config, "FOLDER", folder)
        tile_config.forget()

    yield read
    monkeypatch.undo()
    tile_config.forget()


def test_every_tile_configuration_has_candidates():
    """With the same names, so that none is a size the kernel does not have."""
    for kernel, by_device in tile_config.configurations().items():
        names = {name for config in by_device["sm_90"].values() for name in config} - {"from"}
        for shape_class in by_device["sm_90"]:
            for candidate in candidates.candidates_of(kernel, shape_class):
                assert candidate.keys() <= names, (kernel, candidate)
    assert {key.split()[0] for key in candidates.CANDIDATES} == tile_config.configurations().keys()
    assert {*candidates.TIMED_WITH, *candidates.TIMED_WITH.values()} <= jitted().keys()
    few = candidates.candidates_of("lora_linear_kernel", "few r16")
    assert few == candidates.CANDIDATES["lora_linear_kernel few"]


def test_tuning_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, last, stderr = run("tuning.tune")
    assert code == 2 and last is None and "--dry" in stderr


def test_rehearsal_writes_configurations_that_launches_read(tmp_path, reread):
    code, last, stderr = run("tuning.tune", "--dry", "--kernel", "rms_norm", "--out", tmp_path)
    assert code == 0, stderr
    assert {r[0] for r in last["rows"]} == {"rms_norm_forward_kernel", "rms_norm_backward_kernel"}
    assert all(r[2:5] == ["2", "0", "-"] and float(r[6]) > 0 for r in last["rows"])
    assert last["written"] == [str(tmp_path / "rms_norm.json")]
    reread(tmp_path)
    for kernel, shape_class, *_, config in last["rows"]:
        found = tile_config.tile_config(kernel, torch.device("cpu"), shape_class)
        assert found == json.loads(config)


def test_winners_are_written_where_launches_read_them(tmp_path, reread):
    present = {"BT": 1, "num_warps": 8, "num_stages": 1}
    search = searches.Search("rms_norm_forward_kernel", "D4096", present)
    best = present | {"BT": 2}
    written = tune.keep([exploring.Outcome(search, best, 0.9)], "sm_90", "measured", tmp_path)
    assert [path.name for path in written] == ["rms_norm.json"]
    before = tile_config.configurations()
    reread(tmp_path)
    cpu, kernel = torch.device("cpu"), "rms_norm_forward_kernel"
    with tile_config.pretending("sm_90"):
        assert tile_config.tile_config(kernel, cpu, "D4096") == best
    by_device = tile_config.configurations()[kernel]
    assert by_device["sm_90"]["D4096"]["from"] == "measured"
    assert by_device["sm_80"] == before[kernel]["sm_80"]


@pytest.fixture
def explorer(monkeypatch):
    """`explorer(times)`: a search among configurations of these BT, each with its time."""

    def make(times, ops=None):
        clock = Clock("cpu", 0.0)
        target = Target("interpreter", ("cuda", 90, 32), 232448)
        place = searches.Place(torch.device("cpu"), torch.float32, clock, target)
        search = next(s for s in searches.searches(["rms_norm_forward"], place))
        cases = [
            searches.Case(SPECS["rms_norm"], ops or TRITON, shape) for shape in ((65, 64), (9, 64))
        ]
        search = dataclasses.replace(search, cases=cases, proofs=cases[:1], also=[])
        configs = [search.present | {"BT": n} for n in times]
        real = measuring.run
        measured = []

        def run(search, case, place, config):
            return measuring.Run(config, real(search, case, place, config).outputs)

        def compare(ours, present, place):
            measured.append(ours.again["BT"])
            return times[ours.again["BT"]], 1.0

        monkeypatch.setattr(exploring, "run", run)
        monkeypatch.setattr(exploring, "compare", compare)
        return exploring.Explorer(search, place, configs), measured

    return make


def test_wrong_and_slow_candidates_lose(explorer):
    """What cannot run is refused; what is slow is not taken, or not even looked at twice."""
    one, measured = explorer({3: 0.1, 4: 0.5, 8: 0.99, 16: 1.3})  # 3 is no power of two
    turns.explore([one], None, 1e6)
    found = one.outcome
    assert found.best["BT"] == 4 and found.ratio == pytest.approx(0.5) and found.ms == (1.0, 0.5)
    assert (found.tried, found.slower, sum(found.refused.values())) == (4, 1, 1)
    assert measured.count(16) == 1  # at the largest case only
    assert measured.count(8) == 2 and measured.count(4) == 2 + 2  # at both; the winner again


def test_a_wrong_winner_is_rejected(explorer):
    """Within five per cent of the present outputs, so alike, and yet wrong: the next is taken."""

    def broken(x, w, eps):
        y, rstd = TRITON.rms_norm_forward(x, w, eps)
        blocks = tile_config.tile_config("rms_norm_forward_kernel", x.device)
        return y * (1.01 if blocks["BT"] == 4 else 1), rstd

    ops = dataclasses.replace(TRITON, rms_norm_forward=broken)
    one, _ = explorer({4: 0.5, 16: 0.8}, ops)
    turns.explore([one], None, 1e6)
    assert one.outcome.best["BT"] == 16 and one.outcome.refused == {"AssertionError": 1}


def test_refusals_of_workers_are_counted(explorer):
    """And such a candidate is not measured."""

    class Refusing(Workers):
        def __init__(self):
            self.outcomes = {}

        def want(self, tasks, urgency):
            self.outcomes |= dict.fromkeys(tasks)
            spilling = [t for t in tasks if any(("BT", 4) in items for *_, items in t.configs)]
            self.outcomes |= dict.fromkeys(spilling, "spills")

        def poll(self, seconds=0.0):
            pass

    one, measured = explorer({4: 0.5, 16: 0.8})
    turns.explore([one], Refusing(), 1e6)
    assert one.outcome.best["BT"] == 16 and one.outcome.refused == {"spills": 1}
    assert 4 not in measured and one.outcome.tried == 1


def test_candidates_without_time_are_counted(explorer):
    one, measured = explorer({4: 0.5, 16: 0.8})
    before = one.outcome.left
    turns.explore([one], None, -1.0)
    assert measured == [] and one.outcome.left == before + 2
    work = [one.search, dataclasses.replace(one.search, launches=9)]
    lengths = [len(search.candidates()) for search in work]
    assert turns.shares(work, 1e6, 2) == lengths
    assert all(2 <= n < most for n, most in zip(turns.shares(work, 20, 2), lengths, strict=True))


# In a process of its own, for triton must not be the interpreter there. It prints the outcomes of
# three tasks, and for every kernel that triton's own launcher then looks for, up to the launch,
# whether it found it in the cache.
COMPILED_AHEAD = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks._common import tables, typed
from benchmarks.tuning.ahead import Target, Task, Workers
from kernels.launch import tile_config, triton_launch
from kernels.registry import SPECS

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

spec, shape, kernel = SPECS["swiglu"], (16, 96), "swiglu_forward_kernel"
config = {"BT": 2, "BF": 64, "num_warps": 2, "num_stages": 1}
def task(config, **sizes):
    configs = ((kernel, "", tuple((config | sizes).items())),)
    return Task("swiglu", "triton", shape, "bfloat16", configs)
dkv = (("BM", 64), ("BN", 128), ("num_warps", 4), ("num_stages", 2))
held = ("attention", "triton", (2, 1, 64, 256), "bfloat16", (("attention_dkv_kernel", "", dkv),))
tasks = [task(config), task(config, BF=96), Task(*held, names=("attention_dkv_kernel",))]
workers = Workers(2, Target("sm_90", ("cuda", 90, 32), 232448))
workers.want(tasks, 0)
while workers.missing(tasks):
    workers.poll(1.0)
workers.close()
hits = []
triton.knobs.compilation.listener = lambda **known: hits.append(known["cache_hit"])
triton.runtime.driver.set_active(Driver())
def note(kernel, grid, args, options):
    kernel.run(*args, grid=grid, warmup=True, **options)
inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
with (
    tile_config.pretending("sm_90"),
    tile_config.overriding({(kernel, ""): config}),
    triton_launch.recording_launches(note),
):
    spec.run(tables(spec)[0], typed(spec, inputs, torch.bfloat16))
print(json.dumps([[workers.outcomes[t] for t in tasks], hits]))
"""


def test_launches_find_what_workers_compiled(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILED_AHEAD]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (good, wrong, spilling), hits = json.loads(done.stdout)
    assert good is None and wrong == "CompilationError" and spilling == "spills"
    assert hits == [True, True]

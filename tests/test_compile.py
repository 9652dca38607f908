"""Ahead-of-time compilation and tuning: what is recorded, what is derived, what is refused."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import compile as aot  # noqa: E402
from benchmarks import tune  # noqa: E402
from benchmarks._common import Launch, Pointer, jitted, record, recording, tables  # noqa: E402
from kernels import _triton, tiles  # noqa: E402
from kernels.registry import SPECS  # noqa: E402
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
    row = tiles._row("rms_norm_forward_kernel", "sm_90", ("D64",))
    assert row.items() <= launches[0].options.items()
    assert y.eq(3).all() and _triton.recorder is None and tiles.pretended is None


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


def test_types_and_constants(derived):
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


def test_divisibility(derived):
    """Aligned pointers and multiples of 16; not 17, nor what varies from step to step."""
    sixteen = [["tt.divisibility", 16]]
    found = {k: v for k, v in derived("sm_90").attrs.items() if v}
    assert found == {(0,): sixteen, (1,): sixteen, (4,): sixteen, (6,): sixteen}
    assert not derived("sm_90", offset=8).attrs.get((0,))


def test_pointer_range_of_amd(derived):
    assert ["tt.pointer_range", 32] in derived("gfx942").attrs[(0,)]
    assert ["tt.pointer_range", 32] not in derived("gfx942", bytes=2**31).attrs[(0,)]


def test_same_configuration_once(derived):
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
def test_verdict(changes, kinds):
    assert list(aot.complaints(row(**changes))) == kinds


def test_exceptions_fit_one_complaint(monkeypatch):
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


def test_command():
    """From the interpreter's environment too: it starts itself anew."""
    asked = ("--kernel", "rms_norm_forward", "--target", "sm_90", "--dtype", "bf16", "--jobs", "1")
    code, last, stderr = run("compile", *asked, TRITON_INTERPRET="1")
    assert code == 0 and last["failures"] == [] and last["configurations"] >= 2, stderr
    assert re.fullmatch(r"[\d.]+", last["triton"]) and last["kernels"] >= 1
    assert all(cells[-1] == "ok" and int(cells[4]) > 0 for cells in last["rows"])


# ---- tuning


@pytest.fixture
def reread(monkeypatch):
    """`reread(folder)`: tiles reads that folder, and its own again after the test."""

    def forget():
        tiles.table.cache_clear()
        tiles._row.cache_clear()

    def read(folder):
        monkeypatch.setattr(tiles, "FOLDER", folder)
        forget()

    yield read
    monkeypatch.undo()
    forget()


def test_every_row_of_the_table_has_candidates():
    """Named as in the table, so that none is a size the kernel does not have."""
    for kernel, by_device in tiles.table().items():
        names = {name for row in by_device["sm_90"].values() for name in row} - {"from"}
        for candidate in tune.CANDIDATES[kernel]:
            assert candidate.keys() <= names, (kernel, candidate)
    assert tune.CANDIDATES.keys() == tiles.table().keys()
    assert {*tune.TIMED_WITH, *tune.TIMED_WITH.values()} <= jitted().keys()


def test_tuning_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, last, stderr = run("tune")
    assert code == 2 and last is None and "--dry" in stderr


def test_rehearsal_writes_rows_that_tiles_reads(tmp_path, reread):
    code, last, stderr = run("tune", "--dry", "--kernel", "rms_norm", "--out", tmp_path)
    assert code == 0, stderr
    assert {r[0] for r in last["rows"]} == {"rms_norm_forward_kernel", "rms_norm_backward_kernel"}
    assert all(int(r[2]) == 2 and r[3] == "-" for r in last["rows"])
    assert last["written"] == [str(tmp_path / "rms_norm.json")]
    reread(tmp_path)
    for kernel, shape_class, *_, row in last["rows"]:
        assert tiles.tile(kernel, torch.device("cpu"), shape_class) == json.loads(row)


def test_winners_are_kept_where_tiles_reads_them(tmp_path, monkeypatch, reread):
    present = {"BT": 1, "num_warps": 8, "num_stages": 1}
    search = tune.Search("rms_norm_forward_kernel", "D4096", present)
    best = present | {"BT": 2}
    written = tune.keep([tune.Outcome(search, best, 0.9)], "sm_90", "measured", tmp_path)
    assert [path.name for path in written] == ["rms_norm.json"]
    before = tiles.table()
    reread(tmp_path)
    monkeypatch.setattr(tiles, "pretended", "sm_90")
    assert tiles.tile("rms_norm_forward_kernel", torch.device("cpu"), "D4096") == best
    rows = tiles.table()["rms_norm_forward_kernel"]
    assert rows["sm_90"]["D4096"]["from"] == "measured"
    assert rows["sm_80"] == before["rms_norm_forward_kernel"]["sm_80"]


def test_wrong_and_slow_candidates_lose(monkeypatch):
    """A candidate that breaks the operation is refused, one that is not faster is not taken."""
    place = tune.Place(torch.device("cpu"), torch.float32, 1, None)
    search = next(s for s in tune.searches("rms_norm_forward", place))
    rows = [search.present | {"BT": 3}, search.present | {"BT": 4}, search.present | {"BT": 8}]
    monkeypatch.setattr(tune.Search, "candidates", lambda self: rows)
    times = {4: 0.5, 8: 0.99}  # of the present row; 3 is no power of two
    monkeypatch.setattr(tune, "ratio", lambda search, row, place: times[row["BT"]])
    outcome = tune.explore(search, place, float("inf"), None)
    assert outcome.best["BT"] == 4 and outcome.ratio == 0.5 and outcome.tried == 3
    assert sum(outcome.refused.values()) == 1

"""The strict interpreter of tests/helpers/interpreter.py finds what it is there to find."""

import numpy as np
import pytest
import torch

from kernels.launch import triton_launch
from kernels.launch.triton_launch import jit, launch, tl
from tests.helpers import interpreter, mutate_kernels

pytestmark = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="kernels run on the GPU here")
if triton_launch.INTERPRETED:
    interpreter.install()


@jit
def cast_kernel(x_ptr, up_ptr, down_ptr, n, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(up_ptr + at, x.to(tl.float32), mask=at < n)
    tl.store(down_ptr + at, x.to(tl.float32).to(tl.bfloat16), mask=at < n)


@jit
def sum_kernel(x_ptr, y_ptr, out_ptr, n, BN: tl.constexpr):
    at = tl.arange(0, BN)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x * y + x, mask=at < n)


@jit
def dot_kernel(x_ptr, y_ptr, out_ptr, BN: tl.constexpr, BK: tl.constexpr):
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    x = tl.load(x_ptr + n[:, None] * BK + k[None, :])
    y = tl.load(y_ptr + n[:, None] * BK + k[None, :])
    tl.store(out_ptr + n[:, None] * BN + n[None, :], tl.dot(x, y.T))


@jit
def total_kernel(x_ptr, rows_ptr, columns_ptr, all_ptr, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    x = tl.load(x_ptr + m[:, None] * BN + n[None, :])
    tl.store(rows_ptr + m, tl.sum(x, axis=1))
    tl.store(columns_ptr + n[None, :], tl.sum(x, axis=0, keep_dims=True))
    tl.store(all_ptr, tl.sum(x))


@jit
def undefined_kernel(x_ptr, out_ptr, n, BN: tl.constexpr):
    at = tl.arange(0, BN)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(out_ptr, tl.sum(x))


def test_bf16_is_that_of_torch():
    """Every 16-bit pattern widened; arithmetic rounded to nearest even after each operation."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    up, down = torch.empty(65536), torch.empty(65536, dtype=torch.bfloat16)
    launch(cast_kernel, (64,), x, up, down, 65536, BN=1024)
    numbers = ~x.isnan()
    assert torch.equal(up[numbers], x.float()[numbers])
    assert torch.equal(down.view(torch.int16)[numbers], bits[numbers])
    assert up[~numbers].isnan().all() and down[~numbers].isnan().all()

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, generator=g).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    launch(sum_kernel, (1,), a, b, out, 512, BN=512)
    assert torch.equal(out, a * b + a)


def test_rounding_from_fp32_is_that_of_torch():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e3
    up, down = torch.empty(4096), torch.empty(4096, dtype=torch.bfloat16)
    launch(cast_kernel, (4,), x, up, down, 4096, BN=1024)
    assert torch.equal(down, x.bfloat16())


def test_bf16_products_are_exact():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-8, 9, (32, 64), generator=g).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    launch(dot_kernel, (1,), x, y, out, BN=32, BK=64)
    assert torch.equal(out, x.float() @ y.float().T)


def added_in_halves(terms):
    """The order of the interpreter's sums, one number at a time."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def test_a_product_adds_in_one_order(monkeypatch):
    """Bit for bit, whatever the tile, the layout or the library that numpy was built with."""
    for name in ("matmul", "dot", "einsum", "sum"):
        monkeypatch.setattr(np, name, None)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 64, generator=g) for _ in range(2))
    want = torch.empty(64, 64)
    launch(dot_kernel, (1,), x, y, want, BN=64, BK=64)
    for i, j in ((0, 0), (5, 63), (63, 1), (31, 31)):
        terms = [a * b for a, b in zip(x[i].numpy(), y[j].numpy(), strict=True)]
        assert want[i, j].item() == added_in_halves(terms)
    for rows in (1, 2, 16, 32):
        for first in (0, 32):
            out = torch.empty(rows, rows)
            part = slice(first, first + rows)
            launch(dot_kernel, (1,), x[part].clone(), y[part].clone(), out, BN=rows, BK=64)
            assert torch.equal(out, want[part, part]), f"{rows} rows and columns from {first} on"
    a, b = x.numpy(), y.numpy().T
    for left in (a, np.asfortranarray(a), a[:, ::-1][:, ::-1]):
        for right in (b, np.ascontiguousarray(b)):
            assert (interpreter.product(left, right, np.float32) == want.numpy()).all()
            pairs = np.stack([left, left]), np.stack([right, right])
            assert (interpreter.product(*pairs, np.float32) == np.stack([want.numpy()] * 2)).all()


def test_a_sum_adds_in_one_order():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rows, columns, everything = torch.empty(32), torch.empty(64), torch.empty(1)
    launch(total_kernel, (1,), x, rows, columns, everything, BM=32, BN=64)
    for i in range(32):
        assert rows[i].item() == added_in_halves(list(x[i].numpy()))
    for j in range(64):
        assert columns[j].item() == added_in_halves(list(x[:, j].numpy()))
    assert everything.item() == added_in_halves(list(x.flatten().numpy()))
    one, narrow = torch.empty(1), torch.empty(64)
    launch(total_kernel, (1,), x[7].clone(), one, narrow, everything, BM=1, BN=64)
    assert one.item() == rows[7].item() and torch.equal(narrow, x[7])


def test_a_short_inner_dimension_is_refused():
    x, out = torch.zeros(16, 8), torch.empty(16, 16)
    with pytest.raises(Exception, match="16 at least"):
        launch(dot_kernel, (1,), x, x, out, BN=16, BK=8)


@pytest.mark.parametrize("extra", [1, 8])
def test_an_overrun_is_found(extra):
    buffer = torch.zeros(256)
    x, y, out = buffer[:100], buffer[100:200], torch.empty(100 + extra)
    launch(sum_kernel, (1,), x, x, out, 100, BN=128)
    with pytest.raises(Exception, match="outside every tensor"):
        launch(sum_kernel, (1,), y, y, out, 100 + extra, BN=128)  # reads past the end of y
    with pytest.raises(Exception, match="outside every tensor"):
        launch(sum_kernel, (1,), torch.zeros(128), torch.zeros(128), out[:100], 128, BN=128)


def test_undefined_lanes_are_poisoned():
    out = torch.zeros(1)
    launch(undefined_kernel, (1,), torch.ones(32), out, 32, BN=32)
    assert out.item() == 32
    launch(undefined_kernel, (1,), torch.ones(32), out, 31, BN=32)
    assert out.isnan().all()


def test_guards_and_poison():
    buffers = []
    moved = interpreter.guarded({"x": torch.arange(12.0).view(3, 4).T, "n": 3}, buffers)
    assert torch.equal(moved["x"], torch.arange(12.0).view(3, 4).T) and moved["n"] == 3
    assert moved["x"].stride() == (1, 4) and interpreter.guards_intact(buffers)
    buffers[0][0][interpreter.GUARD + 12] = 0.0
    assert not interpreter.guards_intact(buffers)
    with interpreter.poisoned():
        assert torch.empty(3).isnan().all() and moved["x"].new_empty(2).isnan().all()
    assert torch.empty(0).numel() == 0


def test_a_misspelt_option_is_refused():
    with pytest.raises(AssertionError, match="num_warp"):
        launch(undefined_kernel, (1,), torch.ones(1), torch.ones(1), 1, BN=16, num_warp=4)


def test_every_equivalent_mutant_is_one():
    """A reason must not outlive its line: it would excuse nothing, or another mutant."""
    keys = {mutant.key for mutant in mutate_kernels.mutants("*", per_kernel=1000)}
    assert mutate_kernels.EQUIVALENT.keys() <= keys


def test_kernels_are_mutated_at_any_depth(tmp_path, monkeypatch):
    """A file that is moved into a folder is not left out."""
    source = "@jit\ndef {}(n):\n    return n + 1 < 3\n"
    for path, name in (("kernels/a.py", "a_kernel"), ("kernels/deep/er/b.py", "b_kernel")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source.format(name))
    monkeypatch.setattr(mutate_kernels, "ROOT", tmp_path)
    found = mutate_kernels.mutants("*", per_kernel=10)
    assert [(m.kernel, m.old) for m in found] == [
        (name, old) for name in ("a_kernel", "b_kernel") for old in ("+", "<")
    ]


def test_every_mutant_has_an_operation_that_tests_it():
    """Without one every mutant of the file would count as found, for the wrong reason."""
    files = {mutant.file for mutant in mutate_kernels.mutants("*", per_kernel=1)}
    assert "philox" in files and "lora_linear/triton_backward" in files
    for file in files:
        assert mutate_kernels.specs_testing(file), f"no operation tests kernels/{file}.py"
    assert files >= mutate_kernels.MORE_TESTS.keys() | mutate_kernels.USED_BY.keys()

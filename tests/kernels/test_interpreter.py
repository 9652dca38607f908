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
    """up = x in fp32; down = that in bf16."""
    offsets = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    up = x.to(tl.float32)
    down = up.to(tl.bfloat16)
    tl.store(up_ptr + offsets, up, mask=mask)
    tl.store(down_ptr + offsets, down, mask=mask)


@jit
def multiply_add_kernel(x_ptr, y_ptr, out_ptr, n, BN: tl.constexpr):
    """out = x y + x in their dtype, by one program."""
    offsets = tl.arange(0, BN)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, x * y + x, mask=mask)


@jit
def dot_kernel(x_ptr, y_ptr, out_ptr, BN: tl.constexpr, BK: tl.constexpr):
    """out (BN, BN) = x (BN, BK) times y (BN, BK) transposed."""
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    offsets = n[:, None] * BK + k[None, :]
    out_offsets = n[:, None] * BN + n[None, :]
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(out_ptr + out_offsets, tl.dot(x, y.T))


@jit
def sums_kernel(x_ptr, rows_ptr, columns_ptr, all_ptr, BM: tl.constexpr, BN: tl.constexpr):
    """The sums of x (BM, BN) over its rows, its columns and all of it."""
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    x = tl.load(x_ptr + m[:, None] * BN + n[None, :])
    tl.store(rows_ptr + m, tl.sum(x, axis=1))
    tl.store(columns_ptr + n[None, :], tl.sum(x, axis=0, keep_dims=True))
    tl.store(all_ptr, tl.sum(x))


@jit
def undefined_kernel(x_ptr, out_ptr, n, BN: tl.constexpr):
    """out = the sum of BN lanes of x, which are undefined from n on."""
    offsets = tl.arange(0, BN)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr, tl.sum(x))


def two_normal(size, dtype=torch.float32):
    """Two tensors of normal numbers, the same ones every time."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=g).to(dtype)
    y = torch.randn(size, generator=g).to(dtype)
    return x, y


def test_bf16_is_that_of_torch():
    """Every 16-bit pattern widened; arithmetic rounded to nearest even after each operation."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    up = torch.empty(65536)
    down = torch.empty(65536, dtype=torch.bfloat16)
    launch(cast_kernel, (64,), x, up, down, 65536, BN=1024)
    numbers = ~x.isnan()
    assert torch.equal(up[numbers], x.float()[numbers])
    assert torch.equal(down.view(torch.int16)[numbers], bits[numbers])
    assert up[~numbers].isnan().all() and down[~numbers].isnan().all()

    a, b = two_normal((512,), torch.bfloat16)
    out = torch.empty_like(a)
    launch(multiply_add_kernel, (1,), a, b, out, 512, BN=512)
    assert torch.equal(out, a * b + a)


def test_rounding_from_fp32_is_that_of_torch():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e3
    up = torch.empty(4096)
    down = torch.empty(4096, dtype=torch.bfloat16)
    launch(cast_kernel, (4,), x, up, down, 4096, BN=1024)
    assert torch.equal(down, x.bfloat16())


def test_bf16_products_are_exact():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (32, 64), generator=g).bfloat16()
    y = torch.randint(-8, 9, (32, 64), generator=g).bfloat16()
    out = torch.empty(32, 32)
    launch(dot_kernel, (1,), x, y, out, BN=32, BK=64)
    assert torch.equal(out, x.float() @ y.float().T)


def added_in_halves(terms):
    """The order of the interpreter's sums, one number at a time."""
    while len(terms) > 1:
        half = len(terms) // 2
        lower = terms[:half]
        upper = terms[half:]
        terms = [a + b for a, b in zip(lower, upper, strict=True)]
    return terms[0]


@pytest.fixture
def without_numpy_sums(monkeypatch):
    """numpy's own products and sums, whose order is the library's, cannot be called."""
    for name in ("matmul", "dot", "einsum", "sum"):
        monkeypatch.setattr(np, name, None)


def test_a_product_adds_in_one_order_whatever_the_tile(without_numpy_sums):
    x, y = two_normal((64, 64))
    whole = torch.empty(64, 64)
    launch(dot_kernel, (1,), x, y, whole, BN=64, BK=64)
    for i, j in ((0, 0), (5, 63), (63, 1), (31, 31)):
        terms = [a * b for a, b in zip(x[i].numpy(), y[j].numpy(), strict=True)]
        assert whole[i, j].item() == added_in_halves(terms)
    for rows in (1, 2, 16, 32):
        for first in (0, 32):
            part = slice(first, first + rows)
            out = torch.empty(rows, rows)
            launch(dot_kernel, (1,), x[part].clone(), y[part].clone(), out, BN=rows, BK=64)
            assert torch.equal(out, whole[part, part]), f"{rows} rows and columns from {first} on"


def test_a_product_adds_in_one_order_whatever_the_layout(without_numpy_sums):
    x, y = two_normal((64, 64))
    kernels_product = torch.empty(64, 64)
    launch(dot_kernel, (1,), x, y, kernels_product, BN=64, BK=64)
    want = kernels_product.numpy()
    a = x.numpy()
    b = y.numpy().T
    for left in (a, np.asfortranarray(a), a[:, ::-1][:, ::-1]):
        for right in (b, np.ascontiguousarray(b)):
            made = interpreter.product(left, right, np.float32)
            assert (made == want).all()
            two_left = np.stack([left, left])
            two_right = np.stack([right, right])
            two_made = interpreter.product(two_left, two_right, np.float32)
            assert (two_made == np.stack([want, want])).all()


def test_a_sum_adds_in_one_order():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.empty(32)
    columns = torch.empty(64)
    everything = torch.empty(1)
    launch(sums_kernel, (1,), x, rows, columns, everything, BM=32, BN=64)
    for i in range(32):
        assert rows[i].item() == added_in_halves(list(x[i].numpy()))
    for j in range(64):
        assert columns[j].item() == added_in_halves(list(x[:, j].numpy()))
    assert everything.item() == added_in_halves(list(x.flatten().numpy()))
    row = x[7].clone()
    row_sum = torch.empty(1)
    column_sums = torch.empty(64)
    launch(sums_kernel, (1,), row, row_sum, column_sums, everything, BM=1, BN=64)
    assert row_sum.item() == rows[7].item()
    assert torch.equal(column_sums, row)


def test_a_product_over_fewer_than_16_elements_is_refused():
    x = torch.zeros(16, 8)
    out = torch.empty(16, 16)
    with pytest.raises(Exception, match="16 at least"):
        launch(dot_kernel, (1,), x, x, out, BN=16, BK=8)


@pytest.mark.parametrize("extra", [1, 8])
def test_an_address_past_the_end_of_a_tensor_is_found(extra):
    """Also where memory of the same allocation follows, and for stores."""
    buffer = torch.zeros(256)
    x = buffer[:100]
    y = buffer[100:200]
    out = torch.empty(100 + extra)
    launch(multiply_add_kernel, (1,), x, x, out, 100, BN=128)
    with pytest.raises(Exception, match="outside every tensor"):
        launch(multiply_add_kernel, (1,), y, y, out, 100 + extra, BN=128)  # reads past y's end
    zeros = torch.zeros(128)
    others = torch.zeros(128)
    with pytest.raises(Exception, match="outside every tensor"):
        launch(multiply_add_kernel, (1,), zeros, others, out[:100], 128, BN=128)


def test_a_masked_lane_without_other_is_nan():
    out = torch.zeros(1)
    launch(undefined_kernel, (1,), torch.ones(32), out, 32, BN=32)
    assert out.item() == 32
    launch(undefined_kernel, (1,), torch.ones(32), out, 31, BN=32)
    assert out.isnan().all()


def test_a_write_after_a_guarded_tensor_shows():
    """Guarded tensors keep their numbers and strides; what is no tensor stays as it is."""
    x = torch.arange(12.0).view(3, 4).T
    buffers = []
    moved = interpreter.guarded({"x": x, "n": 3}, buffers)
    assert torch.equal(moved["x"], x) and moved["n"] == 3
    assert moved["x"].stride() == (1, 4) and interpreter.guards_intact(buffers)
    buffer, _ = buffers[0]
    buffer[interpreter.GUARD + 12] = 0.0
    assert not interpreter.guards_intact(buffers)


def test_fresh_tensors_are_poisoned():
    x = torch.zeros(4, 3)
    with interpreter.poisoned():
        assert torch.empty(3).isnan().all() and x.new_empty(2).isnan().all()
    assert torch.empty(0).numel() == 0


def test_a_misspelt_option_is_refused():
    with pytest.raises(AssertionError, match="num_warp"):
        launch(undefined_kernel, (1,), torch.ones(1), torch.ones(1), 1, BN=16, num_warp=4)


def test_every_reason_in_EQUIVALENT_belongs_to_a_mutant():
    """A reason must not outlive its line: it would excuse nothing, or another mutant."""
    keys = {mutant.key for mutant in mutate_kernels.mutants("*", per_kernel=1000)}
    assert mutate_kernels.EQUIVALENT.keys() <= keys


def test_kernels_are_mutated_at_any_depth(tmp_path, monkeypatch):
    """A file that is moved into a folder is not left out."""
    source = "@jit\ndef {}(n):\n    return n + 1 < 3\n"
    for place, name in (("kernels/a.py", "a_kernel"), ("kernels/deep/er/b.py", "b_kernel")):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.format(name))
    monkeypatch.setattr(mutate_kernels, "ROOT", tmp_path)
    found = [(m.kernel, m.old) for m in mutate_kernels.mutants("*", per_kernel=10)]
    assert found == [("a_kernel", "+"), ("a_kernel", "<"), ("b_kernel", "+"), ("b_kernel", "<")]


def test_every_mutant_has_an_operation_that_tests_it():
    """Without one every mutant of the file would count as found, for the wrong reason."""
    files = {mutant.file for mutant in mutate_kernels.mutants("*", per_kernel=1)}
    assert "philox" in files and "lora_linear/triton_backward" in files
    for file in files:
        assert mutate_kernels.specs_testing(file), f"no operation tests kernels/{file}.py"
    assert files >= mutate_kernels.MORE_TESTS.keys() | mutate_kernels.USED_BY.keys()

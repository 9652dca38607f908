"""Makes triton's interpreter strict enough to test a kernel on a machine without a GPU.

`install()`, once per process (triton imported with TRITON_INTERPRET=1), changes the interpreter:
    bf16       is stored as uint16 there and computed with as an integer. Here: exact widening,
               arithmetic in fp32 with one rounding to nearest even, products in fp32.
    bounds     an unmasked address of a load, store or atomic must lie inside a tensor that was
               passed to the launch; otherwise `OutOfBounds`.
    undefined  a lane that is masked off without `other` reads as zero there and as anything on a
               GPU. Here: NaN, or the largest integer.
    dots       the inner dimension must be at least 16, as the compiler for NVIDIA demands.
    sums       tl.dot and tl.sum add in one order, spelled out below. numpy's matmul is the BLAS's,
               whose order follows the processor and the number of rows (OpenBLAS's Haswell
               kernels), and np.sum's follows the layout: neither is a property of a kernel.

`guarded` puts inputs into the middle of larger buffers filled with NaN, so that an address one past
the end belongs to no tensor and a stray write shows; `poisoned` does so with fresh tensors, which
are filled with NaN themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

GUARD = 256  # elements before and after a guarded tensor; keeps 16-byte alignment


class OutOfBounds(Exception):
    """A kernel touched memory that no argument of its launch covers."""


# ---- the interpreter

_extents: list[tuple[int, int]] = []  # address ranges of the tensors of the launch in progress
_backwards = False  # whether a launch takes its last program first


def _widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _total(terms: np.ndarray) -> np.ndarray:
    """The sum over the first axis, a power of two long; `terms` is used up.

    The upper half is added to the lower until one is left. Each addition is elementwise, so the
    bits of a sum depend on its own terms alone: on no shape, layout, library or processor.
    """
    count = len(terms)
    assert count & (count - 1) == 0 and count, f"a sum over {count} terms: no power of two"
    while count > 1:
        count //= 2
        np.add(terms[:count], terms[count : 2 * count], out=terms[:count])
    return terms[0]


def product(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """(..., M, K) times (..., K, N), each product and each sum of two rounded to `dtype`."""
    a = np.ascontiguousarray(np.moveaxis(a, -1, 0), dtype=dtype)  # (K, ..., M)
    b = np.ascontiguousarray(np.moveaxis(b, -2, 0), dtype=dtype)  # (K, ..., N)
    return _total(a[..., :, None] * b[..., None, :])


def _inside(what: str, pointers: Any, mask: Any, grid: Any) -> None:
    """Raise unless every address that is not masked off lies in one of `_extents`."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = np.asarray(pointers.data, dtype=np.uint64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
    addresses = addresses.ravel()
    fine = np.zeros(addresses.shape, dtype=bool)
    for low, high in _extents:
        fine |= (addresses >= np.uint64(low)) & (addresses + np.uint64(size) <= np.uint64(high))
    if not fine.all():
        first = int(addresses[~fine][0])
        low, high = min(_extents, key=lambda e: min(abs(first - e[0]), abs(first - e[1])))
        raise OutOfBounds(
            f"{what} in program {grid}: {int((~fine).sum())} of {fine.size} addresses are outside "
            f"every tensor; the first is {first - low} bytes into one of {high - low} bytes"
        )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    count = last + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + count * tensor.element_size()


def install() -> None:
    """Change the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "strict", False):
        return
    builder.strict = True
    cast = builder.cast_impl
    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    fp_to_fp, convert = builder.create_fp_to_fp, interpreter._implicit_cvt
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    reduce_sum, run = interpreter.ReduceOps.sum, interpreter.GridExecutor.__call__
    set_program = builder.set_grid_idx

    # -- bf16
    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16

    def widened(value: Any) -> Any:
        return handle(_widen(value.data), tl.float32) if is_bf16(value) else value

    def strict_cast(self, source, target):
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return handle(_narrow(np.asarray(source.data).astype(np.float32)), tl.bfloat16)
        if is_bf16(source) and target.scalar == tl.bfloat16:
            return source
        return cast(self, widened(source), target)

    def strict_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return strict_cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def rounded(result: np.ndarray) -> Any:
        return (
            handle(result, tl.int1)
            if result.dtype == bool
            else handle(_narrow(result), tl.bfloat16)
        )

    def strict_binary(self, left, right, op):
        if is_bf16(left):
            return rounded(op(widened(left).data, widened(right).data))
        return binary(self, left, right, op)

    def strict_unary(self, value, op):
        return rounded(op(widened(value).data)) if is_bf16(value) else unary(self, value, op)

    def strict_ternary(self, a, b, c, op):
        if is_bf16(b) and is_bf16(c) and op is not np.where:
            return rounded(op(*(widened(v).data for v in (a, b, c))))
        return ternary(self, a, b, c, op)

    def strict_dot(self, a, b, d, *rest):
        inner = a.data.shape[-1]
        kinds = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
        assert a.dtype.scalar in kinds, f"tl.dot of {a.dtype.scalar} is not written down here"
        assert inner >= 16, (
            f"tl.dot over {inner} elements does not compile for NVIDIA (16 at least)"
        )
        made = product(widened(a).data, widened(b).data, d.data.dtype)
        return handle(made + d.data, d.dtype.scalar)

    def strict_sum(self, value):
        if value.dtype.scalar in (tl.bfloat16, tl.float16):
            raise AssertionError(f"tl.sum of {value.dtype.scalar}: widen to fp32 first")
        if not value.dtype.is_floating():
            return reduce_sum(self, value)
        data, axis = value.handle.data, self.axis
        terms = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
        made = _total(np.array(terms, order="C"))  # of a copy
        if self.keep_dims:
            axes = tuple(range(data.ndim)) if axis is None else axis
            made = np.expand_dims(made, axes)
        return self.to_tensor(made, value.dtype)

    # -- bounds and undefined lanes
    def noted(arg):
        if isinstance(getattr(arg, "base", arg), torch.Tensor):
            _extents.append(_extent(getattr(arg, "base", arg)))
        return convert(arg)

    def strict_load(self, pointers, mask, other, *args, **kwargs):
        _inside("load", pointers, mask, self.grid_idx)
        if other is None:
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            if kind == tl.bfloat16:
                undefined = 0x7FC0
            elif dtype.kind == "f":
                undefined = np.nan
            else:
                undefined = np.iinfo(dtype).max if dtype.kind in "iu" else True
            other = handle(np.full(pointers.data.shape, undefined, dtype=dtype), kind)
        return load(self, pointers, mask, other, *args, **kwargs)

    def strict_store(self, pointers, value, mask, *args, **kwargs):
        _inside("store", pointers, mask, self.grid_idx)
        return store(self, pointers, value, mask, *args, **kwargs)

    def strict_rmw(self, op, pointer, value, mask, *args):
        _inside("atomic", pointer, mask, self.grid_idx)
        return rmw(self, op, pointer, value, mask, *args)

    def strict_cas(self, pointer, *args):
        _inside("atomic", pointer, None, self.grid_idx)
        return cas(self, pointer, *args)

    def ordered_program(self, *index):
        if _backwards:
            index = [n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)]
        set_program(self, *index)

    def strict_run(self, *args, **kwargs):
        _extents.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            _extents.clear()

    builder.cast_impl, builder.create_fp_to_fp = strict_cast, strict_fp_to_fp
    builder.binary_op, builder.unary_op, builder.ternary_op = (
        strict_binary,
        strict_unary,
        strict_ternary,
    )
    builder.create_dot = strict_dot
    builder.create_masked_load, builder.create_masked_store = strict_load, strict_store
    builder.create_atomic_rmw, builder.create_atomic_cas = strict_rmw, strict_cas
    builder.set_grid_idx = ordered_program
    interpreter.ReduceOps.sum = strict_sum
    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = noted, strict_run


@contextlib.contextmanager
def last_programs_first() -> Iterator[None]:
    """Inside, the programs of a launch run in the opposite order, as a GPU may run them."""
    global _backwards
    _backwards = True
    try:
        yield
    finally:
        _backwards = False


# ---- inputs and outputs


def _undefined(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def guarded(value: Any, buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`value` with each tensor in it moved to the middle of a larger buffer; structures walked.

    `buffers` collects (buffer, copy of it) for `guards_intact`. The layout (strides) is kept.
    """
    if isinstance(value, torch.Tensor):
        low, high = _extent(value)
        count = (high - low) // value.element_size()
        buffer = value.new_full((count + 2 * GUARD,), _undefined(value.dtype))
        moved = buffer[GUARD:].as_strided(value.shape, value.stride(), GUARD)
        moved.copy_(value)
        outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
        outside.as_strided(value.shape, value.stride(), GUARD).fill_(False)
        buffers.append((buffer, outside))
        return moved
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{k: guarded(v, buffers) for k, v in fields.items()})
    if isinstance(value, dict):
        return {k: guarded(v, buffers) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(guarded(v, buffers) for v in value)
    return value


def guards_intact(buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether nothing was written around the guarded tensors."""
    for buffer, outside in buffers:
        around = buffer[outside]
        want = _undefined(buffer.dtype)
        same = around.isnan() if buffer.dtype.is_floating_point else around == want
        if not bool(same.all()):
            return False
    return True


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty, empty_like and new_empty give NaN (or the largest integer).

    Each lies in the middle of a larger buffer: an address just outside is not another tensor's.
    """
    makers = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    kept = [getattr(owner, name) for owner, name in makers]

    def poisoning(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.numel() == 0:
                return out
            low, high = _extent(out)
            count = (high - low) // out.element_size()
            buffer = torch.full(
                (count + 2 * GUARD,), _undefined(out.dtype), dtype=out.dtype, device=out.device
            )
            return buffer.as_strided(out.shape, out.stride(), GUARD)

        return made

    for (owner, name), make in zip(makers, kept, strict=True):
        setattr(owner, name, poisoning(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(makers, kept, strict=True):
            setattr(owner, name, make)

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

from kernels.launch.triton_launch import INTERPRETED, tl
from kernels.spec import map_tensors

if INTERPRETED:
    from triton.runtime import interpreter as triton_interpreter

GUARD = 256  # elements before and after a guarded tensor; keeps 16-byte alignment
BF16_NAN = np.uint16(0x7FC0)  # the bits of bf16's NaN


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
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32).astype(np.uint64)  # room for the carry
    odd = (bits >> 16) & 1  # a tie goes to the even neighbour
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    narrow = np.where(np.isnan(values), BF16_NAN, rounded)
    return narrow.reshape(np.shape(values))


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
    """OutOfBounds unless every address that is not masked off lies in one of `_extents`."""
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))  # bytes
    addresses = np.asarray(pointers.data, dtype=np.uint64)
    if mask is not None:
        used = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
        addresses = addresses[used]
    addresses = addresses.ravel()
    if addresses.size == 0:
        return
    first, last = int(addresses.min()), int(addresses.max()) + int(size)
    if any(low <= first and last <= high for low, high in _extents):
        return  # all in one tensor
    inside = np.zeros(addresses.shape, dtype=bool)
    for low, high in _extents:
        after_low = addresses >= np.uint64(low)
        before_high = addresses + size <= np.uint64(high)
        inside |= after_low & before_high
    if inside.all():
        return
    first = int(addresses[~inside][0])
    low, high = _nearest_extent(first)
    raise OutOfBounds(
        f"{what} in program {grid}: {int((~inside).sum())} of {inside.size} addresses are outside "
        f"every tensor; the first is {first - low} bytes into one of {high - low} bytes"
    )


def _nearest_extent(address: int) -> tuple[int, int]:
    """The tensor of the launch that begins or ends nearest to an address."""

    def distance(extent: tuple[int, int]) -> int:
        low, high = extent
        return min(abs(address - low), abs(address - high))

    return min(_extents, key=distance)


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one of a tensor with any strides, both included."""
    if tensor.numel() == 0:
        return 0
    span = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        span += (size - 1) * stride
    return span


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the byte after its last."""
    low = tensor.data_ptr()
    return low, low + _span(tensor) * tensor.element_size()


def install() -> None:
    """Change the interpreter of this process, once."""
    builder = triton_interpreter.InterpreterBuilder
    if getattr(builder, "strict", False):
        return
    builder.strict = True
    _install_bf16()
    _install_products_and_sums()
    _install_checked_memory()
    _install_program_order()
    _install_shortcuts()


def _is_bf16(value: Any) -> bool:
    return value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _widened(value: Any) -> Any:
    """The handle of a tensor in fp32 where it is in bf16, else as it is."""
    if not _is_bf16(value):
        return value
    return triton_interpreter.TensorHandle(_widen(value.data), tl.float32)


def _rounded(result: np.ndarray) -> Any:
    """The handle of a result that was computed in fp32 of bf16 operands: bf16, or a truth value."""
    if result.dtype == bool:
        return triton_interpreter.TensorHandle(result, tl.int1)
    return triton_interpreter.TensorHandle(_narrow(result), tl.bfloat16)


def _install_bf16() -> None:
    """Casts and arithmetic of bf16: in fp32, rounded once after each operation."""
    builder = triton_interpreter.InterpreterBuilder
    handle = triton_interpreter.TensorHandle
    cast = builder.cast_impl
    fp_to_fp = builder.create_fp_to_fp
    unary = builder.unary_op
    binary = builder.binary_op
    ternary = builder.ternary_op

    def strict_cast(self, source, target):
        to_bf16 = target.scalar == tl.bfloat16
        if _is_bf16(source) and to_bf16:
            return source
        if to_bf16:
            single = np.asarray(source.data).astype(np.float32)
            return handle(_narrow(single), tl.bfloat16)
        return cast(self, _widened(source), target)

    def strict_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return strict_cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def strict_unary(self, value, op):
        if not _is_bf16(value):
            return unary(self, value, op)
        return _rounded(op(_widened(value).data))

    def strict_binary(self, left, right, op):
        if not _is_bf16(left):
            return binary(self, left, right, op)
        return _rounded(op(_widened(left).data, _widened(right).data))

    def strict_ternary(self, a, b, c, op):
        selects = op is np.where  # moves numbers: nothing is computed
        if selects or not (_is_bf16(b) and _is_bf16(c)):
            return ternary(self, a, b, c, op)
        return _rounded(op(_widened(a).data, _widened(b).data, _widened(c).data))

    builder.cast_impl = strict_cast
    builder.create_fp_to_fp = strict_fp_to_fp
    builder.unary_op = strict_unary
    builder.binary_op = strict_binary
    builder.ternary_op = strict_ternary


def _install_products_and_sums() -> None:
    """tl.dot and tl.sum in the order of `_total`; the limits that the compiler for NVIDIA has."""
    builder = triton_interpreter.InterpreterBuilder
    handle = triton_interpreter.TensorHandle
    reduce_sum = triton_interpreter.ReduceOps.sum

    def strict_dot(self, a, b, d, *rest):
        inner = a.data.shape[-1]
        kinds = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
        assert a.dtype.scalar in kinds, f"tl.dot of {a.dtype.scalar} is not written down here"
        assert inner >= 16, (
            f"tl.dot over {inner} elements does not compile for NVIDIA (16 at least)"
        )
        made = product(_widened(a).data, _widened(b).data, d.data.dtype)
        return handle(made + d.data, d.dtype.scalar)

    def strict_sum(self, value):
        if value.dtype.scalar in (tl.bfloat16, tl.float16):
            raise AssertionError(f"tl.sum of {value.dtype.scalar}: widen to fp32 first")
        if not value.dtype.is_floating():
            return reduce_sum(self, value)
        data = value.handle.data
        axis = self.axis  # None: all of them
        terms = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
        made = _total(np.array(terms, order="C"))  # of a copy
        if self.keep_dims:
            axes = tuple(range(data.ndim)) if axis is None else axis
            made = np.expand_dims(made, axes)
        return self.to_tensor(made, value.dtype)

    builder.create_dot = strict_dot
    triton_interpreter.ReduceOps.sum = strict_sum


def _undefined_lane(kind: Any) -> Any:
    """What a lane holds that is masked off without `other`: NaN, or the largest integer."""
    if kind == tl.bfloat16:
        return BF16_NAN
    dtype = triton_interpreter._get_np_dtype(kind)
    if dtype.kind == "f":
        return np.nan
    return np.iinfo(dtype).max if dtype.kind in "iu" else True


def _install_checked_memory() -> None:
    """Loads, stores and atomics whose addresses are checked; undefined lanes are poisoned."""
    builder = triton_interpreter.InterpreterBuilder
    handle = triton_interpreter.TensorHandle
    convert = triton_interpreter._implicit_cvt
    load = builder.create_masked_load
    store = builder.create_masked_store
    rmw = builder.create_atomic_rmw
    cas = builder.create_atomic_cas
    run = triton_interpreter.GridExecutor.__call__

    def noted(arg):
        tensor = getattr(arg, "base", arg)
        if isinstance(tensor, torch.Tensor):
            _extents.append(_extent(tensor))
        return convert(arg)

    def strict_load(self, pointers, mask, other, *args, **kwargs):
        _inside("load", pointers, mask, self.grid_idx)
        if other is None:
            kind = pointers.get_element_ty()
            dtype = triton_interpreter._get_np_dtype(kind)
            lanes = np.full(pointers.data.shape, _undefined_lane(kind), dtype=dtype)
            other = handle(lanes, kind)
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

    def strict_run(self, *args, **kwargs):
        _extents.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            _extents.clear()

    builder.create_masked_load = strict_load
    builder.create_masked_store = strict_store
    builder.create_atomic_rmw = strict_rmw
    builder.create_atomic_cas = strict_cas
    triton_interpreter._implicit_cvt = noted
    triton_interpreter.GridExecutor.__call__ = strict_run


def _install_program_order() -> None:
    """Programs in the opposite order inside `last_programs_first`."""
    builder = triton_interpreter.InterpreterBuilder
    set_program = builder.set_grid_idx

    def ordered_program(self, *index):
        if _backwards:
            index = [n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)]
        set_program(self, *index)

    builder.set_grid_idx = ordered_program


def _install_shortcuts() -> None:
    """What triton's interpreter does again and again to no effect, done once or not at all."""
    # Every sum, difference and product of integers is made once more in int64 and compared with the
    # limits of its type; `debug` alone would look at the comparison, and it is not set.
    builder = triton_interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    _install_known_types()
    _install_plain_calls()


def _install_known_types() -> None:
    """Types of blocks, and the dtypes that numpy has for them, are worked out once."""
    look_up = triton_interpreter._get_np_dtype
    work_out = tl.block_type.__init__
    dtypes: dict[str, np.dtype] = {}
    blocks: dict[tuple, tuple] = {}  # name of the elements, sizes -> attributes

    def numpy_dtype(kind):
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        if kind.name not in dtypes:
            dtypes[kind.name] = look_up(kind)
        return dtypes[kind.name]

    def make_block_type(self, element_ty, shape):
        sizes = [getattr(size, "value", size) for size in shape]
        key = (element_ty.name, *sizes)
        if key not in blocks:
            work_out(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    triton_interpreter._get_np_dtype = numpy_dtype
    tl.block_type.__init__ = make_block_type


def _install_plain_calls() -> None:
    """Functions that kernels call are called, no more.

    A launch replaces the functions of triton.language that its kernel sees, and every call of a
    function in it does so anew. They are taken back after the launch, but never those that triton's
    own functions see (triton.language.core): so once for each module of functions is enough.
    """
    prepared: set[str] = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            triton_interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise triton_interpreter.InterpreterError(repr(error)) from error

    triton_interpreter.InterpretedFunction.__call__ = call


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
    """NaN, the largest integer or True: no number that a kernel computes by chance."""
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def guarded(value: Any, buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`value` with each tensor in it moved to the middle of a larger buffer; structures walked.

    `buffers` collects (buffer, which of its elements are no tensor's) for `guards_intact`. The
    layout (strides) is kept.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        buffer = tensor.new_full((_span(tensor) + 2 * GUARD,), _undefined(tensor.dtype))
        inner = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
        inner.copy_(tensor)
        outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
        outside.as_strided(tensor.shape, tensor.stride(), GUARD).fill_(False)
        buffers.append((buffer, outside))
        return inner

    return map_tensors(moved, value)


def guards_intact(buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether nothing was written around the guarded tensors."""
    for buffer, outside in buffers:
        around = buffer[outside]
        if buffer.dtype.is_floating_point:
            untouched = around.isnan()
        else:
            untouched = around == _undefined(buffer.dtype)
        if not bool(untouched.all()):
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
        def make_poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.numel() == 0:
                return out
            size = (_span(out) + 2 * GUARD,)
            poison = _undefined(out.dtype)
            buffer = torch.full(size, poison, dtype=out.dtype, device=out.device)
            return buffer.as_strided(out.shape, out.stride(), GUARD)

        return make_poisoned

    for (owner, name), make in zip(makers, kept, strict=True):
        setattr(owner, name, poisoning(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(makers, kept, strict=True):
            setattr(owner, name, make)

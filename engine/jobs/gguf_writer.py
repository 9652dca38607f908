"""Writing a GGUF file: metadata by type, tensors one at a time in the number format asked for.

    F32, F16, BF16    the number rounded to the nearest of the format
    Q8_0              32 neighbours of a row share an fp16 scale s = max |x| / 127 and are stored as
                      8-bit integers round(x / s)

As in files of llama.cpp's own converter, norms stay F32, and a matrix whose rows are not a multiple
of 32 long is F16 in a Q8_0 file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.jobs.gguf_reader import optional
from model.durable import file_beside

BLOCK = 32  # numbers of a row that share a scale in Q8_0
# the number formats that are written -> general.file_type of such a file (llama.cpp's llama_ftype)
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
BYTES_OF_BLOCK = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "BF16": 2 * BLOCK, "Q8_0": 2 + BLOCK}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `values` makes its numbers when its turn has come."""

    name: str  # in the GGUF
    shape: tuple[int, ...]  # as numpy has it: the last axis is the fastest
    values: Callable[[], np.ndarray]  # fp32, of that shape


def write_gguf(
    out: Path, architecture: str, metadata: Mapping[str, Any], tensors: Iterable[Tensor], kind: str
) -> dict[str, str]:
    """Write the file `out`, beside its name first; one tensor is in memory at a time.

    architecture: llama.cpp's name of the model. kind: the number format of the matrices, a key of
    FILE_TYPES. A value of the metadata that is None is left out. Returns the format of every tensor
    by its name. ValueError where `out` exists, and for a number that is not finite in its format.
    """
    gguf = optional("gguf")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another name or delete it")
    tensors = list(tensors)
    formats = {tensor.name: format_of(tensor.shape, kind) for tensor in tensors}
    with file_beside(out) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        try:
            for key, value in metadata.items():
                if value is not None:
                    _add(writer, key, value)
            for tensor in tensors:
                stored = formats[tensor.name]
                size = math.prod(tensor.shape) * BYTES_OF_BLOCK[stored] // BLOCK
                kind_of_gguf = gguf.GGMLQuantizationType[stored]
                # fp32 here only says that `shape` counts numbers, not bytes
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), size, kind_of_gguf
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_stored(gguf, tensor, formats[tensor.name]))
        finally:
            writer.close()
    return formats


def format_of(shape: tuple[int, ...], kind: str) -> str:
    """The number format of a tensor of this shape in a file of that kind."""
    if len(shape) == 1:
        return "F32"
    if kind == "Q8_0" and shape[-1] % BLOCK != 0:
        return "F16"
    return kind


def summary(formats: Mapping[str, str], out: Path) -> str:
    """How many tensors a file has in each format, and its size."""
    counts = Counter(formats.values())
    listed = ", ".join(f"{count} tensors in {kind}" for kind, count in sorted(counts.items()))
    return f"{listed}, {out.stat().st_size / 1e6:,.1f} MB"


def _stored(gguf: Any, tensor: Tensor, kind: str) -> np.ndarray:
    """The numbers of a tensor in their format; ValueError where one is not finite there."""
    values = np.ascontiguousarray(tensor.values(), dtype=np.float32)
    assert values.shape == tensor.shape, f"{tensor.name}: {values.shape}, said {tensor.shape}"
    if not np.isfinite(values).all():
        raise ValueError(f"{tensor.name} holds numbers that are NaN or infinite")
    if kind == "F32":
        return values
    # a scale of Q8_0 is an fp16 number too
    largest = float(np.abs(values).max(initial=0.0))
    limit = float(np.finfo(np.float16).max)
    if kind == "Q8_0":
        limit *= 127
    if kind != "BF16" and largest > limit:
        raise ValueError(
            f"{tensor.name} holds {largest:.4g}, beyond {kind}'s largest number ({limit:.4g}); "
            "use --type bf16"
        )
    if kind == "F16":
        return values.astype(np.float16)
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def _add(writer: Any, key: str, value: Any) -> None:
    """Add one value of the metadata under the GGUF type of its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

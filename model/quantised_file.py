"""The quantised matrices of a GGUF, kept beside the fp32 weights that were made of them

An imported directory has `model.gguf_blocks` (FILE): the blocks of every matrix in one of the
FORMATS of ggml_blocks.py, as they stand in the GGUF, under its Hugging Face name and in its order
of rows. It is a safetensors file of U8 tensors (N, bytes of a row) whose metadata name each one's
format. Its name ends otherwise, so that no program takes it for weights. It holds nothing that
model.safetensors does not: without it, sampling gives the same texts from more memory.
"""

# N = rows of a matrix, K = its columns

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernels.cpu.quantised_panels import Quantised, stacked
from model.config import LlamaConfig
from model.ggml_blocks import FORMATS, quantised
from model.hf_checkpoint import open_safetensors
from model.layout import checkpoint_shapes, place_of

FILE = "model.gguf_blocks"


@dataclass(frozen=True)
class QuantisedFile:
    """The file of a model directory; its matrices by our names (model/layout.py)."""

    path: Path
    members: dict[str, tuple[str, ...]]  # our name -> the tensors of a matrix, in order of rows
    formats: dict[str, str]  # tensor -> name of its format

    def matrix(self, name: str) -> Quantised | None:
        """A matrix (N, K) by our name; None where the file lacks it or a part of it, or is gone."""
        members = self.members.get(name, ())
        if not members or any(member not in self.formats for member in members):
            return None
        if not self.path.exists():
            return None
        parts = []
        with open_safetensors(self.path) as opened:
            for member in members:
                rows = opened.get_tensor(member)  # (N, bytes of a row)
                parts.append(quantised(rows, self.formats[member]))
        return stacked(parts)


def find_quantised(directory: Path, config: LlamaConfig) -> QuantisedFile | None:
    """The quantised matrices of a model directory; None where it has none.

    config: of the model as it is loaded. ValueError for a file that is damaged or another model's.
    """
    path = directory / FILE
    if not path.exists():
        return None
    shapes = checkpoint_shapes(config)
    formats = {}
    with open_safetensors(path) as opened:
        metadata = opened.metadata() or {}
        for name in opened.keys():
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            reason = _why_unusable(shape, stored.get_dtype(), metadata.get(name), shapes.get(name))
            if reason is not None:
                raise ValueError(
                    f"{path}: {name} {reason}; import the GGUF again, or delete this file (the "
                    "weights are in model.safetensors too)"
                )
            formats[name] = metadata[name]
    members: dict[str, tuple[str, ...]] = {}
    for name in shapes:  # members of a group in the order of its rows
        ours = place_of(name, config).name
        members[ours] = (*members.get(ours, ()), name)
    if config.tie_embeddings:
        members["head"] = members["embed"]
    return QuantisedFile(path, members, formats)


def _why_unusable(
    shape: tuple[int, ...], dtype: str, format_name: str | None, wanted: tuple[int, ...] | None
) -> str | None:
    """Why a stored tensor is not the matrix of shape `wanted` in its format; None if it is."""
    if wanted is None or len(wanted) != 2:
        return "is no matrix of a model of this config.json"
    if format_name not in FORMATS:
        return f"has the format {format_name!r}; expected one of {', '.join(FORMATS)}"
    form = FORMATS[format_name]
    row_bytes = wanted[1] // form.numbers * form.size
    if dtype != "U8" or shape != (wanted[0], row_bytes):
        return f"is {dtype} {shape}; expected U8 {(wanted[0], row_bytes)} in {format_name}"
    return None

"""Checkpoints on disk: safetensors only, unfused Hugging Face names, one file or shards.

`locate` finds every tensor of a model directory and compares names, shapes and dtypes with
config.json. A checkpoint may state a fact twice; both statements are compared. A head stored beside
tied embeddings is used where it differs from them, as transformers 5 does; stored rotary tables
must equal those that follow from config.json.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import LlamaConfig, read_json
from model.file_checks import check_file
from model.layout import EMBEDDING, HEAD, checkpoint_shapes
from model.rope import why_table_differs

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
ROTARY_TABLES = ("inv_freq", "cos_cached", "sin_cached")  # of rotary_emb, in old checkpoints
ROWS_AT_ONCE = 4096  # rows of a matrix that are read and compared at a time


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator:
    """`safe_open` whose failures name the file."""
    check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: model.safetensors, or the shards."""
    index = path / INDEX
    if (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    elif index.exists():
        files = [path / name for name in _shards(index)]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [*sorted(path.glob("*.bin")), *sorted(path.glob("*.pt*"))]
        if pickles:
            raise ValueError(
                f"{path} has only pickled weights ({pickles[0].name}, ...); expected *.safetensors "
                "files (pickles can run code and are never opened: convert them)"
            )
        raise ValueError(f"{path} has no weights; expected *.safetensors files")
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing, though {INDEX} names it")
    return files


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists; ValueError for one in another directory."""
    table = read_json(index).get("weight_map")
    if not table or not isinstance(table, dict):
        raise ValueError(f"{index} has no weight_map")
    for tensor, name in table.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise ValueError(
                f"{index}: weight_map puts {tensor} into {name!r}; expected the plain name of a "
                "file in the same directory"
            )
    return sorted(set(table.values()))


def _is_plain_name(name: str) -> bool:
    """Whether a file of this name lies in the directory itself."""
    if name in ("", ".", ".."):
        return False
    return not any(separator in name for separator in ("/", "\\", "\0"))


class StoredTensor(NamedTuple):
    """Where a tensor is on disk."""

    file: Path
    name: str  # in that file


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, checked."""

    config: LlamaConfig  # of config.json; tie_embeddings as the tensors show it, quantised empty
    files: dict[str, StoredTensor]  # checkpoint name -> its place on disk

    @property
    def directory(self) -> Path:
        """The model's directory: all its tensors lie in it."""
        return self.files[EMBEDDING].file.parent

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of a tensor, in the dtype in which it is stored."""
        stored = self.files[name]
        return read_rows(stored.file, stored.name, first, end)


def locate(path: Path, config: LlamaConfig) -> Checkpoint:
    """Where every tensor lies, after comparing names, shapes and dtypes with the config.

    Where the tensors contradict config.json harmlessly, that is printed and the tensors are
    followed. ValueError names the first tensor or file that cannot be used.
    """
    files = checkpoint_files(path)
    places = _find_tensors(path, config, files)
    if config.tie_embeddings and HEAD in places:
        config, places = _resolve_tied_head(path, config, places)
    shapes = checkpoint_shapes(config)
    missing = [name for name in shapes if name not in places]
    if missing:
        where = str(files[0]) if len(files) == 1 else f"the {len(files)} files of {path}"
        first = missing[0]
        reason = (
            f"{where}: {len(missing)} tensors of a model of this config.json are missing, first "
            f"{first} {shapes[first]}"
        )
        raise _unusable(path, config, reason)
    if config.window > 0:
        print(
            f"weights: {path / 'config.json'} has a sliding window of {config.window:,} tokens: "
            "rows up to that length are computed as the model does, longer ones are refused"
        )
    if config.quantised:
        print(
            f"weights: {path / 'config.json'} has a quantization_config ({config.quantised}), but "
            "every tensor is a plain one in F32, F16 or BF16: used as they are stored; delete "
            "quantization_config"
        )
    return Checkpoint(replace(config, quantised=""), places)


def _find_tensors(path: Path, config: LlamaConfig, files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name; ValueError for one that the model does not have."""
    shapes = checkpoint_shapes(replace(config, tie_embeddings=False))  # a head may always be stored
    places: dict[str, StoredTensor] = {}
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():
                _, _, last_part = name.rpartition(".")
                if "rotary_emb." in name and last_part in ROTARY_TABLES:
                    _check_table(file, name, opened.get_tensor(name), config)
                    continue
                if name in places:
                    raise ValueError(f"{name} is in both {places[name].file} and {file}")
                stored = opened.get_slice(name)
                shape = tuple(stored.get_shape())
                reason = _why_unusable(file, name, shape, stored.get_dtype(), shapes)
                if reason is not None:
                    raise _unusable(path, config, reason)
                places[name] = StoredTensor(file, name)
    return places


def _unusable(path: Path, config: LlamaConfig, reason: str) -> ValueError:
    """The error for a tensor that cannot be used; of a quantised checkpoint it says so first."""
    if config.quantised:
        return ValueError(
            f"{path}: the checkpoint is quantised ({config.quantised}); use the original in "
            f"F32, F16 or BF16 safetensors ({reason})"
        )
    return ValueError(reason)


def _why_unusable(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
) -> str | None:
    """Why a stored tensor is not one of the model's, None if it is; `shapes` are the model's."""
    if name not in shapes:
        return f"{file} holds {name} {shape}, which a model of this config.json does not have"
    if shape != shapes[name]:
        return f"{file}: {name} is {shape}, but config.json asks for {shapes[name]}"
    if dtype not in DTYPES:
        return (
            f"{file}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)} (quantised "
            "checkpoints are not supported)"
        )
    return None


def _resolve_tied_head(
    path: Path, config: LlamaConfig, places: dict[str, StoredTensor]
) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Config and places of a model whose config.json states tied embeddings, but stores a head.

    The head is left out where it equals the embedding, else the embeddings are not tied.
    """
    without_head = {name: place for name, place in places.items() if name != HEAD}
    if EMBEDDING not in places:  # the tied matrix is stored under its other name
        return config, without_head | {EMBEDDING: places[HEAD]}
    stored = Checkpoint(config, places)
    for first in range(0, config.vocab_size, ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, config.vocab_size)
        embedding = stored.rows(EMBEDDING, first, end).float()  # (rows, D)
        head = stored.rows(HEAD, first, end).float()  # (rows, D)
        if not torch.equal(embedding, head):
            print(
                f"weights: {path / 'config.json'} says tie_word_embeddings, but {HEAD} is stored "
                "and differs from the embeddings: the stored head is used; write "
                '"tie_word_embeddings": false there'
            )
            return replace(config, tie_embeddings=False), places
    return config, without_head


def _check_table(file: Path, name: str, table: Tensor, config: LlamaConfig) -> None:
    """ValueError where a stored rotary table is not the one that follows from config.json."""
    _, _, kind = name.rpartition(".")  # one of ROTARY_TABLES
    reason = why_table_differs(config, kind, table)
    if reason is not None:
        raise ValueError(
            f"{file}: {name} {reason}: the model was made with another rotation than config.json "
            "says (rope_theta, rope_scaling); mend config.json, or remove the table if it is wrong"
        )


def why_not_finite(rows: Tensor, name: str, file: Path) -> str | None:
    """A message naming the tensor where one of its numbers is NaN or infinite, else None."""
    # the sum, which is cheap, is not finite where any number is not; but it may also overflow
    if math.isfinite(rows.sum().item()) or rows.isfinite().all():
        return None
    count = rows.isfinite().logical_not().sum().item()
    return (
        f"{file}: {name} holds {count} numbers that are NaN or infinite; the file is damaged, "
        "or the training that made it diverged"
    )


def check_finite(rows: Tensor, name: str, file: Path) -> None:
    """ValueError with the message of `why_not_finite` where it has one."""
    reason = why_not_finite(rows, name, file)
    if reason is not None:
        raise ValueError(reason)


def read_rows(file: Path, name: str, first: int, end: int) -> Tensor:
    """Rows first .. end - 1 of a tensor, read from a memory map of the file.

    The map is released with the tensor that is returned.
    """
    with open_safetensors(file) as opened:
        return opened.get_slice(name)[first:end]

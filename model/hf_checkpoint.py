"""Checkpoints on disk: safetensors only, unfused Hugging Face names, one file or shards.

`locate` finds every tensor of a model directory and compares names, shapes and dtypes with
config.json. A checkpoint may state a fact twice; both statements are compared. A head stored beside
tied embeddings is used where it differs, as transformers 5 does; stored rotary tables must be the
ones that config.json makes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
        pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(
            p.name for p in path.glob("*.pt*")
        )
        contents = f"only pickled weights ({pickles[0]}, ...)" if pickles else "no weights"
        raise ValueError(
            f"{path} has {contents}; expected *.safetensors files"
            + (" (pickles can run code and are never opened: convert them)" if pickles else "")
        )
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing, though {INDEX} names it")
    return files


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists; all of them must lie beside it."""
    table = read_json(index).get("weight_map")
    if not table or not isinstance(table, dict):
        raise ValueError(f"{index} has no weight_map")
    for tensor, name in table.items():
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise ValueError(
                f"{index}: weight_map puts {tensor} into {name!r}; expected the plain name of a "
                "file in the same directory"
            )
    return sorted(set(table.values()))


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, checked."""

    config: LlamaConfig  # of config.json; tie_embeddings as the tensors show it, quantised empty
    files: dict[str, tuple[Path, str]]  # checkpoint name -> file, and name in that file

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of a tensor as it is stored."""
        file, stored = self.files[name]
        return read_rows(file, stored, first, end)


def locate(path: Path, config: LlamaConfig) -> Checkpoint:
    """Where every tensor lies, once names, shapes and dtypes are as the config states.

    A statement of config.json that the tensors contradict harmlessly is printed, and the tensors
    are followed. ValueError names the first tensor or file that cannot be used.
    """
    shapes = checkpoint_shapes(replace(config, tie_embeddings=False))  # a head may always be stored
    places: dict[str, tuple[Path, str]] = {}

    def refuse(reason: str) -> ValueError:
        if config.quantised:
            return ValueError(
                f"{path}: the checkpoint is quantised ({config.quantised}); use the original in "
                f"F32, F16 or BF16 safetensors ({reason})"
            )
        return ValueError(reason)

    files = checkpoint_files(path)
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():
                if "rotary_emb." in name and name.rpartition(".")[2] in ROTARY_TABLES:
                    _check_table(file, name, opened.get_tensor(name), config)
                    continue
                if name in places:
                    raise ValueError(f"{name} is in both {places[name][0]} and {file}")
                stored = opened.get_slice(name)
                shape = tuple(stored.get_shape())
                reason = _why_unusable(file, name, shape, stored.get_dtype(), shapes)
                if reason is not None:
                    raise refuse(reason)
                places[name] = file, name
    if config.tie_embeddings and HEAD in places:
        config, places = _resolve_tied_head(path, config, places)
    missing = [name for name in checkpoint_shapes(config) if name not in places]
    if missing:
        where = str(files[0]) if len(files) == 1 else f"the {len(files)} files of {path}"
        raise refuse(
            f"{where}: {len(missing)} tensors of a Llama of this config.json are missing, first "
            f"{missing[0]} {shapes[missing[0]]}"
        )
    if config.quantised:
        print(
            f"weights: {path / 'config.json'} has a quantization_config ({config.quantised}), but "
            "every tensor is a plain one in F32, F16 or BF16: used as they are stored; delete "
            "quantization_config"
        )
    return Checkpoint(replace(config, quantised=""), places)


def _why_unusable(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
) -> str | None:
    """Why a stored tensor is not one of the model's, None where it is; `shapes` are the model's."""
    if name not in shapes:
        return f"{file} holds {name} {shape}, which a Llama of this config.json does not have"
    if shape != shapes[name]:
        return f"{file}: {name} is {shape}, but config.json asks for {shapes[name]}"
    if dtype not in DTYPES:
        return (
            f"{file}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)} (quantised "
            "checkpoints are not supported)"
        )
    return None


def _resolve_tied_head(
    path: Path, config: LlamaConfig, places: dict[str, tuple[Path, str]]
) -> tuple[LlamaConfig, dict[str, tuple[Path, str]]]:
    """Config and places of a model whose config.json states tied embeddings, but whose head is
    stored: the head is dropped where it equals the embedding, else the embeddings are not tied."""
    other_places = {name: place for name, place in places.items() if name != HEAD}
    if EMBEDDING not in places:  # one matrix, under the other of its two names
        return config, other_places | {EMBEDDING: places[HEAD]}
    stored = Checkpoint(config, places)
    for first in range(0, config.vocab_size, ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, config.vocab_size)
        embedding = stored.rows(EMBEDDING, first, end).float()
        head = stored.rows(HEAD, first, end).float()
        if not torch.equal(embedding, head):
            print(
                f"weights: {path / 'config.json'} says tie_word_embeddings, but {HEAD} is stored "
                "and differs from the embeddings: the stored head is used; write "
                '"tie_word_embeddings": false there'
            )
            return replace(config, tie_embeddings=False), places
    return config, other_places


def _check_table(file: Path, name: str, table: Tensor, config: LlamaConfig) -> None:
    """ValueError where a stored rotary table is not the one that config.json makes."""
    reason = why_table_differs(config, name.rpartition(".")[2], table)
    if reason is not None:
        raise ValueError(
            f"{file}: {name} {reason}: the model was made with another rotation than config.json "
            "says (rope_theta, rope_scaling); mend config.json, or remove the table if it is wrong"
        )


def why_not_finite(rows: Tensor, name: str, file: Path) -> str | None:
    """A message naming the tensor where one of its numbers is NaN or infinite, else None.

    A sum is NaN or infinite where any number is, and is cheap; single numbers are looked at only
    then.
    """
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
    """Rows first .. end - 1 of a tensor, read from the map; the map goes when the tensor does."""
    with open_safetensors(file) as opened:
        return opened.get_slice(name)[first:end]

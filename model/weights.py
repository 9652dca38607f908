"""Checkpoints on disk: safetensors only, unfused Hugging Face names, one file or shards.

Reading goes tensor by tensor, largest first, each file opened anew, so that the pages of the map
are released at once and the peak stays near the size of the loaded model.

What a checkpoint says twice is compared. A head stored beside tied embeddings is used where it
differs, as transformers 5 does; stored rotary tables must be the ones that config.json makes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import LlamaConfig, read_json
from model.durable import put_in_place, writing
from model.files import check_file, leads_out
from model.rope import differing_table

if TYPE_CHECKING:
    from model.sharded import ShardedWeights

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = ("inv_freq", "cos_cached", "sin_cached")  # of rotary_emb, in old checkpoints
COMPARED = 4096  # rows of a matrix, compared at a time


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name."""
    d, f = config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    for i in range(config.num_layers):
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (k, d),
            "self_attn.v_proj": (v, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, d)
    return shapes


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
        found = f"only pickled weights ({pickles[0]}, ...)" if pickles else "no weights"
        raise ValueError(
            f"{path} has {found}; *.safetensors files were wanted"
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
                f"{index}: weight_map puts {tensor} into {name!r}; the plain name of a file in the "
                "same directory was wanted"
            )
    return sorted(set(table.values()))


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose tensors are as its config.json says, or better known."""

    config: LlamaConfig  # tie_embeddings is what the tensors say, `quantised` is empty
    files: dict[str, tuple[Path, str]]  # of every tensor: its file and its name there

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of a tensor as it is stored."""
        file, stored = self.files[name]
        return read_rows(file, stored, first, end)


def locate(path: Path, config: LlamaConfig) -> Checkpoint:
    """Where every tensor lies, once names, shapes and dtypes are as the config says.

    What departs from config.json and is used all the same is printed.
    """
    want = expected_shapes(replace(config, tie_embeddings=False))  # a head may always be stored
    found: dict[str, tuple[Path, str]] = {}

    def refuse(words: str) -> ValueError:
        if config.quantised:
            return ValueError(
                f"{path}: the checkpoint is quantised ({config.quantised}); use the original in "
                f"F32, F16 or BF16 safetensors ({words})"
            )
        return ValueError(words)

    files = checkpoint_files(path)
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():
                if "rotary_emb." in name and name.rpartition(".")[2] in TABLES:
                    _check_table(file, name, opened.get_tensor(name), config)
                    continue
                stored = opened.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if name in found:
                    raise ValueError(f"{name} is in both {found[name][0]} and {file}")
                if name not in want:
                    raise refuse(
                        f"{file} holds {name} {shape}, which a Llama of this config.json does not "
                        "have"
                    )
                if shape != want[name]:
                    raise refuse(
                        f"{file}: {name} is {shape}, but config.json asks for {want[name]}"
                    )
                if dtype not in DTYPES:
                    raise refuse(
                        f"{file}: {name} is stored as {dtype}; one of {', '.join(DTYPES)} was "
                        "wanted (quantised checkpoints are not supported)"
                    )
                found[name] = file, name
    if config.tie_embeddings and HEAD in found:
        config = _tied(path, config, found)
    missing = [name for name in expected_shapes(config) if name not in found]
    if missing:
        where = str(files[0]) if len(files) == 1 else f"the {len(files)} files of {path}"
        raise refuse(
            f"{where}: {len(missing)} tensors of a Llama of this config.json are missing, first "
            f"{missing[0]} {want[missing[0]]}"
        )
    if config.quantised:
        print(
            f"weights: {path / 'config.json'} has a quantization_config ({config.quantised}), but "
            "every tensor is a plain one in F32, F16 or BF16: used as they are stored; delete "
            "quantization_config"
        )
    return Checkpoint(replace(config, quantised=""), found)


def _tied(path: Path, config: LlamaConfig, found: dict[str, tuple[Path, str]]) -> LlamaConfig:
    """The config of a model that is said to be tied and has a head stored; mends `found`."""
    if EMBEDDING not in found:  # one matrix, under the other of its two names
        found[EMBEDDING] = found.pop(HEAD)
        return config
    stored = Checkpoint(config, found)
    for first in range(0, config.vocab_size, COMPARED):
        end = min(first + COMPARED, config.vocab_size)
        embedding, head = (stored.rows(name, first, end).float() for name in (EMBEDDING, HEAD))
        if not torch.equal(embedding, head):
            print(
                f"weights: {path / 'config.json'} says tie_word_embeddings, but {HEAD} is stored "
                "and differs from the embeddings: the stored head is used; write "
                '"tie_word_embeddings": false there'
            )
            return replace(config, tie_embeddings=False)
    del found[HEAD]
    return config


def _check_table(file: Path, name: str, table: Tensor, config: LlamaConfig) -> None:
    """ValueError where a stored rotary table is not the one that config.json makes."""
    reason = differing_table(config, name.rpartition(".")[2], table)
    if reason is not None:
        raise ValueError(
            f"{file}: {name} {reason}: the model was made with another rotation than config.json "
            "says (rope_theta, rope_scaling); mend config.json, or remove the table if it is wrong"
        )


def check_finite(rows: Tensor, name: str, file: Path) -> None:
    """ValueError naming the tensor where one of its numbers is NaN or infinite.

    A sum is NaN or infinite where any number is, and costs least; only such a one is looked into.
    """
    if not math.isfinite(rows.sum().item()) and not rows.isfinite().all():
        count = rows.isfinite().logical_not().sum().item()
        raise ValueError(
            f"{file}: {name} holds {count} numbers that are NaN or infinite; the file is damaged, "
            "or the training that made it diverged"
        )


def read_rows(file: Path, name: str, first: int, end: int) -> Tensor:
    """Rows first .. end - 1 of a tensor, read from the map; the map goes when the tensor does."""
    with open_safetensors(file) as opened:
        return opened.get_slice(name)[first:end]


def load_weights(
    checkpoint: Checkpoint,
    device: str | torch.device,
    dtype: torch.dtype,
    shard: bool = False,
) -> dict[str, Tensor] | ShardedWeights:
    """All weights in `dtype`, q/k/v and gate/up concatenated:

    embed, norm, head and, for each layer i, i.attn_norm, i.qkv, i.o, i.mlp_norm, i.gate_up, i.down.
    With `shard` each process of the job reads and holds its rows alone (model/sharded.py).
    ValueError naming a tensor with a number that is NaN or infinite.
    """
    config, shapes = checkpoint.config, expected_shapes(checkpoint.config)
    places = {name: _place(name, config) for name in shapes}
    ours = {p[0]: (p[1] or shapes[name][0], *shapes[name][1:]) for name, p in places.items()}
    sharded, weights, fault = None, {}, None
    if shard:
        from model.sharded import ShardedWeights  # torch's FSDP takes a second to import

        sharded = ShardedWeights(ours, device, dtype)
    for name in sorted(shapes, key=lambda n: -torch.Size(shapes[n]).numel()):
        place, _, offset = places[name]
        if sharded is None and place not in weights:
            weights[place] = torch.empty(ours[place], device=device, dtype=dtype)
        for target, first in sharded.local(place) if shard else [(weights[place], 0)]:
            begin, end = max(offset, first), min(offset + shapes[name][0], first + len(target))
            if begin < end:
                copied = target[begin - first : end - first]
                copied.copy_(checkpoint.rows(name, begin - offset, end - offset))
                try:
                    check_finite(copied, name, checkpoint.files[name][0])
                except ValueError as error:
                    if sharded is None:
                        raise
                    fault = fault or str(error)
    if sharded is not None:
        sharded.refuse(fault)
        return sharded
    weights.setdefault("head", weights["embed"])
    return weights


def _place(name: str, config: LlamaConfig) -> tuple[str, int, int]:
    """(our name, rows of the concatenation or 0, first row in it) of a checkpoint tensor."""
    plain = {
        EMBEDDING: "embed",
        "model.norm.weight": "norm",
        HEAD: "head",
    }
    if name in plain:
        return plain[name], 0, 0
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    if module in QKV:
        i = QKV.index(module)
        return f"{layer}.qkv", sum(config.qkv_sizes), sum(config.qkv_sizes[:i])
    if module in GATE_UP:
        f = config.intermediate_size
        return f"{layer}.gate_up", 2 * f, f * GATE_UP.index(module)
    ours = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.o_proj": "o",
        "mlp.down_proj": "down",
    }
    return f"{layer}.{ours[module]}", 0, 0


@contextlib.contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` only when everything in it is written, on the disk.

    OSError names `out`, the cause and what helps where it cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another name or delete it")
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(out, beside):
            beside.mkdir(parents=True)
            yield beside
            mode = beside.stat().st_mode & 0o666  # safetensors shuts out everybody but the writer
            for file in beside.iterdir():
                if file.is_file():
                    file.chmod(mode)
            put_in_place(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def rewrite_checkpoint(
    source: Path,
    out: Path,
    change: Callable[[str, Tensor], Tensor],
    settings: dict[str, Any] | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
) -> list[str]:
    """Copy a model directory to `out`, each tensor passed through `change(name, tensor)`.

    Shards, names, dtypes and every other file stay as they are; one shard is in memory at a time.
    `settings` go into config.json (None removes a key); then `finish(directory)` may change what
    lies there before it appears as `out`. Returns what was not copied, with reasons: directories,
    weights in other forms, links out of the directory.
    """
    shards = checkpoint_files(source)
    with written_beside(out) as beside:
        for shard in shards:
            with open_safetensors(shard) as opened:
                metadata = opened.metadata()
                tensors = {}
                for name in opened.keys():
                    old = opened.get_tensor(name)
                    tensors[name] = change(name, old).to(old.dtype).contiguous()
            save_file(tensors, beside / shard.name, metadata=metadata or {"format": "pt"})
        left_out = []
        for file in sorted(set(source.iterdir()) - set(shards)):
            reason = _why_not_copied(file, sharded=source / "model.safetensors" not in shards)
            if reason is None:
                shutil.copyfile(file, beside / file.name)
            else:
                left_out.append(f"{file.name} ({reason})")
        if settings:
            config = read_json(source / "config.json") | settings
            config = {key: value for key, value in config.items() if value is not None}
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (beside / "config.json").write_text(text, encoding="utf-8")
        manifest = json.dumps({"merged_from": str(source.resolve())}, indent=1)
        (beside / "merge.json").write_text(manifest + "\n", encoding="utf-8")
        if finish is not None:
            finish(beside)
    return left_out


def _why_not_copied(file: Path, sharded: bool) -> str | None:
    """Why a file beside the shards does not go into a rewritten directory, None where it does."""
    target = leads_out(file)
    if target is not None:
        return f"a link to {target}"
    if file.is_dir():
        return "a directory"
    if not file.is_file():
        return "a broken link, a pipe or a device"
    if file.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt"):
        return "other weights, without the adapter"
    if file.name.endswith(".index.json") and not (sharded and file.name == INDEX):
        return "an index of other weights"
    return None

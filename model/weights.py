"""Checkpoints on disk: safetensors only, unfused Hugging Face names, one file or shards.

Reading goes tensor by tensor, largest first, each file opened anew, so that the pages of the map
are released at once and the peak stays near the size of the loaded model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import LlamaConfig, read_json
from model.durable import put_in_place, writing

if TYPE_CHECKING:
    from model.sharded import ShardedWeights

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name."""
    d, f = config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
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
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator:
    """`safe_open` whose failures name the file."""
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
        table = read_json(index).get("weight_map")
        if not table or not isinstance(table, dict):
            raise ValueError(f"{index} has no weight_map")
        files = [path / name for name in sorted(set(map(str, table.values())))]
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


def locate(path: Path, config: LlamaConfig) -> dict[str, Path]:
    """Name -> file of every tensor, once names, shapes and dtypes are as the config says."""
    want = expected_shapes(config)
    found: dict[str, Path] = {}
    files = checkpoint_files(path)
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old checkpoints carry this table; it follows from the config
                if name == "lm_head.weight" and config.tie_embeddings:
                    continue  # a second copy of the embeddings, which the config says to use
                stored = opened.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if name in found:
                    raise ValueError(f"{name} is in both {found[name]} and {file}")
                if name not in want:
                    raise ValueError(
                        f"{file} holds {name} {shape}, which a Llama of this config.json does not "
                        "have"
                    )
                if shape != want[name]:
                    raise ValueError(
                        f"{file}: {name} is {shape}, but config.json asks for {want[name]}"
                    )
                if dtype not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} is stored as {dtype}; one of {', '.join(DTYPES)} was "
                        "wanted (quantised checkpoints are not supported)"
                    )
                found[name] = file
    missing = [name for name in want if name not in found]
    if missing:
        where = str(files[0]) if len(files) == 1 else f"the {len(files)} files of {path}"
        raise ValueError(
            f"{where}: {len(missing)} tensors of a Llama of this config.json are missing, first "
            f"{missing[0]} {want[missing[0]]}"
        )
    return found


def read_rows(file: Path, name: str, first: int, end: int) -> Tensor:
    """Rows first .. end - 1 of a tensor, read from the map; the map goes when the tensor does."""
    with open_safetensors(file) as opened:
        return opened.get_slice(name)[first:end]


def load_weights(
    path: Path,
    config: LlamaConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    shard: bool = False,
) -> dict[str, Tensor] | ShardedWeights:
    """All weights in `dtype`, q/k/v and gate/up concatenated:

    embed, norm, head and, for each layer i, i.attn_norm, i.qkv, i.o, i.mlp_norm, i.gate_up, i.down.
    With `shard` each process of the job reads and holds its rows alone (model/sharded.py).
    """
    files, shapes = locate(path, config), expected_shapes(config)
    places = {name: _place(name, config) for name in shapes}
    ours = {p[0]: (p[1] or shapes[name][0], *shapes[name][1:]) for name, p in places.items()}
    sharded, weights = None, {}
    if shard:
        from model.sharded import ShardedWeights  # torch's FSDP takes a second to import

        sharded = ShardedWeights(ours, device, dtype)
    for name in sorted(files, key=lambda n: -torch.Size(shapes[n]).numel()):
        place, _, offset = places[name]
        if sharded is None and place not in weights:
            weights[place] = torch.empty(ours[place], device=device, dtype=dtype)
        for target, first in sharded.local(place) if shard else [(weights[place], 0)]:
            begin, end = max(offset, first), min(offset + shapes[name][0], first + len(target))
            if begin < end:
                rows = read_rows(files[name], name, begin - offset, end - offset)
                target[begin - first : end - first].copy_(rows)
    if sharded is not None:
        return sharded
    weights.setdefault("head", weights["embed"])
    return weights


def _place(name: str, config: LlamaConfig) -> tuple[str, int, int]:
    """(our name, rows of the concatenation or 0, first row in it) of a checkpoint tensor."""
    plain = {
        "model.embed_tokens.weight": "embed",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
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
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Copy a model directory to `out`, each tensor passed through `change(name, tensor)`.

    Shards, names, dtypes and every other file stay as they are; one shard is in memory at a time.
    `finish(directory)` may change what lies there before it appears as `out`.
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
        for file in sorted(source.iterdir()):
            skip = file.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt")
            if file.is_file() and not skip:
                shutil.copyfile(file, beside / file.name)
        manifest = json.dumps({"merged_from": str(source.resolve())}, indent=1)
        (beside / "merge.json").write_text(manifest + "\n", encoding="utf-8")
        if finish is not None:
            finish(beside)

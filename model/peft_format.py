"""Adapters on disk in PEFT's layout, which peft, vLLM and llama.cpp's converter read

    DIRECTORY/adapter_config.json          settings (model/peft_config.py)
    DIRECTORY/adapter_model.safetensors    A (r, K) and B (N, r) of every adapted module in fp32:
                                           base_model.model.MODULE.lora_A.weight, lora_B.weight

A file holds each module at its own rank and scale, as the settings state them. In memory the
modules of a group have one rank and one scale (model/lora.py), so loading fills lower ranks up with
zeros and scales B, and writing undoes both.
"""

# K = inputs of a linear layer, N = its outputs, r = rank

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import LlamaConfig
from model.durable import directory_beside
from model.file_checks import check_links
from model.hf_checkpoint import (
    ROWS_AT_ONCE,
    StoredTensor,
    check_finite,
    open_safetensors,
    read_rows,
)
from model.layout import EMBEDDING, GROUPS, HEAD, MODULES, module_name
from model.lora import Lora, LoraConfig, a_name, b_name
from model.peft_config import Patterns, read_peft_config

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."  # of every name in an adapter's file
# the end of a snapshot's path in the Hugging Face cache
CACHED = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})")
MAY_BE_COPIED = (EMBEDDING, HEAD)  # the base's matrices that peft may copy into an adapter's file

# ---- writing


def save_lora(lora: Lora, path: str | Path, base: str = "") -> None:
    """Make a PEFT adapter directory; `base` is the model's path, for PEFT to find it."""
    with directory_beside(Path(path)) as beside:
        write_lora(lora, beside, base)


def write_lora(lora: Lora, directory: Path, base: str) -> None:
    """Put adapter_model.safetensors and adapter_config.json into an existing directory."""
    assert lora.strength == 1, "an adapter is stored as it was trained; its strength is not part"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_named_base(base),
        "r": lora.config.rank,
        "lora_alpha": lora.config.alpha,
        "lora_dropout": lora.config.dropout,
        "target_modules": [module.split(".")[1] for module in lora.config.module_names()],
        "use_rslora": lora.config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **lora.patterns.stated,
    }
    tensors = {}
    for name, view in lora.views(lora.params).items():
        stored = _without_padding(lora, name, view.detach())
        tensors[f"{PREFIX}{name}"] = stored.float().cpu().contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")


def _named_base(base: str) -> dict[str, str]:
    """The base as adapter_config.json names it: by its path, or by its hub id and commit.

    The latter for a snapshot in the Hugging Face cache, whose path means nothing elsewhere.
    """
    match = CACHED.fullmatch("/".join(Path(base).parts[-3:]))
    if match is None:
        return {"base_model_name_or_path": str(base)}
    hub_id = f"{match['org']}/{match['name']}"
    return {"base_model_name_or_path": hub_id, "revision": match["commit"]}


def _without_padding(lora: Lora, name: str, view: Tensor) -> Tensor:
    """A (r, K) or B (N, r) at the module's own rank r and scale, of a view at its group's."""
    module, _, half = name.partition(".lora_")
    rank = lora.module_rank(module)
    if half.startswith("A"):
        return view[:rank]
    b = view[:, :rank]
    quotient = lora.module_scale(module) / lora.group_scale(module)
    return b if quotient == 1 else b / quotient


# ---- reading


def load_lora(path: str | Path) -> Lora:
    """Read a PEFT adapter directory.

    ValueError names a tensor that is not a LoRA matrix of Llama's linear layers, a setting of
    adapter_config.json that would change the result and is not computed here, and a tensor
    that holds NaN or an infinite number. Copies of the base's own embeddings are compared with
    them when the adapter is bound. A loaded adapter is for inference: training starts a new one.
    """
    path = Path(path)
    file = path / WEIGHTS
    check_links(path)
    if not file.exists():
        message = f"{file} is missing; expected a PEFT adapter directory"
        if (path / "adapter_model.bin").exists():
            message += " (adapter_model.bin is a pickle and is never opened)"
        raise ValueError(message)
    settings, patterns = read_peft_config(path / SETTINGS)
    tensors, copies = _read_tensors(file)
    adapted: dict[int, set[str]] = {}  # layer -> its adapted modules
    for name in tensors:
        layer, module = _layer_and_module(file, name)
        adapted.setdefault(layer, set()).add(module)
    adapted_anywhere = set().union(*adapted.values())
    config = LoraConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings["lora_dropout"]),
        modules=",".join(module for module in MODULES if module in adapted_anywhere),
        rslora=settings["use_rslora"],
    )
    shapes: dict[str, tuple[int, int]] = {}
    for layer in sorted(adapted):
        for members in GROUPS.values():
            ranks: dict[str, int] = {}  # full name of an adapted member -> its rank
            for member in members:
                if member in adapted[layer]:
                    module = module_name(layer, member)
                    ranks[module] = patterns.rank(module, config.rank)
            shapes |= _group_shapes(file, tensors, ranks)
    lora = Lora(config, shapes, patterns)
    lora.copies = copies
    _fill(lora, tensors, patterns)
    return lora


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, StoredTensor]]:
    """The adapter's tensors by their names in the file, and the copies of the base's matrices."""
    tensors: dict[str, Tensor] = {}
    copies: dict[str, StoredTensor] = {}  # by the checkpoint names of the base's matrices
    with open_safetensors(file) as opened:
        for name in opened.keys():
            base_name = _copy_of(name)
            if base_name is not None:
                copies[base_name] = StoredTensor(file, name)
                continue
            tensors[name] = opened.get_tensor(name)
            check_finite(tensors[name], name, file)
    if not tensors:
        raise ValueError(f"{file} holds no tensor of an adapter")
    return tensors, copies


def _layer_and_module(file: Path, name: str) -> tuple[int, str]:
    """(layer, module) of a tensor; ValueError where it is no LoRA matrix of a linear layer."""
    parts = name.removeprefix(PREFIX).split(".")  # model, layers, 3, self_attn, q_proj, lora_A, ...
    module = ".".join(parts[3:5])
    is_lora_matrix = (
        name.startswith(f"{PREFIX}model.layers.")
        and parts[2].isdecimal()
        and module in MODULES
        and parts[5:] in (["lora_A", "weight"], ["lora_B", "weight"])
    )
    if not is_lora_matrix:
        raise ValueError(
            f"{file}: {name} is not a LoRA matrix of a Llama linear layer "
            f"({PREFIX}model.layers.N.self_attn.q_proj.lora_A.weight and the like)"
        )
    return int(parts[2]), module


def _group_shapes(
    file: Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Shapes in memory of a group's tensors: all have the highest of the `ranks` of its modules.

    ValueError for a tensor that is missing or does not have its module's rank.
    """
    shapes: dict[str, tuple[int, int]] = {}
    highest = max(ranks.values(), default=0)
    for module, rank in ranks.items():
        name = a_name(module)
        _, inputs = _stored_shape(file, tensors, name, rank, rank_axis=0)  # (r, K)
        shapes[name] = (highest, inputs)
    for module, rank in ranks.items():
        name = b_name(module)
        outputs, _ = _stored_shape(file, tensors, name, rank, rank_axis=1)  # (N, r)
        shapes[name] = (outputs, highest)
    return shapes


def _stored_shape(
    file: Path, tensors: Mapping[str, Tensor], name: str, rank: int, rank_axis: int
) -> tuple[int, int]:
    """The shape of an A or B in the file; ValueError unless its axis `rank_axis` is `rank` long."""
    stored = PREFIX + name
    if stored not in tensors:
        raise ValueError(f"{file}: {stored} is missing")
    shape = tuple(tensors[stored].shape)
    if len(shape) != 2 or shape[rank_axis] != rank:
        raise ValueError(
            f"{file}: {stored} is {shape}, rank {rank} of adapter_config.json does not fit"
        )
    return shape


def _fill(lora: Lora, tensors: Mapping[str, Tensor], patterns: Patterns) -> None:
    """Put the file's tensors into the flat buffer, B times the quotient of scales."""
    if patterns.ranks or patterns.alphas:
        lora.params = lora.params.double()  # until it is bound: quotients of scales are exact
    for name, view in lora.views(lora.params).items():
        tensor = tensors[PREFIX + name]
        rows, columns = tensor.shape
        view[:rows, :columns] = tensor  # beyond them: zeros, up to the group's rank
        module, _, half = name.partition(".lora_")
        if half.startswith("B"):
            view.mul_(lora.module_scale(module) / lora.group_scale(module))


# ---- copies of the base's own matrices


def check_copies(
    lora: Lora,
    model: LlamaConfig,
    rows_of: Callable[[str], Iterable[tuple[Tensor, int]]],
) -> None:
    """ValueError where a copy of the base's own matrix differs from the base's.

    peft puts such copies into an adapter's file (save_embedding_layers). rows_of(name), for a
    checkpoint name, gives the base's rows (n, D) in parts, each with the number of its first row.
    """
    for name, copy in lora.copies.items():
        with open_safetensors(copy.file) as opened:
            shape = tuple(opened.get_slice(copy.name).get_shape())
        is_equal = shape == (model.vocab_size, model.hidden_size)
        if is_equal:
            is_equal = all(_equals_copy(rows, first, copy) for rows, first in rows_of(name))
        if not is_equal:
            raise ValueError(
                f"{copy.file}: {copy.name} {shape} is not the model's own {name}: it was trained, "
                "or the vocabulary extended, and only adapters of linear layers are supported; "
                "merge it into the model with peft (merge_and_unload) and use the merged model"
            )
        print(f"adapter: {copy.file} holds an unchanged copy of the model's {name}: ignored")


def _copy_of(name: str) -> str | None:
    """The checkpoint name of the base's matrix that a tensor of an adapter's file is a copy of.

    None where it is not such a copy.
    """
    if not name.startswith(PREFIX):
        return None
    base_name = name.removeprefix(PREFIX).replace(".base_layer.weight", ".weight")
    return base_name if base_name in MAY_BE_COPIED else None


def _equals_copy(rows: Tensor, first: int, copy: StoredTensor) -> bool:
    """Whether rows (n, D) of a matrix, from row `first` on, equal its copy in the coarser dtype."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        own = rows[start : start + ROWS_AT_ONCE]
        begin = first + start
        other = read_rows(copy.file, copy.name, begin, begin + len(own)).to(own.device)
        if torch.equal(other.to(own.dtype), own):
            continue
        if torch.equal(own.to(other.dtype), other):
            continue
        return False
    return True

"""Adapters on disk in PEFT's layout, which peft, vLLM and llama.cpp's converter read

    DIRECTORY/adapter_config.json          settings (model/peft_config.py)
    DIRECTORY/adapter_model.safetensors    A (r, K) and B (N, r) of every adapted module in fp32:
                                           base_model.model.MODULE.lora_A.weight, lora_B.weight

Written files are plain: one rank and one scale per module, as the settings state them. In memory a
group shares a rank and a scale (model/lora.py), so loading fills lower ranks up with zeros and
scales B, and writing undoes both.
"""

# K = inputs of a linear layer, N = its outputs, r = rank

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import LlamaConfig
from model.durable import directory_beside
from model.file_checks import check_links
from model.hf_checkpoint import ROWS_AT_ONCE, check_finite, open_safetensors, read_rows
from model.layout import EMBEDDING, GROUPS, HEAD, MODULES, module_name
from model.lora import Lora, LoraConfig, a_name, b_name
from model.peft_config import Patterns, read_peft_config

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MAY_BE_COPIED = (EMBEDDING, HEAD)  # of the base's matrices, by peft into an adapter's file

# ---- writing


def save_lora(lora: Lora, path: str | Path, base: str = "") -> None:
    """Make a PEFT adapter directory; `base` is the model's path, for PEFT to find it."""
    with directory_beside(Path(path)) as beside:
        write_lora(lora, beside, base)


def write_lora(lora: Lora, directory: Path, base: str) -> None:
    """Put adapter_model.safetensors and adapter_config.json into an existing directory."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
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
    tensors = {
        f"{PREFIX}{name}": _plain(lora, name, view.detach()).float().cpu().contiguous()
        for name, view in lora.views(lora.params).items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")


def _plain(lora: Lora, name: str, view: Tensor) -> Tensor:
    """A tensor without the zeros and the quotient of scales that its group adds."""
    module, _, half = name.partition(".lora_")
    rank = lora.module_rank(module)
    if half.startswith("A"):
        return view[:rank]
    quotient = lora.module_scale(module) / lora.group_scale(module)
    view = view[:, :rank]
    return view if quotient == 1 else view / quotient


# ---- reading


def load_lora(path: str | Path) -> Lora:
    """Read a PEFT adapter directory.

    ValueError names a tensor that is not a LoRA matrix of Llama's linear layers, a setting of
    adapter_config.json that would change the result and is not computed here, and a tensor
    that holds NaN or an infinite number. Copies of the base's own embeddings are compared with
    them when the adapter is bound. Loaded adapters are for use: training starts afresh.
    """
    path = Path(path)
    file = path / WEIGHTS
    check_links(path)
    if not file.exists():
        pickled = (path / "adapter_model.bin").exists()
        raise ValueError(
            f"{file} is missing; expected a PEFT adapter directory"
            + (" (adapter_model.bin is a pickle and is never opened)" if pickled else "")
        )
    numbers, patterns = read_peft_config(path / SETTINGS)
    tensors, copies = _read_tensors(file)
    places = {_place(file, name) for name in tensors}  # (layer, module)
    adapted = {module for _, module in places}
    config = LoraConfig(
        rank=numbers["r"],
        alpha=float(numbers["lora_alpha"]),
        dropout=float(numbers["lora_dropout"]),
        modules=",".join(module for module in MODULES if module in adapted),
        rslora=numbers["use_rslora"],
    )
    shapes: dict[str, tuple[int, int]] = {}
    for layer in sorted({layer for layer, _ in places}):
        for members in GROUPS.values():
            modules = [module_name(layer, m) for m in members if (layer, m) in places]
            ranks = {module: patterns.rank(module, config.rank) for module in modules}
            shapes |= _group_shapes(file, tensors, ranks)
    lora = Lora(config, shapes, patterns)
    lora.copies = copies
    _fill(lora, tensors, patterns)
    return lora


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, tuple[Path, str]]]:
    """The adapter's tensors by their names in the file, and where copies of the base's stand."""
    tensors, copies = {}, {}
    with open_safetensors(file) as opened:
        for name in opened.keys():
            base = _copy_of(name)
            if base is not None:
                copies[base] = file, name
                continue
            tensors[name] = opened.get_tensor(name)
            check_finite(tensors[name], name, file)
    if not tensors:
        raise ValueError(f"{file} holds no tensor of an adapter")
    return tensors, copies


def _place(file: Path, name: str) -> tuple[int, str]:
    """(layer, module) of a tensor; ValueError where it is no LoRA matrix of a linear layer."""
    parts = name.removeprefix(PREFIX).split(".")
    module = ".".join(parts[3:5])
    good = (
        name.startswith(f"{PREFIX}model.layers.")
        and parts[2].isdecimal()
        and module in MODULES
        and parts[5:] in (["lora_A", "weight"], ["lora_B", "weight"])
    )
    if not good:
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
    shapes = {}
    highest = max(ranks.values(), default=0)
    for a_or_b in (a_name, b_name):
        for module, rank in ranks.items():
            name = a_or_b(module)
            stored = PREFIX + name
            if stored not in tensors:
                raise ValueError(f"{file}: {stored} is missing")
            shape = tuple(tensors[stored].shape)
            rank_axis = 0 if a_or_b is a_name else 1
            if len(shape) != 2 or shape[rank_axis] != rank:
                raise ValueError(
                    f"{file}: {stored} is {shape}, rank {rank} of adapter_config.json does not fit"
                )
            shapes[name] = (highest, shape[1]) if a_or_b is a_name else (shape[0], highest)
    return shapes


def _fill(lora: Lora, tensors: Mapping[str, Tensor], patterns: Patterns) -> None:
    """Put the file's tensors into the flat buffer, B times the quotient of scales."""
    if patterns.ranks or patterns.alphas:
        lora.params = lora.params.double()  # until it is bound: quotients of scales are exact
    for name, view in lora.views(lora.params).items():
        tensor = tensors[PREFIX + name]
        view[: tensor.shape[0], : tensor.shape[1]] = tensor
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
    for name, (file, stored) in lora.copies.items():
        with open_safetensors(file) as opened:
            shape = tuple(opened.get_slice(stored).get_shape())
        fits = shape == (model.vocab_size, model.hidden_size)
        if not fits or not all(_is_copy(file, stored, *part) for part in rows_of(name)):
            raise ValueError(
                f"{file}: {stored} {shape} is not the model's own {name}: it was trained, or "
                "the vocabulary extended, and only adapters of linear layers are supported; "
                "merge it into the model with peft (merge_and_unload) and use the merged model"
            )
        print(f"adapter: {file} holds the model's own {name} as well, unchanged: passed over")


def _copy_of(name: str) -> str | None:
    """Which of the base's own matrices a tensor of an adapter's file is a copy of, if any."""
    plain = name.removeprefix(PREFIX).replace(".base_layer.weight", ".weight")
    return plain if name.startswith(PREFIX) and plain in MAY_BE_COPIED else None


def _is_copy(file: Path, stored: str, rows: Tensor, first: int) -> bool:
    """Whether rows of a matrix equal those of its copy, as far as the coarser dtype tells."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        own = rows[start : start + ROWS_AT_ONCE]
        copy = read_rows(file, stored, first + start, first + start + len(own)).to(own.device)
        if not torch.equal(copy.to(own.dtype), own) and not torch.equal(own.to(copy.dtype), copy):
            return False
    return True

"""LoRA adapters as data: one flat parameter buffer, one flat gradient buffer, named views

    y_i = W_i x + (alpha / rank) B_i A_i x        (Hu et al. 2021; rsLoRA: alpha / sqrt(rank))

Inside a group that shares its input (q, k, v; o; gate, up; down) the A matrices lie one below the
other, so that one (R, K) view serves the group. Layout of the flat buffer, layer by layer and group
by group:    A of every adapted member, then B of every adapted member.
On disk: PEFT's layout and names, so that peft and vLLM read what we write.

An adapter of others may give modules a rank and an alpha of their own (`rank_pattern`,
`alpha_pattern`) and leave layers out. Where members of a group differ, the lower ranks are filled
up with zeros, whose products and gradients are zeros, and B carries the quotient of the scales.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.lora_linear.group import LoraGroup
from model.config import LlamaConfig
from model.files import check_links
from model.peft_format import Patterns, read_peft_config
from model.weights import (
    COMPARED,
    EMBEDDING,
    HEAD,
    check_finite,
    open_safetensors,
    read_rows,
    written_beside,
)

GROUPS = {  # group -> members in the order of the fused weight
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(member for members in GROUPS.values() for member in members)
PRESETS = {
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
    "attention": MODULES[:4],
    "all": MODULES,
}
PEFT_PREFIX = "base_model.model."
LARGEST_RANK = 2**16  # no linear of a Llama has a larger side to fill
LARGEST_ALPHA = 10**9
COPIED = {EMBEDDING: "embed", HEAD: "head"}  # matrices of the base, and our names for them


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is, apart from its numbers."""

    rank: int = 8  # rank of the adapter: a larger one can learn more and takes more memory
    alpha: float = 16.0  # strength of the adapter: its update is scaled by alpha / rank
    dropout: float = 0.0  # share of the adapter's inputs that is set to 0 in training
    modules: str = "qv"  # adapted linear layers: qv (queries and values), attention, all, or names
    #   as in q_proj,up_proj
    rslora: bool = False  # scale the update by alpha / sqrt(rank) instead (rank-stabilised LoRA)
    seed: int = 0  # random seed of the adapter's first values and of dropout

    @property
    def scale(self) -> float:
        """s in y = Wx + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def module_names(self) -> tuple[str, ...]:
        """The adapted modules in layout order; ValueError for a name no Llama layer has."""
        if self.modules in PRESETS:
            return PRESETS[self.modules]
        short = {m.split(".")[1]: m for m in MODULES}
        names = [n.strip() for n in self.modules.split(",") if n.strip()]
        unknown = [n for n in names if n not in short and n not in MODULES]
        if unknown or not names:
            raise ValueError(
                f"modules {self.modules!r}: {unknown or 'nothing'} named; wanted one of "
                f"{', '.join(PRESETS)} or a list out of {', '.join(short)}"
            )
        chosen = {short.get(n, n) for n in names}
        return tuple(m for m in MODULES if m in chosen)

    def check(self) -> None:
        """ValueError for numbers that make no adapter."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: rank >= 1, "
                "alpha > 0 and 0 <= dropout < 1 are wanted"
            )
        if not self.alpha <= LARGEST_ALPHA or self.rank > LARGEST_RANK:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}: a rank of at most {LARGEST_RANK:,} and an "
                f"alpha of at most {LARGEST_ALPHA:,} are wanted"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a number of 64 bits is wanted")
        self.module_names()


def _sizes(config: LlamaConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """group -> (inputs, outputs of each member)."""
    d, f = config.hidden_size, config.intermediate_size
    return {
        "qkv": (d, config.qkv_sizes),
        "o": (config.qkv_sizes[0], (d,)),
        "gate_up": (d, (f, f)),
        "down": (f, (d,)),
    }


def adapter_shapes(config: LoraConfig, model: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Every adapter tensor (PEFT's name less its prefix) and its shape, in layout order."""
    shapes: dict[str, tuple[int, int]] = {}
    sizes, wanted = _sizes(model), config.module_names()
    for layer in range(model.num_layers):
        for group, members in GROUPS.items():
            k, outputs = sizes[group]
            stems = [
                (f"model.layers.{layer}.{m}", n)
                for m, n in zip(members, outputs, strict=True)
                if m in wanted
            ]
            shapes |= {f"{stem}.lora_A.weight": (config.rank, k) for stem, _ in stems}
            shapes |= {f"{stem}.lora_B.weight": (n, config.rank) for stem, n in stems}
    return shapes


class Lora:
    """One adapter: `init` makes a fresh one, `load` reads one.

    params  (P,) masters, fp32 (fp64 beside an fp64 model)      grads  (P,) the same dtype
    compute (P,) what the forward reads: params itself, or a copy in the model's dtype

    `bind` puts the buffers on a model's device and makes the views that its forward reads.
    `Llama.bind(lora)` does that for a model, and a forward for an adapter that is not bound yet.
    """

    def __init__(
        self,
        config: LoraConfig,
        shapes: dict[str, tuple[int, int]],
        patterns: Patterns | None = None,
    ) -> None:
        config.check()
        self.config, self.patterns = config, patterns or Patterns()
        self.copies: dict[str, tuple[Path, str]] = {}  # of the base's matrices: file and name there
        self.slots: dict[str, tuple[int, tuple[int, int]]] = {}  # name -> offset, shape
        size = 0
        for name, shape in shapes.items():
            self.slots[name] = (size, shape)
            size += shape[0] * shape[1]
        self.params = torch.zeros(size)
        self.compute = self.grads = self.params.new_empty(0)
        self.bound: tuple[LlamaConfig, torch.device, torch.dtype] | None = None
        self._groups: dict[tuple[int, str], LoraGroup] = {}

    @classmethod
    def init(
        cls,
        config: LoraConfig,
        model_config: LlamaConfig,
        device: str | torch.device,
        dtype: torch.dtype,  # of the model; the masters have at least fp32
    ) -> Lora:
        """A fresh adapter, bound: A uniform in +-1/sqrt(K) (PEFT's Kaiming form), B zero."""
        lora = cls(config, adapter_shapes(config, model_config))
        generator = torch.Generator().manual_seed(config.seed)
        for name, view in lora.views(lora.params).items():
            if ".lora_A." in name:
                bound = view.shape[1] ** -0.5
                view.copy_(torch.rand(view.shape, generator=generator) * (2 * bound) - bound)
        lora.bind(model_config, torch.device(device), dtype)
        return lora

    # ---- views

    def view(self, flat: Tensor, name: str) -> Tensor:
        """One tensor of a flat buffer of this layout."""
        offset, shape = self.slots[name]
        return flat[offset : offset + shape[0] * shape[1]].view(shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views (PEFT's names less its prefix) of a flat buffer of this layout."""
        return {name: self.view(flat, name) for name in self.slots}

    def check_fits(self, model: LlamaConfig) -> None:
        """ValueError naming the first tensor that a model of this shape does not have so."""
        sizes, modules = _sizes(model), self.config.module_names()
        want: dict[str, tuple[int, int]] = {}
        for layer in range(model.num_layers):
            for group, members in GROUPS.items():
                k, outputs = sizes[group]
                for member, n in zip(members, outputs, strict=True):
                    if member in modules:
                        stem = f"model.layers.{layer}.{member}"
                        a = f"{stem}.lora_A.weight"
                        rank = self.slots[a][1][0] if a in self.slots else self.config.rank
                        want |= {a: (rank, k), f"{stem}.lora_B.weight": (n, rank)}
        for name in {**want, **self.slots}:
            have = self.slots.get(name, (0, None))[1]
            if have is None and self.patterns.leaves_out(name.partition(".lora_")[0]):
                continue
            if have != want.get(name):
                raise ValueError(
                    f"the adapter's {name} is {have or 'missing'}, this model needs "
                    f"{want.get(name, 'none')}; was it made for another model?"
                )

    def check_copies(
        self, model: LlamaConfig, rows_of: Callable[[str], Iterable[tuple[Tensor, int]]]
    ) -> None:
        """ValueError where a copy of the base's own matrix differs from the base's.

        peft puts such copies into an adapter's file (save_embedding_layers). rows_of(name) gives
        the base's rows, in parts, each with the number of its first.
        """
        for name, (file, stored) in self.copies.items():
            with open_safetensors(file) as opened:
                shape = tuple(opened.get_slice(stored).get_shape())
            fits = shape == (model.vocab_size, model.hidden_size)
            if not fits or not all(_same(file, stored, *part) for part in rows_of(name)):
                raise ValueError(
                    f"{file}: {stored} {shape} is not the model's own {name}: it was trained, or "
                    "the vocabulary extended, and only adapters of linear layers are supported; "
                    "merge it into the model with peft (merge_and_unload) and use the merged model"
                )
            print(f"adapter: {file} holds the model's own {name} as well, unchanged: passed over")

    def bind(self, model_config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a model's device and dtype and make the views that its forward reads.

        ValueError where the shapes do not fit the model. Copies of the base's own matrices are
        compared by `Llama.bind`, which has them.
        """
        self.check_fits(model_config)
        master = accumulate_dtype(dtype)
        self.params = self.params.to(device, master)
        self.compute = self.params if dtype == master else self.params.to(dtype)
        self.grads = torch.zeros_like(self.params)
        self.bound = (model_config, device, dtype)
        self.make_groups(model_config)

    def make_groups(self, model: LlamaConfig) -> None:
        """The views that a forward reads and a backward adds into."""
        compute, grads = self.views(self.compute), self.views(self.grads)
        sizes = _sizes(model)
        self._groups = {}
        for layer in range(model.num_layers):
            for group, members in GROUPS.items():
                on = self._adapted(layer, group)
                if not on:
                    continue
                names = [f"model.layers.{layer}.{m}" for m in members]
                offset, (rank, k) = self.slots[f"{on[0]}.lora_A.weight"]
                rows = rank * len(on)
                span = slice(offset, offset + rows * k)  # the A matrices lie one below the other
                self._groups[layer, group] = LoraGroup(
                    a=self.compute[span].view(rows, k),
                    b=tuple(compute.get(f"{n}.lora_B.weight") for n in names),
                    da=self.grads[span].view(rows, k),
                    db=tuple(grads.get(f"{n}.lora_B.weight") for n in names),
                    sizes=sizes[group][1],
                    rank=rank,
                    scale=self._scale(on[0]),
                )

    def _adapted(self, layer: int, group: str) -> list[str]:
        """The modules of one group of one layer that have an adapter, by their whole names."""
        names = [f"model.layers.{layer}.{m}" for m in GROUPS[group]]
        return [n for n in names if f"{n}.lora_A.weight" in self.slots]

    def _rank(self, stem: str) -> int:
        """The rank of a module, which a group with higher ones fills up."""
        return self.patterns.rank(stem, self.config.rank)

    def _scale(self, stem: str) -> float:
        """s of a module."""
        alpha = self.patterns.alpha(stem, self.config.alpha)
        return dataclasses.replace(self.config, rank=self._rank(stem), alpha=alpha).scale

    def _group_scale(self, stem: str) -> float:
        """s of the group of an adapted module: that of the first one in it."""
        _, _, layer, module = stem.split(".", 3)
        group = next(g for g, members in GROUPS.items() if module in members)
        return self._scale(self._adapted(int(layer), group)[0])

    def group(self, layer: int, name: str) -> LoraGroup | None:
        """The adapters of one group of one layer, None where it has none."""
        return self._groups.get((layer, name))

    def delta(self, name: str) -> Tensor | None:
        """s B A (outputs, inputs) in the master dtype for a weight's name, None if not adapted."""
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in self.slots:
            return None
        a, b = (self.view(self.params, f"{stem}.lora_{half}.weight") for half in "AB")
        return self._group_scale(stem) * (b @ a)

    # ---- disk

    def save(self, path: str | Path, base: str = "") -> None:
        """Make a PEFT adapter directory; `base` is the model's path, for PEFT to find it."""
        with written_beside(Path(path)) as beside:
            self.write(beside, base)

    def write(self, path: Path, base: str) -> None:
        """Put adapter_model.safetensors and adapter_config.json into an existing directory."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": [m.split(".")[1] for m in self.config.module_names()],
            "use_rslora": self.config.rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            **self.patterns.said,
        }
        tensors = {
            f"{PEFT_PREFIX}{name}": self._as_read(name, view.detach()).float().cpu().contiguous()
            for name, view in self.views(self.params).items()
        }
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (path / "adapter_config.json").write_text(text, encoding="utf-8")

    def _as_read(self, name: str, view: Tensor) -> Tensor:
        """A tensor without the zeros and the quotient of scales that its group asks for."""
        stem, _, half = name.partition(".lora_")
        if half.startswith("A"):
            return view[: self._rank(stem)]
        quotient, view = self._scale(stem) / self._group_scale(stem), view[:, : self._rank(stem)]
        return view if quotient == 1 else view / quotient

    @classmethod
    def load(cls, path: str | Path) -> Lora:
        """Read a PEFT adapter directory.

        ValueError names what is not a LoRA of Llama's linear layers, every setting of
        adapter_config.json that would change the result and is not computed here, and a tensor
        that holds NaN or an infinite number. Copies of the base's own embeddings are compared with
        them when the adapter is bound. Loaded adapters are for use: training starts afresh.
        """
        path = Path(path)
        file = path / "adapter_model.safetensors"
        check_links(path)
        if not file.exists():
            pickled = (path / "adapter_model.bin").exists()
            raise ValueError(
                f"{file} is missing; a PEFT adapter directory is wanted"
                + (" (adapter_model.bin is a pickle and is never opened)" if pickled else "")
            )
        numbers, patterns = read_peft_config(path / "adapter_config.json")
        tensors, copies = {}, {}
        with open_safetensors(file) as opened:
            for name in opened.keys():
                if (base := _copied(name)) is not None:
                    copies[base] = file, name
                    continue
                tensors[name] = opened.get_tensor(name)
                check_finite(tensors[name], name, file)
        if not tensors:
            raise ValueError(f"{file} holds no tensor of an adapter")
        stems = {_stem(file, name) for name in tensors}
        adapted = {module for _, module in stems}
        config = LoraConfig(
            rank=numbers["r"],
            alpha=float(numbers["lora_alpha"]),
            dropout=float(numbers["lora_dropout"]),
            modules=",".join(m for m in MODULES if m in adapted),
            rslora=numbers["use_rslora"],
        )
        shapes = {}
        for layer in sorted({layer for layer, _ in stems}):
            for group in GROUPS.values():
                on = [f"model.layers.{layer}.{m}" for m in group if (layer, m) in stems]
                ranks = {stem: patterns.rank(stem, config.rank) for stem in on}
                for name in [f"{stem}.lora_{half}.weight" for half in "AB" for stem in on]:
                    if PEFT_PREFIX + name not in tensors:
                        raise ValueError(f"{file}: {PEFT_PREFIX + name} is missing")
                    shape, rank = tensors[PEFT_PREFIX + name].shape, ranks[name.split(".lora_")[0]]
                    if len(shape) != 2 or shape[0 if ".lora_A." in name else 1] != rank:
                        raise ValueError(
                            f"{file}: {PEFT_PREFIX + name} is {tuple(shape)}, rank {rank} of "
                            "adapter_config.json does not fit"
                        )
                    most = max(ranks.values())
                    shapes[name] = (most, shape[1]) if ".lora_A." in name else (shape[0], most)
        lora = cls(config, shapes, patterns)
        lora.copies = copies
        if patterns.ranks or patterns.alphas:
            lora.params = lora.params.double()  # until it is bound: quotients of scales are exact
        for name, view in lora.views(lora.params).items():
            tensor, stem = tensors[PEFT_PREFIX + name], name.split(".lora_")[0]
            view[: tensor.shape[0], : tensor.shape[1]] = tensor
            if ".lora_B." in name:
                view.mul_(lora._scale(stem) / lora._group_scale(stem))
        return lora


def _copied(name: str) -> str | None:
    """Which of the base's own matrices a tensor of an adapter's file is a copy of, if any."""
    plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.weight", ".weight")
    return plain if name.startswith(PEFT_PREFIX) and plain in COPIED else None


def _same(file: Path, stored: str, rows: Tensor, first: int) -> bool:
    """Whether rows of a matrix are those of its copy, as far as the coarser dtype tells."""
    for at in range(0, len(rows), COMPARED):
        own = rows[at : at + COMPARED]
        copy = read_rows(file, stored, first + at, first + at + len(own)).to(own.device)
        if not torch.equal(copy.to(own.dtype), own) and not torch.equal(own.to(copy.dtype), copy):
            return False
    return True


def _stem(file: Path, name: str) -> tuple[int, str]:
    """(layer, module) of a PEFT tensor name."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    module = ".".join(parts[3:5])
    good = (
        name.startswith(f"{PEFT_PREFIX}model.layers.")
        and parts[2].isdecimal()
        and module in MODULES
        and parts[5:] in (["lora_A", "weight"], ["lora_B", "weight"])
    )
    if not good:
        raise ValueError(
            f"{file}: {name} is not a LoRA matrix of a Llama linear layer "
            f"({PEFT_PREFIX}model.layers.N.self_attn.q_proj.lora_A.weight and the like)"
        )
    return int(parts[2]), module

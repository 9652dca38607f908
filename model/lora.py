"""LoRA adapters as data: one flat parameter buffer, one flat gradient buffer, named views

    y_i = W_i x + (alpha / rank) B_i A_i x        (Hu et al. 2021; rsLoRA: alpha / sqrt(rank))

Inside a group that shares its input (q, k, v; o; gate, up; down) the A matrices lie one below the
other, so that one (R, K) view serves the group. Layout of the flat buffer, layer by layer and group
by group:    A of every adapted member, then B of every adapted member.
On disk: PEFT's layout and names (model/peft_format.py).

An adapter made elsewhere may give modules a rank and an alpha of their own (`rank_pattern`,
`alpha_pattern`) and leave layers out. Where members of a group differ, the lower ranks are filled
up with zeros, whose products and gradients are zeros, and B carries the quotient of the scales.
"""

# P = numbers of the adapter, K = inputs of a linear layer, N = its outputs, r = rank
# R = ranks of a group's adapted members together

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.lora_linear.group import LoraGroup
from model.config import LlamaConfig
from model.layout import GROUP_OF, GROUPS, MODULES, group_shapes, module_name
from model.peft_config import Patterns

PRESETS = {
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
    "attention": MODULES[:4],
    "all": MODULES,
}
LARGEST_RANK = 2**16  # no linear of a Llama has a larger side to fill
LARGEST_ALPHA = 10**9


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter."""

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
                f"modules {self.modules!r}: {unknown or 'nothing'} named; expected one of "
                f"{', '.join(PRESETS)} or a list out of {', '.join(short)}"
            )
        chosen = {short.get(n, n) for n in names}
        return tuple(m for m in MODULES if m in chosen)

    def check(self) -> None:
        """ValueError for numbers that make no adapter."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: expected "
                "rank >= 1, alpha > 0 and 0 <= dropout < 1"
            )
        if not self.alpha <= LARGEST_ALPHA or self.rank > LARGEST_RANK:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}: expected a rank of at most "
                f"{LARGEST_RANK:,} and an alpha of at most {LARGEST_ALPHA:,}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected a number of 64 bits")
        self.module_names()


def a_name(module: str) -> str:
    """PEFT's name, less its prefix, of the A matrix (r, K) of a module by its whole name."""
    return f"{module}.lora_A.weight"


def b_name(module: str) -> str:
    """PEFT's name, less its prefix, of the B matrix (N, r) of a module by its whole name."""
    return f"{module}.lora_B.weight"


def adapter_shapes(config: LoraConfig, model: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Every adapter tensor (PEFT's name less its prefix) and its shape, in layout order."""
    shapes: dict[str, tuple[int, int]] = {}
    modules = config.module_names()
    for layer in range(model.num_layers):
        for group, shape in group_shapes(model).items():
            outputs = {
                module_name(layer, module): n
                for module, n in zip(GROUPS[group], shape.outputs, strict=True)
                if module in modules
            }
            shapes |= {a_name(module): (config.rank, shape.inputs) for module in outputs}
            shapes |= {b_name(module): (n, config.rank) for module, n in outputs.items()}
    return shapes


class Lora:
    """One adapter: `init` makes a fresh one, `load_lora` (model/peft_format.py) reads one.

    params  (P,) masters, fp32 (fp64 beside an fp64 model)      grads  (P,) the same dtype
    compute (P,) read by the forward: params itself, or a copy in the model's dtype

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
        # copies of the base's own matrices in the adapter's file: checkpoint name -> file and name
        self.copies: dict[str, tuple[Path, str]] = {}
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
        """ValueError naming the first tensor that does not fit a model of this shape."""
        needed = self._needed_shapes(model)
        for name in {**needed, **self.slots}:
            own = self.slots[name][1] if name in self.slots else None
            if own is None and self.patterns.leaves_out(name.partition(".lora_")[0]):
                continue
            if own != needed.get(name):
                raise ValueError(
                    f"the adapter's {name} is {own or 'missing'}, this model needs "
                    f"{needed.get(name, 'none')}; was it made for another model?"
                )

    def _needed_shapes(self, model: LlamaConfig) -> dict[str, tuple[int, int]]:
        """The shapes that a model asks for; ranks are this adapter's own, module by module."""
        shapes: dict[str, tuple[int, int]] = {}
        modules = self.config.module_names()
        for layer in range(model.num_layers):
            for group, shape in group_shapes(model).items():
                for short, n in zip(GROUPS[group], shape.outputs, strict=True):
                    if short not in modules:
                        continue
                    module = module_name(layer, short)
                    a, rank = a_name(module), self.config.rank
                    if a in self.slots:
                        rank = self.slots[a][1][0]
                    shapes |= {a: (rank, shape.inputs), b_name(module): (n, rank)}
        return shapes

    def bind(self, model_config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a model's device and dtype and make the views that its forward reads.

        ValueError where the shapes do not fit the model. Copies of the base's own matrices are
        compared by `Llama.bind`, which has the base's matrices.
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
        self._groups = {}
        for layer in range(model.num_layers):
            for group, shape in group_shapes(model).items():
                adapted = self._adapted(layer, group)
                if not adapted:
                    continue
                modules = [module_name(layer, module) for module in GROUPS[group]]
                offset, (rank, k) = self.slots[a_name(adapted[0])]
                ranks = rank * len(adapted)
                span = slice(offset, offset + ranks * k)  # the A matrices: one below the other
                self._groups[layer, group] = LoraGroup(
                    a=self.compute[span].view(ranks, k),
                    b=tuple(compute.get(b_name(module)) for module in modules),
                    da=self.grads[span].view(ranks, k),
                    db=tuple(grads.get(b_name(module)) for module in modules),
                    sizes=shape.outputs,
                    rank=rank,
                    scale=self.module_scale(adapted[0]),
                )

    def group(self, layer: int, name: str) -> LoraGroup | None:
        """The adapters of one group of one layer, None where it has none."""
        return self._groups.get((layer, name))

    def _adapted(self, layer: int, group: str) -> list[str]:
        """The modules of one group of one layer that have an adapter, by their whole names."""
        modules = [module_name(layer, module) for module in GROUPS[group]]
        return [module for module in modules if a_name(module) in self.slots]

    # ---- single modules, by their whole names

    def module_rank(self, module: str) -> int:
        """The rank r of a module; its group may fill it up to a higher one."""
        return self.patterns.rank(module, self.config.rank)

    def module_scale(self, module: str) -> float:
        """The scale s of a module: alpha / r, or alpha / sqrt(r)."""
        alpha = self.patterns.alpha(module, self.config.alpha)
        rank = self.module_rank(module)
        return dataclasses.replace(self.config, rank=rank, alpha=alpha).scale

    def group_scale(self, module: str) -> float:
        """The scale that the group of an adapted module uses: that of its first adapted member."""
        _, _, layer, short = module.split(".", 3)
        return self.module_scale(self._adapted(int(layer), GROUP_OF[short])[0])

    def delta(self, name: str) -> Tensor | None:
        """s B A (N, K) in the master dtype for a weight's name, None if it is not adapted."""
        module = name.removesuffix(".weight")
        if a_name(module) not in self.slots:
            return None
        a = self.view(self.params, a_name(module))  # (r, K)
        b = self.view(self.params, b_name(module))  # (N, r)
        return self.group_scale(module) * (b @ a)

"""LoRA adapters as data: one flat parameter buffer, one flat gradient buffer, named views

    y_i = W_i x + (alpha / rank) B_i A_i x        (Hu et al. 2021; rsLoRA: alpha / sqrt(rank))

In the flat buffer the layers follow each other, in a layer its groups (qkv, o, gate_up, down), and
in a group    A of every adapted member, then B of every adapted member.
The A matrices of a group, which read the same input, so lie one below the other: one (R, K) view
computes A x for all of them. On disk: PEFT's layout and names (model/peft_format.py).

An adapter made elsewhere may give modules a rank and an alpha of their own (`rank_pattern`,
`alpha_pattern`) and leave layers out. Where members of a group differ, the lower ranks are filled
up with zeros, whose products and gradients are zeros, and B is multiplied by the quotient of the
module's scale and the group's.

A trained adapter can be used at another strength (`Lora.scaled`):

    y_i = W_i x + strength (alpha / rank) B_i A_i x

At 0 this is the seed model, at 1 the trained one. Between them lies a straight line through the
weights (WiSE-FT, 2109.01903; for LoRA asked for in huggingface/peft#1940).
"""

# P = numbers of the adapter, K = inputs of a linear layer, N = its outputs, r = rank
# R = ranks of a group's adapted members together

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.lora_linear.group import LoraGroup
from model.config import LlamaConfig
from model.hf_checkpoint import StoredTensor
from model.layout import GROUP_OF, GROUPS, MODULES, GroupShape, group_shapes, module_name
from model.peft_config import Patterns

PRESETS = {
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
    "attention": MODULES[:4],
    "all": MODULES,
}
LARGEST_RANK = 2**16  # no linear of a Llama has a larger side to fill
LARGEST_ALPHA = 10**9
LARGEST_STRENGTH = 10.0  # above 1 the update is extrapolated: tenfold is far beyond any use


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
        """s in y = W x + s B A x."""
        if self.rslora:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank

    def module_names(self) -> tuple[str, ...]:
        """The adapted modules of a layer ("self_attn.q_proj"), in layout order.

        ValueError for a name that no layer of a Llama has.
        """
        if self.modules in PRESETS:
            return PRESETS[self.modules]
        by_short_name = {module.split(".")[1]: module for module in MODULES}  # "q_proj" -> module
        chosen = set()
        unknown = []
        for part in self.modules.split(","):
            name = part.strip()
            module = by_short_name.get(name, name)
            if module in MODULES:
                chosen.add(module)
            elif name:
                unknown.append(name)
        if unknown or not chosen:
            problem = "no module is named"
            if unknown:
                problem = f"a Llama layer has no {', '.join(unknown)}"
            raise ValueError(
                f"modules {self.modules!r}: {problem}; expected one of {', '.join(PRESETS)}, or a "
                f"list of {', '.join(by_short_name)}"
            )
        return tuple(module for module in MODULES if module in chosen)

    def check(self) -> None:
        """ValueError for a rank, alpha, dropout, seed or module name outside its range."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: expected "
                "rank >= 1, alpha > 0 and 0 <= dropout < 1"
            )
        if not self.alpha <= LARGEST_ALPHA or self.rank > LARGEST_RANK:  # "not <=": NaN too
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}: expected a rank of at most "
                f"{LARGEST_RANK:,} and an alpha of at most {LARGEST_ALPHA:,}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected a number of 64 bits")
        self.module_names()


def a_name(module: str) -> str:
    """PEFT's name, less its prefix, of the A matrix (r, K) of a module, given its full name."""
    return f"{module}.lora_A.weight"


def b_name(module: str) -> str:
    """PEFT's name, less its prefix, of the B matrix (N, r) of a module, given its full name."""
    return f"{module}.lora_B.weight"


def adapter_shapes(config: LoraConfig, model: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Every adapter tensor (PEFT's name less its prefix) and its shape, in layout order."""
    shapes: dict[str, tuple[int, int]] = {}
    adapted = config.module_names()
    for layer in range(model.num_layers):
        for group, shape in group_shapes(model).items():
            outputs: dict[str, int] = {}  # adapted module -> N
            for member, n in zip(GROUPS[group], shape.outputs, strict=True):
                if member in adapted:
                    outputs[module_name(layer, member)] = n
            for module in outputs:
                shapes[a_name(module)] = (config.rank, shape.inputs)
            for module, n in outputs.items():
                shapes[b_name(module)] = (n, config.rank)
    return shapes


def check_strength(strength: float) -> None:
    """ValueError unless it is a number from 0 to LARGEST_STRENGTH.

    A negative one would subtract what was learned ("task negation", 2212.04089). That is another
    method, and a minus sign here is more likely a mistake.
    """
    if not 0 <= strength <= LARGEST_STRENGTH:  # "not": NaN too
        raise ValueError(
            f"scale {strength:g}: expected a number from 0 (the model without the adapter) over 1 "
            f"(the adapter as it was trained) to {LARGEST_STRENGTH:g}"
        )


class Slot(NamedTuple):
    """Where a matrix lies in the flat buffers."""

    offset: int  # of its first number
    shape: tuple[int, int]


class Lora:
    """One adapter: `init` makes a fresh one, `load_lora` (model/peft_format.py) reads one.

    params   (P,) master parameters, fp32 (fp64 beside an fp64 model)
    grads    (P,) their gradients, in the same dtype
    compute  (P,) read by the forward: `params` itself, or a copy in the model's dtype

    `bind` puts the buffers on a model's device and makes the views that its forward reads.
    `Llama.bind(lora)` calls it, and so does a forward with an adapter that is not bound yet.
    `scaled` gives the same adapter at another strength, over the same buffers.
    """

    def __init__(
        self,
        config: LoraConfig,
        shapes: dict[str, tuple[int, int]],
        patterns: Patterns | None = None,
    ) -> None:
        config.check()
        self.config = config
        self.strength = 1.0  # factor of the whole update, beside the scales of the modules
        self.patterns = patterns or Patterns()
        # copies of the base model's own matrices in the adapter's file, by their checkpoint names
        self.copies: dict[str, StoredTensor] = {}
        self.slots: dict[str, Slot] = {}  # PEFT's name less its prefix -> place in the buffers
        size = 0
        for name, shape in shapes.items():
            self.slots[name] = Slot(size, shape)
            size += shape[0] * shape[1]
        self.params = torch.zeros(size)
        self.compute = self.params.new_empty(0)  # made by `bind`, as `grads` and `_groups` are
        self.grads = self.params.new_empty(0)
        self.bound: tuple[LlamaConfig, torch.device, torch.dtype] | None = None
        self._groups: dict[tuple[int, str], LoraGroup] = {}  # (layer, group) -> its views

    @classmethod
    def init(
        cls,
        config: LoraConfig,
        model_config: LlamaConfig,
        device: str | torch.device,
        dtype: torch.dtype,  # of the model; the master parameters are at least fp32
    ) -> Lora:
        """A fresh adapter, bound: A uniform in +-1/sqrt(K) (PEFT's Kaiming initialisation), B zero.

        ValueError for settings outside their range.
        """
        lora = cls(config, adapter_shapes(config, model_config))
        generator = torch.Generator().manual_seed(config.seed)
        for name, view in lora.views(lora.params).items():
            if ".lora_A." in name:
                limit = view.shape[1] ** -0.5
                uniform = torch.rand(view.shape, generator=generator)  # (r, K) in [0, 1)
                view.copy_(uniform * (2 * limit) - limit)
        lora.bind(model_config, torch.device(device), dtype)
        return lora

    def scaled(self, strength: float) -> Lora:
        """This adapter at `strength` times its own strength, over the same buffers: no copy.

        At 0 a forward and a merge give the seed model bit for bit, at 1 this adapter bit for bit.
        What is written into `params` later shows in both. For inference: training takes adapters at
        strength 1. ValueError for a strength outside 0 to LARGEST_STRENGTH.
        """
        check_strength(strength)
        other = copy.copy(self)
        other.strength = self.strength * strength
        if self.bound is not None:
            model, _, _ = self.bound
            other.make_groups(model)
        return other

    # ---- views

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The matrix `name` (PEFT's name less its prefix) of a flat buffer (P,), as a view."""
        offset, shape = self.slots[name]
        end = offset + shape[0] * shape[1]
        return flat[offset:end].view(shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """All matrices of a flat buffer (P,) by name, as views."""
        return {name: self.view(flat, name) for name in self.slots}

    def check_fits(self, model: LlamaConfig) -> None:
        """ValueError naming the first tensor that does not fit a model of this shape."""
        needed = self._needed_shapes(model)
        for name in [*needed, *self.slots]:
            own = self.slots[name].shape if name in self.slots else None
            module, _, _ = name.partition(".lora_")
            if own is None and self.patterns.leaves_out(module):
                continue
            if own != needed.get(name):
                raise ValueError(
                    f"the adapter's {name} is {own or 'missing'}, this model needs "
                    f"{needed.get(name, 'none')}; was it made for another model?"
                )

    def _needed_shapes(self, model: LlamaConfig) -> dict[str, tuple[int, int]]:
        """The shapes that a model needs; ranks are this adapter's own, module by module."""
        shapes: dict[str, tuple[int, int]] = {}
        adapted = self.config.module_names()
        for layer in range(model.num_layers):
            for group, shape in group_shapes(model).items():
                for member, n in zip(GROUPS[group], shape.outputs, strict=True):
                    if member not in adapted:
                        continue
                    module = module_name(layer, member)
                    a, b = a_name(module), b_name(module)
                    rank = self.config.rank
                    if a in self.slots:
                        rank, _ = self.slots[a].shape
                    shapes[a] = (rank, shape.inputs)
                    shapes[b] = (n, rank)
        return shapes

    def bind(self, model_config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a model's device and dtype and make the views that its forward reads.

        ValueError where the shapes do not fit the model. Copies of the base's own matrices are
        compared by `Llama.bind`, which has the base's matrices.
        """
        self.check_fits(model_config)
        master_dtype = accumulate_dtype(dtype)
        self.params = self.params.to(device, master_dtype)
        self.compute = self.params if dtype == master_dtype else self.params.to(dtype)
        self.grads = torch.zeros_like(self.params)
        self.bound = (model_config, device, dtype)
        self.make_groups(model_config)

    def make_groups(self, model: LlamaConfig) -> None:
        """Make the views that a forward reads and a backward adds into."""
        self._groups = {}
        for layer in range(model.num_layers):
            for group, shape in group_shapes(model).items():
                adapted = self._adapted(layer, group)
                if adapted:
                    self._groups[layer, group] = self._make_group(layer, group, shape, adapted)

    def _make_group(
        self,
        layer: int,
        group: str,
        shape: GroupShape,
        adapted: list[str],  # full names of the adapted members, at least one
    ) -> LoraGroup:
        """The views of one group of one layer."""
        offset, (rank, k) = self.slots[a_name(adapted[0])]
        ranks = rank * len(adapted)
        a_matrices = slice(offset, offset + ranks * k)  # one below the other
        b: list[Tensor | None] = []
        db: list[Tensor | None] = []
        for member in GROUPS[group]:
            name = b_name(module_name(layer, member))
            is_adapted = name in self.slots
            b.append(self.view(self.compute, name) if is_adapted else None)  # (N, r)
            db.append(self.view(self.grads, name) if is_adapted else None)  # (N, r)
        return LoraGroup(
            a=self.compute[a_matrices].view(ranks, k),
            b=tuple(b),
            da=self.grads[a_matrices].view(ranks, k),
            db=tuple(db),
            sizes=shape.outputs,
            rank=rank,
            scale=self.strength * self.module_scale(adapted[0]),
        )

    def group(self, layer: int, name: str) -> LoraGroup | None:
        """The adapters of one group of one layer, None where it has none."""
        return self._groups.get((layer, name))

    def _adapted(self, layer: int, group: str) -> list[str]:
        """The full names of the modules of one group of one layer that have an adapter."""
        modules = [module_name(layer, member) for member in GROUPS[group]]
        return [module for module in modules if a_name(module) in self.slots]

    # ---- single modules, by their full names

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
        _, _, layer, member = module.split(".", 3)  # model, layers, 3, self_attn.q_proj
        adapted = self._adapted(int(layer), GROUP_OF[member])
        return self.module_scale(adapted[0])

    def delta(self, name: str) -> Tensor | None:
        """strength s B A (N, K) in the master dtype for a weight's checkpoint name.

        None where the weight is not adapted, and at strength 0, so that it keeps its bits.
        """
        module = name.removesuffix(".weight")
        if a_name(module) not in self.slots or self.strength == 0:
            return None
        a = self.view(self.params, a_name(module))  # (r, K)
        b = self.view(self.params, b_name(module))  # (N, r)
        return self.strength * self.group_scale(module) * (b @ a)

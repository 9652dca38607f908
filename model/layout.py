"""The weights of a Llama: their names, their shapes, and which matrices are held as one.

Loading, merging, adapters and the memory plan all read it here. Matrices that read the same input
form a group. We hold a group as one matrix, its members one below the other, so that one product
computes them all:

    group      members, in this order      input                 weight
    qkv        q_proj, k_proj, v_proj      norm(h) (T, D)        ((H + 2G) d, D)
    o          o_proj                      attention (T, H d)    (D, H d)
    gate_up    gate_proj, up_proj          norm(h) (T, D)        (2F, D)
    down       down_proj                   swiglu (T, F)         (D, F)

Our names    embed, norm, head and, for each layer i, i.attn_norm, i.qkv, i.o, i.mlp_norm,
             i.gate_up, i.down; in families with biases (model/families.py) also i.qkv_bias, those
             of q, k and v one after the other ((H + 2G) d,); in families with norms of the q and k
             heads also i.qk_norm, the weight of q's and then that of k's (2d,)
On disk      the unfused names of Hugging Face: model.layers.0.self_attn.q_proj.weight, ...
"""

# D = model width, F = feed-forward width, V = vocabulary
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import LlamaConfig

# names on disk of the weights that belong to no layer
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
OUR_NAMES = {EMBEDDING: "embed", FINAL_NORM: "norm", HEAD: "head"}

GROUPS = {  # group -> members in the order of the group's matrix
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(member for members in GROUPS.values() for member in members)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # of each q and each k head, where they are
GROUP_OF = {member: group for group, members in GROUPS.items() for member in members}


@dataclass(frozen=True)
class Branch:
    """One of the two residual branches of a layer: a norm and the groups of matrices after it."""

    norm: str  # our name of the norm
    norm_on_disk: str
    groups: tuple[str, ...]


BRANCHES = (  # in the order of the forward
    Branch("attn_norm", "input_layernorm", ("qkv", "o")),
    Branch("mlp_norm", "post_attention_layernorm", ("gate_up", "down")),
)


@dataclass(frozen=True)
class GroupShape:
    """Sizes of a group's matrix."""

    inputs: int  # K, columns
    outputs: tuple[int, ...]  # N_i, rows of each member


def group_shapes(config: LlamaConfig) -> dict[str, GroupShape]:
    """The shape of every group; all layers are alike."""
    D = config.hidden_size
    F = config.intermediate_size
    query_size = config.qkv_sizes[0]  # H d
    return {
        "qkv": GroupShape(D, config.qkv_sizes),
        "o": GroupShape(query_size, (D,)),
        "gate_up": GroupShape(D, (F, F)),
        "down": GroupShape(F, (D,)),
    }


def biased_groups(config: LlamaConfig) -> tuple[str, ...]:
    """The groups whose members have a bias beside their matrix."""
    return ("qkv",) if config.qkv_bias else ()


def bias_name(layer: int | str, group: str) -> str:
    """Our name of a group's bias: "3.qkv_bias"."""
    return f"{layer}.{group}_bias"


def module_name(layer: int, module: str) -> str:
    """The full name of a layer's module: "model.layers.3.self_attn.q_proj"."""
    return f"model.layers.{layer}.{module}"


def checkpoint_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by its Hugging Face name.

    With tied embeddings there is no head.
    """
    V = config.vocab_size
    D = config.hidden_size
    groups = group_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D), FINAL_NORM: (D,)}
    for layer in range(config.num_layers):
        for branch in BRANCHES:
            norm = module_name(layer, branch.norm_on_disk)
            shapes[f"{norm}.weight"] = (D,)
            for group in branch.groups:
                shape = groups[group]
                for member, outputs in zip(GROUPS[group], shape.outputs, strict=True):
                    module = module_name(layer, member)
                    shapes[f"{module}.weight"] = (outputs, shape.inputs)
                    if group in biased_groups(config):
                        shapes[f"{module}.bias"] = (outputs,)
        if config.qk_norm:
            for head_norm in HEAD_NORMS:
                shapes[f"{module_name(layer, head_norm)}.weight"] = (config.head_dim,)
    if not config.tie_embeddings:
        shapes[HEAD] = (V, D)
    return shapes


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight as we hold it, by our name. With tied embeddings there is no head."""
    V = config.vocab_size
    D = config.hidden_size
    groups = group_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, D), "norm": (D,)}
    for layer in range(config.num_layers):
        for branch in BRANCHES:
            shapes[f"{layer}.{branch.norm}"] = (D,)
            for group in branch.groups:
                shape = groups[group]
                shapes[f"{layer}.{group}"] = (sum(shape.outputs), shape.inputs)
                if group in biased_groups(config):
                    shapes[bias_name(layer, group)] = (sum(shape.outputs),)
        if config.qk_norm:
            shapes[f"{layer}.qk_norm"] = (len(HEAD_NORMS) * config.head_dim,)
    if not config.tie_embeddings:
        shapes["head"] = (V, D)
    return shapes


def parameter_count(config: LlamaConfig) -> int:
    """Numbers in all weights; a tied head is not counted beside the embedding."""
    return sum(math.prod(shape) for shape in weight_shapes(config).values())


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in our weights."""

    name: str  # our name of the weight that contains it
    first_row: int  # row of that weight at which the tensor begins


def place_of(name: str, config: LlamaConfig) -> Place:
    """The place of a checkpoint tensor, given its Hugging Face name."""
    if name in OUR_NAMES:
        return Place(OUR_NAMES[name], 0)
    stem, _, kind = name.rpartition(".")  # kind: weight or bias
    _, _, layer, module = stem.split(".", 3)  # model, layers, 3, ...
    for branch in BRANCHES:
        if module == branch.norm_on_disk:
            return Place(f"{layer}.{branch.norm}", 0)
    if module in HEAD_NORMS:
        return Place(f"{layer}.qk_norm", HEAD_NORMS.index(module) * config.head_dim)
    group = GROUP_OF[module]
    members_before = GROUPS[group].index(module)
    outputs_before = group_shapes(config)[group].outputs[:members_before]
    our_name = bias_name(layer, group) if kind == "bias" else f"{layer}.{group}"
    return Place(our_name, sum(outputs_before))

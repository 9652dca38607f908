"""The weights of a Llama: names, shapes and which matrices are held as one. Stated once, here

Matrices that read the same input form a group. We hold a group as one matrix, its members one
below the other, so that one product serves them all:

    group      members, in this order      input                 weight
    qkv        q_proj, k_proj, v_proj      norm(h) (T, D)        ((H + 2G) d, D)
    o          o_proj                      attention (T, H d)    (D, H d)
    gate_up    gate_proj, up_proj          norm(h) (T, D)        (2F, D)
    down       down_proj                   swiglu (T, F)         (D, F)

Our names    embed, norm, head and, for each layer i, i.attn_norm, i.qkv, i.o, i.mlp_norm,
             i.gate_up, i.down
On disk      the unfused names of Hugging Face: model.layers.0.self_attn.q_proj.weight, ...
"""

# D = model width, F = feed-forward width, V = vocabulary
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

from dataclasses import dataclass

from model.config import LlamaConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

GROUPS = {  # group -> members in the order of the fused weight
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(member for members in GROUPS.values() for member in members)
GROUP_OF = {member: group for group, members in GROUPS.items() for member in members}
# (our name of a norm, its name on disk, the groups behind it), in the order of the forward
BRANCHES = (
    ("attn_norm", "input_layernorm", ("qkv", "o")),
    ("mlp_norm", "post_attention_layernorm", ("gate_up", "down")),
)
NOT_IN_A_LAYER = {EMBEDDING: "embed", FINAL_NORM: "norm", HEAD: "head"}


@dataclass(frozen=True)
class GroupShape:
    """Sizes of a group's matrix."""

    inputs: int  # K, columns
    outputs: tuple[int, ...]  # N_i, rows of each member


def group_shapes(config: LlamaConfig) -> dict[str, GroupShape]:
    """The shape of every group; all layers are alike."""
    d, f = config.hidden_size, config.intermediate_size
    q = config.qkv_sizes[0]
    return {
        "qkv": GroupShape(d, config.qkv_sizes),
        "o": GroupShape(q, (d,)),
        "gate_up": GroupShape(d, (f, f)),
        "down": GroupShape(f, (d,)),
    }


def module_name(layer: int, module: str) -> str:
    """The whole name of a layer's module: "model.layers.3.self_attn.q_proj"."""
    return f"model.layers.{layer}.{module}"


def checkpoint_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name. Tied embeddings have no head."""
    vocab, d = config.vocab_size, config.hidden_size
    groups = group_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, d), FINAL_NORM: (d,)}
    for layer in range(config.num_layers):
        for _, norm, branch in BRANCHES:
            shapes[f"{module_name(layer, norm)}.weight"] = (d,)
            for group in branch:
                shape = groups[group]
                for module, outputs in zip(GROUPS[group], shape.outputs, strict=True):
                    shapes[f"{module_name(layer, module)}.weight"] = (outputs, shape.inputs)
    if not config.tie_embeddings:
        shapes[HEAD] = (vocab, d)
    return shapes


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every weight as we hold it, by our name. Tied embeddings have no head."""
    vocab, d = config.vocab_size, config.hidden_size
    groups = group_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, d), "norm": (d,)}
    for layer in range(config.num_layers):
        for norm, _, branch in BRANCHES:
            shapes[f"{layer}.{norm}"] = (d,)
            for group in branch:
                shapes[f"{layer}.{group}"] = (sum(groups[group].outputs), groups[group].inputs)
    if not config.tie_embeddings:
        shapes["head"] = (vocab, d)
    return shapes


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint stands in our weights."""

    name: str  # of our weight
    first_row: int  # in it


def place_of(name: str, config: LlamaConfig) -> Place:
    """The place of a checkpoint tensor, given its Hugging Face name."""
    if name in NOT_IN_A_LAYER:
        return Place(NOT_IN_A_LAYER[name], 0)
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    for norm, norm_on_disk, _ in BRANCHES:
        if module == norm_on_disk:
            return Place(f"{layer}.{norm}", 0)
    group = GROUP_OF[module]
    members_before = GROUPS[group].index(module)
    return Place(f"{layer}.{group}", sum(group_shapes(config)[group].outputs[:members_before]))

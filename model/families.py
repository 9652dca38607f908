"""The families of models that are computed here: Llama, and what others add to its arithmetic.

A family is the `model_type` of a config.json. Every one is the same forward and backward
(model/llama.py) with a few facts more, which model/config.py reads from here. A model_type that is
not in FAMILIES is refused by name; REFUSED says why for those that people ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What the config.json of one `model_type` means beyond its own numbers."""

    models: str  # models that are of it, for messages and tables
    architecture: str  # the class that `architectures` has to list
    adds: str  # what is added to Llama's arithmetic, for model/README.md
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have a bias
    qk_norm: bool = False  # each head of q and k is normalised before its rotation
    skips_rotation: bool = False  # `no_rope_layers` names layers whose q and k are not rotated
    rope_theta: float = 10000.0  # the base of the rotation where config.json states none
    # how `sliding_window` is read: "ignored"; "always": a number there is a window in every layer;
    # "switched": only where `use_sliding_window` is true
    window: str = "ignored"
    # the values that transformers assumes where config.json leaves a key out
    assumed: dict[str, Any] = field(default_factory=dict)


MISTRAL_ASSUMED = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2_ASSUMED = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3_ASSUMED = QWEN2_ASSUMED | {"head_dim": 128}
SMOLLM3_ASSUMED = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}

FAMILIES = {  # model_type -> its facts
    "llama": Family("Llama 1 to 3.2, TinyLlama, SmolLM2, Yi", "LlamaForCausalLM", "-"),
    "mistral": Family(
        "Mistral 7B, Mistral Nemo",
        "MistralForCausalLM",
        "rows within the sliding window, where there is one",
        window="always",
        assumed=MISTRAL_ASSUMED,
    ),
    "ministral": Family(
        "Ministral",
        "MinistralForCausalLM",
        "rows within the sliding window, where there is one",
        window="always",
        assumed=MISTRAL_ASSUMED,
    ),
    "qwen2": Family(
        "Qwen2, Qwen2.5",
        "Qwen2ForCausalLM",
        "a bias on q, k and v",
        qkv_bias=True,
        window="switched",
        assumed=QWEN2_ASSUMED,
    ),
    "qwen3": Family(
        "Qwen3 (dense)",
        "Qwen3ForCausalLM",
        "a norm of each head of q and k before its rotation",
        qk_norm=True,
        window="switched",
        assumed=QWEN3_ASSUMED,
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "layers without rotation, every fourth as a rule",
        skips_rotation=True,
        rope_theta=2e6,
        window="switched",
        assumed=SMOLLM3_ASSUMED,
    ),
}

_EXPERTS = "it is a mixture of experts: a layer chooses among feed-forward networks for each token"
_IMAGES = "it reads images: only text models are supported"
_STATE = "layers with a recurrent state stand beside attention"
_LAYER_NORM = "it normalises by LayerNorm, and its layers are built otherwise than Llama's"
REFUSED = {  # model_type -> why it is not computed here
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "gemma": "it scales the embeddings, multiplies norms by 1 + weight, and uses GELU",
    "gemma2": "it caps attention scores and logits softly (tanh), and has four norms a layer",
    "gemma3_text": "it has four norms a layer and two rotations, and scales the embeddings",
    "gemma3": _IMAGES,
    "paligemma": _IMAGES,
    "mllama": _IMAGES,
    "llava": _IMAGES,
    "mistral3": _IMAGES,
    "pixtral": _IMAGES,
    "qwen2_vl": _IMAGES,
    "qwen2_5_vl": _IMAGES,
    "qwen3_vl": _IMAGES,
    "smolvlm": _IMAGES,
    "idefics3": _IMAGES,
    "qwen3_next": _STATE,
    "mamba": _STATE,
    "jamba": _STATE,
    "falcon_h1": _STATE,
    "granite": "it multiplies embeddings, residuals, scores and logits by constants of its own",
    "minicpm": "it multiplies embeddings, residuals and logits by constants of its own",
    "olmo2": "its norms stand after attention and feed-forward, not before them",
    "phi3": "its checkpoint holds q, k, v and gate, up as fused matrices",
    "glm4": "it rotates a part of each head only, and has four norms a layer",
    "cohere": _LAYER_NORM,
    "cohere2": _LAYER_NORM,
    "olmo": _LAYER_NORM,
    "phi": _LAYER_NORM,
    "stablelm": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "opt": _LAYER_NORM,
}


def family_of(model_type: Any, architectures: Any) -> Family:
    """The family of a config.json, by its `model_type` and its list `architectures` (or None).

    ValueError with the reason where it is not computed here.
    """
    known = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
    named = f"model_type {model_type!r}, architectures {architectures}"
    # a JSON value may be a list, which no table can be asked for
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
        because = f" is refused: {reason}" if reason else " is not supported"
        raise ValueError(f"{named}{because}; expected one of the families {known}")
    if architectures is None or architectures == []:
        return family
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise ValueError(
            f"{named}: expected {family.architecture}, a causal language model "
            "(classifiers, reward and embedding models have another head)"
        )
    return family

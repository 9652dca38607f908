"""config.json of a GGUF file's model, from its metadata.

A GGUF states Llama 3's rope scaling by its effect: a tensor `rope_freqs` of d/2 divisors of the
frequencies (d: head size). The parameters of config.json are recovered from it and must reproduce
it, else the file is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.jobs.gguf_reader import dequantised, need
from model.config import LlamaConfig
from model.families import FAMILIES
from model.rope import inverse_frequencies

# The keys under the architecture's name that this importer understands; any other could change the
# result
KNOWN_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
}
# what a config.json of each architecture states beside the common keys. llama.cpp computes no
# sliding window for these, and rotates all layers of a SmolLM3 but every fourth: no key says so
OWN_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
    "smollm3": {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    },
}


def model_config(meta: dict[str, Any], tensors: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json of the model, from the metadata and the names of the tensors.

    ValueError for a key that is missing or unknown, and for a shape that no such model has.
    """
    architecture = meta["general.architecture"]
    stated = {}  # the values under `llama.`
    for key, value in meta.items():
        if key.startswith(f"{architecture}."):
            stated[key.removeprefix(f"{architecture}.")] = value
    unknown = sorted(set(stated) - KNOWN_KEYS)
    if unknown:
        key = unknown[0]
        raise ValueError(f"{source}: {architecture}.{key} = {stated[key]} is not supported")

    def of_model(key: str) -> Any:
        return need(meta, f"{architecture}.{key}", source)

    hidden = of_model("embedding_length")
    heads = of_model("attention.head_count")
    kv_heads = stated.get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ValueError(f"{source}: head counts differ from layer to layer; not supported")
    head_dim = stated.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{source}: {architecture}.{key} = {stated[key]}, not the head size {head_dim}"
            )
    return {
        "architectures": [FAMILIES[architecture].architecture],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": of_model("feed_forward_length"),
        "num_hidden_layers": of_model("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": len(need(meta, "tokenizer.ggml.tokens", source)),
        "max_position_embeddings": of_model("context_length"),
        "rms_norm_eps": _shortest(of_model("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(stated.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(architecture, stated, tensors, source),
        "hidden_act": "silu",
        **OWN_KEYS[architecture],
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float32",
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    architecture: str, stated: dict[str, Any], tensors: dict[str, Any], source: Path
) -> dict[str, Any] | None:
    """config.json's rope_scaling: None, linear, or llama3 where there is a tensor rope_freqs."""
    kind = stated.get("rope.scaling.type", "none")
    divisors = tensors.get("rope_freqs.weight")
    if kind == "none" and divisors is None:
        return None
    if kind == "none" and architecture == "llama":
        # the largest divisor is the factor itself, that of the slowest frequencies
        factor = dequantised(divisors, slice(None)).max()
        # the other numbers are the same in every Llama 3 release; check_rope_divisors shows whether
        # they hold here
        return {
            "rope_type": "llama3",
            "factor": _shortest(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if kind == "linear" and divisors is None:
        return {"rope_type": "linear", "factor": _shortest(stated.get("rope.scaling.factor", 0))}
    beside = "without" if divisors is None else "with"
    raise ValueError(
        f"{source}: rope scaling {kind!r} {beside} rope_freqs.weight in a {architecture}; only "
        "'none', 'linear' and, in a llama, Llama 3's (rope_freqs.weight alone) are supported"
    )


def check_rope_divisors(config: LlamaConfig, tensors: dict[str, Any], source: Path) -> None:
    """ValueError unless the recovered Llama 3 parameters give the divisors of rope_freqs.weight."""
    if config.rope_scaling["rope_type"] != "llama3":
        return
    plain = inverse_frequencies(replace(config, rope_scaling={"rope_type": "default"}))
    expected = (plain / inverse_frequencies(config)).numpy()  # (d/2,)
    found = dequantised(tensors["rope_freqs.weight"], slice(None))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        factor = config.rope_scaling["factor"]
        raise ValueError(f"{source}: rope_freqs.weight is not Llama 3's scaling by {factor}")


def write_stated(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object; keys that the GGUF does not state (None) are left out."""
    stated = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

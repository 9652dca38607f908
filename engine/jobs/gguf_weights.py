"""The weights of a GGUF file: dequantised to fp32, renamed, written as model.safetensors.

GGUF stores the rows of q and k so that the rotation pairs neighbours (2i, 2i + 1); Hugging Face
pairs (i, i + d/2). Inside each head the rows go from (d/2, 2) to (2, d/2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.jobs.gguf_reader import dequantised
from model.config import LlamaConfig
from model.layout import checkpoint_shapes

BLOCK_ROWS = 4096  # of a matrix, dequantised and written at a time
GGUF_NAMES = {  # of the part between "model.layers.i." and ".weight"
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[module]}.weight"


def write_weights(path: Path, config: LlamaConfig, tensors: dict[str, Any], source: Path) -> None:
    """Write model.safetensors: an 8-byte header length, a JSON header, the fp32 values.

    ValueError where tensors are missing, unknown, or of another shape than `config` asks for.
    """
    shapes = checkpoint_shapes(config)  # Hugging Face name -> shape
    hf_names = {_gguf_name(name): name for name in shapes}
    missing = sorted(set(hf_names) - set(tensors))
    unexpected = sorted(set(tensors) - set(hf_names) - {"rope_freqs.weight"})
    if missing or unexpected:
        raise ValueError(
            f"{source}: not a plain Llama: missing tensors {missing[:4]}, unexpected "
            f"{unexpected[:4]} (biases and mixtures of experts are not supported)"
        )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, hf_name in hf_names.items():
        shape = tuple(int(n) for n in reversed(tensors[name].shape))  # GGUF: fastest first
        if shape != shapes[hf_name]:
            raise ValueError(f"{source}: {name} has shape {shape}, expected {shapes[hf_name]}")
        start, end = end, end + 4 * math.prod(shape)
        header[hf_name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start on a multiple of 8
    permuted_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, hf_name in hf_names.items():
            module = hf_name.split(".")[-2]
            for block in _blocks(tensors[name], permuted_heads.get(module)):
                file.write(block.astype("<f4", copy=False).data)


def _blocks(tensor: Any, permuted_heads: int | None) -> Iterator[np.ndarray]:
    """A tensor in fp32, BLOCK_ROWS rows at a time; q and k, which are permuted, in one block."""
    if permuted_heads:
        hidden = tensor.shape[0]
        pairs = dequantised(tensor, slice(None)).reshape(permuted_heads, -1, 2, hidden)
        yield np.ascontiguousarray(pairs.swapaxes(1, 2))  # (heads, d/2, 2, D) -> (heads, 2, d/2, D)
        return
    for start in range(0, len(tensor.data), BLOCK_ROWS):
        yield dequantised(tensor, slice(start, start + BLOCK_ROWS))

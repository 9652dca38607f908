"""The weights of a GGUF file: dequantised to fp32, renamed, written as model.safetensors.

The quantised matrices are kept beside them, for sampling on a CPU: model.gguf_blocks.

RoPE rotates pairs of rows of q and k. In a GGUF the rows of a pair are neighbours, (2i, 2i + 1) of
their head; in Hugging Face's layout they are (i, i + d/2), d the head size. So the rows of every
head go from (d/2, 2) to (2, d/2). In a GGUF of a Qwen they stand in Hugging Face's order already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.jobs.gguf_reader import dequantised
from model.config import LlamaConfig
from model.ggml_blocks import FORMATS
from model.layout import checkpoint_shapes

BLOCK_ROWS = 4096  # rows of a matrix that are dequantised and written at a time
# Hugging Face's name of a tensor without ".weight" -> GGUF's: outside the layers, and inside one
# ("model.layers.i." and "blk.i." left out)
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight; a bias likewise"""
    stem, _, kind = name.rpartition(".")  # kind: weight or bias
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


# the architectures whose rows of q and k llama.cpp's converter reorders
ROWS_IN_PAIRS = ("llama", "smollm3")


def permuted_heads(architecture: str, config: LlamaConfig) -> dict[str, int]:
    """The modules whose rows a GGUF of that architecture orders otherwise, and their heads."""
    if architecture not in ROWS_IN_PAIRS:
        return {}
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}


def halves_of_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, D) of q or k from GGUF's order into Hugging Face's."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])  # (heads, d/2, 2, D)
    halves = pairs.swapaxes(1, 2)  # (heads, 2, d/2, D)
    return np.ascontiguousarray(halves).reshape(rows.shape)


def pairs_of_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, D) of q or k from Hugging Face's order into GGUF's."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])  # (heads, 2, d/2, D)
    pairs = halves.swapaxes(1, 2)  # (heads, d/2, 2, D)
    return np.ascontiguousarray(pairs).reshape(rows.shape)


def write_weights(
    path: Path,
    config: LlamaConfig,
    tensors: dict[str, Any],
    source: Path,
    heads: dict[str, int],  # of q and k where their rows are reordered: permuted_heads
) -> None:
    """Write model.safetensors: an 8-byte header length, a JSON header, the fp32 values.

    ValueError where tensors are missing, unknown, or of another shape than `config` states.
    """
    shapes = checkpoint_shapes(config)  # Hugging Face name -> shape
    hf_names = {gguf_name(name): name for name in shapes}  # by GGUF name
    _check_tensors(shapes, hf_names, tensors, source)

    entries = [(name, "F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()]
    with path.open("wb") as file:
        _write_header(file, entries, {"format": "pt"})
        for name, hf_name in hf_names.items():
            for block in _blocks(tensors[name], _heads_of(hf_name, heads)):
                file.write(block.astype("<f4", copy=False).data)


def write_quantised(
    path: Path, config: LlamaConfig, tensors: dict[str, Any], heads: dict[str, int]
) -> None:
    """Write the quantised matrices as they are, for sampling (model/quantised_file.py).

    Those in a format that sampling reads, in the rows of model.safetensors. Nothing is written
    where there are none.
    """
    entries = []
    formats = {}
    for name, shape in checkpoint_shapes(config).items():
        tensor = tensors[gguf_name(name)]
        format_name = tensor.tensor_type.name
        if len(shape) == 2 and format_name in FORMATS:
            formats[name] = format_name
            entries.append((name, "U8", tensor.data.shape, tensor.data.nbytes))
    if not formats:
        return
    with path.open("wb") as file:
        _write_header(file, entries, formats)
        for name in formats:
            rows = tensors[gguf_name(name)].data  # (N, bytes of a row)
            permuted_heads = _heads_of(name, heads)
            if permuted_heads is not None:
                rows = halves_of_heads(rows, permuted_heads)
            for start in range(0, len(rows), BLOCK_ROWS):
                file.write(np.ascontiguousarray(rows[start : start + BLOCK_ROWS]).data)


def _write_header(
    file: BinaryIO,
    entries: list[tuple[str, str, tuple[int, ...], int]],  # name, dtype, shape, bytes
    metadata: dict[str, str],
) -> None:
    """Write the header of a safetensors file: its length in 8 bytes, and JSON."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0  # byte offset in the values
    for name, dtype, shape, size in entries:
        end = start + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start on a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def _heads_of(hf_name: str, heads: dict[str, int]) -> int | None:
    """The heads by which the rows of a tensor are reordered, None where they are not."""
    module = hf_name.split(".")[-2]  # "q_proj" of "model.layers.0.self_attn.q_proj.weight"
    return heads.get(module)


def _check_tensors(
    shapes: dict[str, tuple[int, ...]],
    hf_names: dict[str, str],
    tensors: dict[str, Any],
    source: Path,
) -> None:
    """ValueError where tensors are missing, unknown or of another shape."""
    missing = sorted(set(hf_names) - set(tensors))
    unexpected = sorted(set(tensors) - set(hf_names) - {"rope_freqs.weight"})
    if missing or unexpected:
        raise ValueError(
            f"{source}: not a plain model: missing tensors {missing[:4]}, unexpected "
            f"{unexpected[:4]} (further biases and mixtures of experts are not supported)"
        )
    for name, hf_name in hf_names.items():
        shape = tuple(int(n) for n in reversed(tensors[name].shape))  # GGUF: fastest first
        if shape != shapes[hf_name]:
            raise ValueError(f"{source}: {name} has shape {shape}, expected {shapes[hf_name]}")


def _blocks(tensor: Any, permuted_heads: int | None) -> Iterator[np.ndarray]:
    """A tensor in fp32, BLOCK_ROWS rows at a time; q and k, which are permuted, in one block.

    permuted_heads: number of heads of q or k, None for other tensors.
    """
    if permuted_heads is not None:
        rows = dequantised(tensor, slice(None))  # (heads * d, D)
        yield halves_of_heads(rows, permuted_heads)
        return
    for start in range(0, len(tensor.data), BLOCK_ROWS):
        yield dequantised(tensor, slice(start, start + BLOCK_ROWS))

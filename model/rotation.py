"""The rotation of a layer's queries and keys, as the family has it (model/families.py)

A Llama rotates those of every layer. A Qwen3 normalises each head first. A SmolLM3 leaves those of
some layers as they are.
"""

# T = tokens, H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from kernels.registry import Ops
from model.config import LlamaConfig
from model.rope import cos_sin_table
from model.weights import Weights


class Rotation:
    """The rotary table of a model, and its use, forward and backward."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        # the rotary table (positions, d), grown on demand: a longer row replaces it, so a captured
        # CUDA graph must keep a reference to the table that it reads
        self.cos_sin: Tensor | None = None

    def grow(self, context: Packed | Cached, device: torch.device, dtype: torch.dtype) -> None:
        """Make `cos_sin` long enough for this forward; built once and doubled when outgrown.

        dtype is the model's; the table is in its accumulation dtype.
        """
        longest = _longest_row(context)
        most = self.config.max_position
        assert longest <= most, f"a row of {longest} tokens, but the model was made for {most}"
        have = 0 if self.cos_sin is None else self.cos_sin.shape[0]
        if self.cos_sin is None or longest > have:
            positions = min(max(longest, 2 * have, 512), most)
            self.cos_sin = cos_sin_table(self.config, positions, device, accumulate_dtype(dtype))

    def forward(self, ops: Ops, weights: Weights, i: int, qkv: Tensor, positions: Tensor) -> Tensor:
        """qkv (T, (H + 2G) d) with the queries and keys of layer i rotated; positions (T,) int64.

        In place, where TORCH or kernels do it; but where the heads are normalised before it, qkv
        stays as it is, for the backward.
        """
        config = self.config
        H = config.num_heads
        G = config.num_kv_heads
        if config.qk_norm:
            qk_norm = weights[f"{i}.qk_norm"]  # (2d,)
            eps = config.rms_norm_eps
            return ops.norm_rope_forward(qkv, qk_norm, eps, positions, self.cos_sin, H, G)
        if i in config.unrotated_layers:
            return qkv
        return ops.rope_(qkv, positions, self.cos_sin, H, G)

    def backward(
        self,
        ops: Ops,
        weights: Weights,
        i: int,
        dqkv: Tensor,  # (T, (H + 2G) d) gradient of the result of `forward`, changed in place
        plain_qkv: Tensor,  # (T, (H + 2G) d) its input; read where the heads are normalised
        positions: Tensor,  # (T,) int64
    ) -> Tensor:
        """The gradient (T, (H + 2G) d) of the input of `forward`."""
        config = self.config
        H = config.num_heads
        G = config.num_kv_heads
        if config.qk_norm:
            qk_norm = weights[f"{i}.qk_norm"]  # (2d,)
            eps = config.rms_norm_eps
            return ops.norm_rope_backward_(
                dqkv, plain_qkv, qk_norm, eps, positions, self.cos_sin, H, G
            )
        if i in config.unrotated_layers:
            return dqkv
        return ops.rope_(dqkv, positions, self.cos_sin, H, G, inverse=True)


def _longest_row(context: Packed | Cached) -> int:
    """Tokens of the longest row of a forward, those before the forward included; 0 without rows."""
    if isinstance(context, Packed):
        lengths = [end - start for start, end in context.rows]
        return max(lengths, default=0) + context.prefix
    pairs = zip(context.context_lens, context.query_lens, strict=True)
    return max((before + new for before, new in pairs), default=0)

"""All layers for new tokens over a cache in one C call (native/layers.c), for a CPU

The C function calls the C operations in the order of model/llama.py, so the results are the same
bits. It replaces a few hundred calls by one, and keeps one workspace for all intermediate results.

shapes     h, x (T, D)    k, v (layers, pages, G, page size, d)    logits_indices (n,)
"""

# T = new tokens, n = those whose results are needed, D = model width, F = feed-forward width
# H = query heads, G = key/value heads, d = head size, N = H d + 2 G d, L = layers
# B = rows, P = pages of the longest row

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_long

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cpu.native import at, library
from kernels.cpu.panels import Panels

Sizes = c_long * 12  # T, B, P, H, G, d, page size, pages, D, F, L, n: native/layers.c


class FusedLayers:
    """The packed weights of a model, as a table of addresses for the C function."""

    def __init__(
        self,
        weights: Mapping[str, Tensor | Panels],
        layers: int,
        unrotated_layers: tuple[int, ...] = (),  # those whose q and k are not rotated
    ) -> None:
        self.weights = weights  # kept, for the table points into their memory
        table = []
        for layer in range(layers):
            is_rotated = layer not in unrotated_layers
            table.append([*_layer_addresses(weights, layer), int(is_rotated)])
        self.addresses = torch.tensor(table, dtype=torch.int64)  # (L, 13)
        self.F = weights["0.down"].shape[1]
        self.workspace = torch.empty(0)  # fp32; kept between calls, grown when too small

    def __call__(
        self,
        h: Tensor,
        cached: Cached,
        cos_sin: Tensor,
        k: Tensor,
        v: Tensor,
        eps: float,
        logits_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's x (n, D), and h (n, D), changed in place, which x is to be added to.

        `logits_indices` (n,) int64, increasing: the tokens whose results are needed; None: all.
        """
        self._check_shapes(h, cached, k)
        T, D = h.shape
        L, pages, G, page_size, d = k.shape
        N = self.weights["0.qkv"].shape[0]
        H = N // d - 2 * G
        B, P = cached.block_table.shape
        n = T
        indices = None  # a null pointer: all tokens
        if logits_indices is not None:
            _check_indices(logits_indices, T)
            n = len(logits_indices)
            indices = at(logits_indices, torch.int64)
        self._grow_workspace(T * (2 * D + N + H * d + 3 * self.F + 1))
        x = torch.empty_like(h)
        sizes = (T, B, P, H, G, d, page_size, pages, D, self.F, L, n)
        library().layers(
            self.addresses.data_ptr(),
            at(h),
            x.data_ptr(),
            self.workspace.data_ptr(),
            at(cached.positions, torch.int64),
            at(cos_sin),
            at(k),
            at(v),
            at(cached.write_page, torch.int64),
            at(cached.write_offset, torch.int64),
            at(cached.block_table, torch.int64),
            at(cached.cu_queries, torch.int32),
            at(cached.contexts, torch.int32),
            indices,
            Sizes(*sizes),
            eps,
        )
        return x[:n], h[:n]

    def _check_shapes(self, h: Tensor, cached: Cached, k: Tensor) -> None:
        L, _, _, page_size, _ = k.shape
        tokens = len(cached.positions)
        layers = len(self.addresses)
        fits = tokens == len(h) and page_size == cached.page_size and layers == L
        assert fits, (
            f"h {tuple(h.shape)}, {tokens} tokens, k {tuple(k.shape)}, "
            f"pages of {cached.page_size}, {layers} layers"
        )

    def _grow_workspace(self, needed: int) -> None:
        if needed > len(self.workspace):
            self.workspace = torch.empty(needed)


def _layer_addresses(weights: Mapping[str, Tensor | Panels], layer: int) -> list[int]:
    """A layer's weights by address, in the order that they are used; then the form of each
    matrix, by which its panels are read; then, by address or 0 for none, the bias of q, k and v
    and the norms of the q and k heads."""
    attn_norm = weights[f"{layer}.attn_norm"]
    qkv = weights[f"{layer}.qkv"]
    o = weights[f"{layer}.o"]
    mlp_norm = weights[f"{layer}.mlp_norm"]
    gate_up = weights[f"{layer}.gate_up"]
    down = weights[f"{layer}.down"]
    addresses = [
        at(attn_norm),
        qkv.pointer,
        o.pointer,
        at(mlp_norm),
        gate_up.pointer,
        down.pointer,
    ]
    forms = [qkv.form, o.form, gate_up.form, down.form]
    bias = weights.get(f"{layer}.qkv_bias")  # (N,)
    bias_address = 0 if bias is None else at(bias)
    qk_norm = weights.get(f"{layer}.qk_norm")  # (2d,)
    qk_norm_address = 0 if qk_norm is None else at(qk_norm)
    return [*addresses, *forms, bias_address, qk_norm_address]


def _check_indices(logits_indices: Tensor, T: int) -> None:
    """AssertionError unless the indices are increasing and lie within T tokens."""
    indices = logits_indices.tolist()
    lowest_allowed = 0
    for index in indices:
        assert lowest_allowed <= index < T, (
            f"logits_indices {indices} of {T} tokens: expected increasing indices"
        )
        lowest_allowed = index + 1

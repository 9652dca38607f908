"""All layers for new tokens over a cache in one C call (native/layers.c), for a CPU

The same functions in the same order as model/llama.py calls them one by one, and so the same bits:
one call for a few hundred, and one room for what all of them compute, which is kept.

shapes     h, x (T, D)    k, v (layers, pages, G, page size, d)    wanted (n,)
"""

# T = new tokens, n = those of them that are wanted, D = model width, F = feed-forward width
# H = query heads, G = key/value heads

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_long
from itertools import pairwise

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cpu.native import at, library
from kernels.cpu.panels import Panels

MATRICES = ("qkv", "o", "gate_up", "down")


class LayersNative:
    """The packed weights of a model, by address."""

    def __init__(self, weights: Mapping[str, Tensor | Panels], layers: int) -> None:
        self.weights = weights  # whose memory is pointed at
        rows = []
        for i in range(layers):
            packed = [weights[f"{i}.{name}"] for name in MATRICES]
            norms = [at(weights[f"{i}.{name}"]) for name in ("attn_norm", "mlp_norm")]
            a, b, c, d = (w.pointer for w in packed)
            rows.append([norms[0], a, b, norms[1], c, d, *(w.bytes for w in packed)])
        self.table = torch.tensor(rows, dtype=torch.int64)
        self.F = weights["0.down"].shape[1]
        self.room = torch.empty(0)

    def __call__(
        self,
        h: Tensor,
        cached: Cached,
        cos_sin: Tensor,
        k: Tensor,
        v: Tensor,
        eps: float,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's x (n, D), and h (n, D), changed in place, to which it is to be added.

        `wanted` (n,) int64 rises; None: every token is, n = T.
        """
        (T, D), (L, pages, G, page, d) = h.shape, k.shape
        N = self.weights["0.qkv"].shape[0]
        H, (B, P) = N // d - 2 * G, cached.block_table.shape
        assert len(cached.positions) == T and page == cached.page_size and len(self.table) == L, (
            f"h {tuple(h.shape)}, {len(cached.positions)} tokens, k {tuple(k.shape)}, "
            f"pages of {cached.page_size}, {len(self.table)} layers"
        )
        n, rows = T, None
        if wanted is not None:
            n, rows = len(wanted), at(wanted, torch.int64)
            ends = [-1, *wanted.tolist(), T]
            assert all(a < b for a, b in pairwise(ends)), f"wanted {ends[1:-1]} of {T} tokens"
        room = T * (2 * D + N + H * d + 3 * self.F + 1)
        if room > len(self.room):
            self.room = torch.empty(room)
        x = torch.empty_like(h)
        places = (cached.write_page, cached.write_offset, cached.block_table)
        lengths = (cached.cu_queries, cached.contexts)
        library().layers(
            self.table.data_ptr(), at(h), x.data_ptr(), self.room.data_ptr(),
            at(cached.positions, torch.int64), at(cos_sin), at(k), at(v),
            *(at(t, torch.int64) for t in places), *(at(t, torch.int32) for t in lengths), rows,
            (c_long * 12)(T, B, P, H, G, d, page, pages, D, self.F, L, n), eps,
        )  # fmt: skip
        return x[:n], h[:n]

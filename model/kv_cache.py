"""Keys and values of the running sequences, in pages: [layer, page, kv head, token, d]

A sequence's tokens fill its pages in order; pages come from one pool, lowest number first, so that
the pages in use lie together. A page is zeroed when it is handed out, so that numbers of an earlier
sequence (a NaN, say) never reach another one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.integers import cdiv
from model.config import LlamaConfig


class KVCache:
    """A pool of pages, and the numbers of the free ones (a heap); the host's lists are
    authoritative."""

    def __init__(
        self,
        config: LlamaConfig,
        pages: int,
        page_size: int,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert pages > 0 and page_size > 0, f"{pages} pages of {page_size} tokens"
        self.page_size = page_size
        self.shape = (config.num_layers, pages, config.num_kv_heads, page_size, config.head_dim)
        # not zeroed here: on a CPU, memory is then taken only as pages are first used
        self.k: Tensor = torch.empty(self.shape, device=device, dtype=dtype)
        self.v: Tensor = torch.empty(self.shape, device=device, dtype=dtype)
        self.free = list(range(pages))

    @staticmethod
    def page_bytes(config: LlamaConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values of all layers."""
        numbers = config.num_layers * config.num_kv_heads * page_size * config.head_dim
        return 2 * numbers * dtype.itemsize

    @property
    def pages(self) -> int:
        """Pages in all."""
        return self.shape[1]

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens needs."""
        return cdiv(tokens, self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` zeroed pages; the caller has checked `free` before."""
        assert count <= len(self.free), f"{count} pages asked for, {len(self.free)} are free"
        taken = [heapq.heappop(self.free) for _ in range(count)]
        for page in taken:
            self.k[:, page] = 0
            self.v[:, page] = 0
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Return a finished sequence's pages."""
        for page in pages:
            heapq.heappush(self.free, page)

    def copy(self, source: Sequence[int], to: Sequence[int]) -> None:
        """Copy whole pages: a prefix that is computed once begins many sequences."""
        assert len(source) == len(to), f"{len(source)} pages onto {len(to)}"
        if source:
            self.k[:, list(to)] = self.k[:, list(source)]
            self.v[:, list(to)] = self.v[:, list(source)]

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Move the pages of the block tables `tables`, all that are in use, to the lowest numbers.

        The lists are changed in place. torch's attention on a CPU reads the pool up to the highest
        page in use; after many sequences have ended most of those pages would be free.
        """
        used = sum(map(len, tables))
        assert used + len(self.free) == self.pages, f"{used} pages in use, {len(self.free)} free"
        holes = sorted(page for page in self.free if page < used)
        moves = {}
        for table in tables:
            for i, page in enumerate(table):
                if page >= used:
                    moves[page] = table[i] = holes[len(moves)]
        self.copy(list(moves), list(moves.values()))
        self.free = list(range(used, self.pages))

    def grow(self, pages: int) -> None:
        """Enlarge the pool to `pages`; pages in use keep their place and content.

        The old pool is held beside the new one until its content is copied. Where memory does not
        suffice for that, torch's error is raised and the pool stays as it was.
        """
        old = self.pages
        if pages <= old:
            return
        shape = (self.shape[0], pages, *self.shape[2:])
        bigger = {name: self.k.new_empty(shape) for name in ("k", "v")}
        self.shape = shape
        while bigger:  # each old tensor is freed as soon as it is copied
            name, tensor = bigger.popitem()
            tensor[:, :old] = getattr(self, name)
            setattr(self, name, tensor)
        for page in range(old, pages):
            heapq.heappush(self.free, page)

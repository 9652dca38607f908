"""Keys and values of the running sequences, in pages: [layer, page, kv head, token, d]

A sequence's tokens fill its pages in order; pages come from one pool, lowest number first, so that
the pages in use lie together. A page is zeroed when it is handed out, so that values of an earlier
sequence (a NaN, say) never reach another one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.upload import upload
from model.config import LlamaConfig


class KVCache:
    """A pool of pages, and the numbers of the free ones.

    k, v  (layers, pages, G, page_size, d) in the model's dtype, G = key/value heads, d = head size
    free  the numbers of the free pages, a heap on the host
    """

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
        numbers_per_token = config.num_layers * config.num_kv_heads * config.head_dim
        return 2 * numbers_per_token * page_size * dtype.itemsize

    @property
    def pages(self) -> int:
        """Pages of the pool, free or in use."""
        return self.shape[1]

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of `tokens` tokens needs."""
        return cdiv(tokens, self.page_size)

    def take(self, count: int) -> list[int]:
        """Numbers of `count` zeroed pages; the caller has checked `free` before."""
        assert count <= len(self.free), f"{count} pages asked for, {len(self.free)} are free"
        taken = [heapq.heappop(self.free) for _ in range(count)]
        if taken:
            self._zero(taken)
        return taken

    def _zero(self, pages: Sequence[int]) -> None:
        if self.k.device.type == "cpu":  # there the pieces of a page are filled fastest one by one
            for page in pages:
                self.k[:, page] = 0
                self.v[:, page] = 0
            return
        index = upload(pages, torch.int64, self.k.device)
        self.k.index_fill_(1, index, 0)
        self.v.index_fill_(1, index, 0)

    def give_back(self, pages: Sequence[int]) -> None:
        """Put the pages of a finished or preempted sequence back into the pool."""
        for page in pages:
            heapq.heappush(self.free, page)

    def copy(self, source: Sequence[int], to: Sequence[int]) -> None:
        """Copy whole pages, for a prefix that is computed once and begins many sequences.

        No page may be in both lists.
        """
        assert len(source) == len(to), f"cannot copy {len(source)} pages onto {len(to)}"
        if source:
            self._copy(source, to)

    def _copy(self, source: Sequence[int], to: Sequence[int]) -> None:
        if self.k.device.type == "cpu":
            for old, new in zip(source, to, strict=True):
                self.k[:, new] = self.k[:, old]
                self.v[:, new] = self.v[:, old]
            return
        source_index = upload(source, torch.int64, self.k.device)
        to_index = upload(to, torch.int64, self.k.device)
        for cache in (self.k, self.v):
            pages = cache.index_select(1, source_index)  # (layers, pages to copy, G, page_size, d)
            cache.index_copy_(1, to_index, pages)

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Move the pages of the block tables `tables`, all that are in use, to the lowest numbers.

        The lists are changed in place. torch's attention on a CPU reads the pool up to the highest
        page in use; after many sequences have ended most of those pages would be free.
        """
        used = sum(len(table) for table in tables)
        assert used + len(self.free) == self.pages, (
            f"{used} pages in use and {len(self.free)} free ones, but the pool has {self.pages}"
        )
        holes = sorted(page for page in self.free if page < used)  # as many as pages move
        source: list[int] = []
        target: list[int] = []
        for table in tables:
            for i, page in enumerate(table):
                if page >= used:
                    hole = holes[len(target)]
                    source.append(page)
                    target.append(hole)
                    table[i] = hole
        self.copy(source, target)
        self.free = list(range(used, self.pages))

    def grow(self, pages: int) -> None:
        """Enlarge the pool to `pages`; pages in use keep their place and content.

        The old pool is held beside the new one until its content is copied. Where memory does not
        suffice for that, torch's error is raised and the pool stays as it was.
        """
        old_pages = self.pages
        if pages <= old_pages:
            return
        layers, _, kv_heads, page_size, head_dim = self.shape
        shape = (layers, pages, kv_heads, page_size, head_dim)
        k = self.k.new_empty(shape)
        v = self.v.new_empty(shape)
        self.shape = shape
        # one after the other: each old tensor is freed as soon as it is copied
        v[:, :old_pages] = self.v
        self.v = v
        k[:, :old_pages] = self.k
        self.k = k
        for page in range(old_pages, pages):
            heapq.heappush(self.free, page)

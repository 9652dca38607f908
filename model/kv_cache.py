"""Keys and values of the rows in flight, in pages: [layer, page, kv head, token, d]

A row's tokens fill its pages in order; pages come from one pool, lowest number first, so that the
pages in use lie together. A page is zeroed when it is handed out: what an earlier row left there
(a NaN, say) can never reach another row.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from model.config import LlamaConfig


class KVCache:
    """A pool of pages and who has them; the host's lists are authoritative."""

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

    @property
    def pages(self) -> int:
        """Pages in all."""
        return self.shape[1]

    def pages_for(self, tokens: int) -> int:
        """Pages that a row of so many tokens needs."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` zeroed pages; the caller has looked at `free` before."""
        assert count <= len(self.free), f"{count} pages wanted, {len(self.free)} are free"
        taken = [heapq.heappop(self.free) for _ in range(count)]
        for page in taken:
            self.k[:, page] = 0
            self.v[:, page] = 0
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Return a finished row's pages."""
        for page in pages:
            heapq.heappush(self.free, page)

    def grow(self, pages: int) -> None:
        """Enlarge the pool to `pages`; what is in use keeps its place and content."""
        old = self.pages
        if pages <= old:
            return
        self.shape = (self.shape[0], pages, *self.shape[2:])
        for name in ("k", "v"):
            bigger = getattr(self, name).new_empty(self.shape)
            bigger[:, :old] = getattr(self, name)
            setattr(self, name, bigger)
        for page in range(old, pages):
            heapq.heappush(self.free, page)

"""Who attends to whom: the two descriptions that travel beside the tokens of a forward.

`Packed`  rows laid end to end, each attending to itself causally: training and scoring.
`Cached`  rows whose earlier tokens lie in pages of a key/value cache: prefill and decoding.

Both hold host lists, which are authoritative, beside device mirrors, so that nothing in a step has
to ask the device. Both are built once per step and shared by all layers.
"""

# T = tokens of this forward, B = rows, P = pages of the longest row

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: row i is tokens starts[i] .. starts[i + 1]."""

    starts: tuple[int, ...]  # (rows + 1,) host, starts[0] = 0, starts[-1] = T
    positions: Tensor  # (T,) int64, restarts at 0 in every row
    cu_seqlens: Tensor  # (rows + 1,) int32 device mirror of `starts`
    row_keys: Tensor | None = None  # (T,) int64: 32-bit hash of the row id, for dropout
    step: Tensor | None = None  # () int64: the optimizer step, for dropout

    @classmethod
    def from_lengths(
        cls,
        lengths: list[int],
        device: str | torch.device = "cpu",
        row_keys: list[int] | None = None,
        step: int = 0,
    ) -> Packed:
        """Describe rows of the given lengths (all positive)."""
        assert all(n > 0 for n in lengths), f"row lengths must be positive, got {lengths}"
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        positions = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
        keys = None
        if row_keys is not None:
            assert len(row_keys) == len(lengths), f"{len(row_keys)} keys, {len(lengths)} rows"
            keys = torch.repeat_interleave(torch.tensor(row_keys), torch.tensor(lengths)).to(device)
        return cls(
            starts=tuple(starts),
            positions=positions.to(device),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
            row_keys=keys,
            step=torch.tensor(step, device=device),
        )

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(start, end) of every row."""
        return list(zip(self.starts[:-1], self.starts[1:], strict=True))


@dataclass(frozen=True)
class Cached:
    """New tokens of rows whose earlier tokens lie in a paged cache.

    Row i brings query_lens[i] tokens, laid end to end, to the context_lens[i] tokens that the cache
    holds already; they are written behind those and attend to everything before them.
    """

    query_lens: tuple[int, ...]  # (B,) host, new tokens per row, at least 1
    context_lens: tuple[int, ...]  # (B,) host, tokens in the cache before this forward
    tables: tuple[tuple[int, ...], ...]  # (B,) host, the pages of each row in order
    page_size: int  # tokens per page
    positions: Tensor  # (T,) int64
    write_page: Tensor  # (T,) int64: where each token's key and value go
    write_offset: Tensor  # (T,) int64
    last: Tensor  # (B,) int64: index of each row's last new token
    block_table: Tensor  # (B, P) int64 device mirror of `tables`, padded with page 0
    pages_used: Tensor  # (B, P) bool: False where block_table is padding
    cu_queries: Tensor  # (B + 1,) int32: row i's new tokens are cu_queries[i] .. cu_queries[i + 1]
    contexts: Tensor  # (B,) int32 device mirror of `context_lens`
    pool: Pool | None = field(default=None)  # decode steps only

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        tables: list[list[int]],
        page_size: int,
        device: str | torch.device = "cpu",
    ) -> Cached:
        """Describe one forward; pages for the new tokens must be in `tables` already."""
        assert len(query_lens) == len(context_lens) == len(tables), "one entry per row in each list"
        positions, page, offset = [], [], []
        used, ends = [], [0]
        for new, context, table in zip(query_lens, context_lens, tables, strict=True):
            total = context + new
            used.append(-(-total // page_size))
            assert new > 0 and len(table) >= used[-1], (
                f"row of {context} + {new} tokens has {len(table)} pages of {page_size}"
            )
            span = range(context, total)
            positions.extend(span)
            page.extend(table[p // page_size] for p in span)
            offset.extend(p % page_size for p in span)
            ends.append(len(positions))
        rows, width = len(used), max(used, default=0)
        padded = [
            list(t[:n]) + [0] * (width - n) for t, n in zip(tables, used, strict=True)
        ]  # a page behind the row's tokens is not looked at
        pool = None
        if all(n == 1 for n in query_lens) and query_lens:
            pool = Pool.build(context_lens, tables, used, page_size, device)
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            tables=tuple(tuple(t) for t in tables),
            page_size=page_size,
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            write_page=torch.tensor(page, dtype=torch.int64, device=device),
            write_offset=torch.tensor(offset, dtype=torch.int64, device=device),
            last=torch.tensor([end - 1 for end in ends[1:]], dtype=torch.int64, device=device),
            block_table=torch.tensor(padded, dtype=torch.int64, device=device).view(rows, width),
            pages_used=torch.tensor(
                [[p < n for p in range(width)] for n in used], dtype=torch.bool, device=device
            ).view(rows, width),
            cu_queries=torch.tensor(ends, dtype=torch.int32, device=device),
            contexts=torch.tensor(context_lens, dtype=torch.int32, device=device),
            pool=pool,
        )


@dataclass(frozen=True)
class Pool:
    """A decode step seen from the cache: for every page, whose it is and which tokens count.

    Lets the torch path read every page where it lies (a gather would copy the whole context).
    """

    pages: int  # pages 0 .. pages - 1 of the cache are looked at
    owner: Tensor  # (pages,) int64: row that owns the page; 0 where nobody does
    hidden: Tensor  # (pages, page_size) bool: True for a token that must not be attended to

    @classmethod
    def build(
        cls,
        context_lens: list[int],
        tables: list[list[int]],
        used: list[int],
        page_size: int,
        device: str | torch.device,
    ) -> Pool:
        """One new token per row, so row i has context_lens[i] + 1 tokens."""
        pages = 1 + max(max(t[:n]) for t, n in zip(tables, used, strict=True))
        owner, visible = [0] * pages, [0] * pages
        for row, (context, table, n) in enumerate(zip(context_lens, tables, used, strict=True)):
            for i, page in enumerate(table[:n]):
                owner[page] = row
                visible[page] = min(page_size, context + 1 - i * page_size)
        offsets = torch.arange(page_size, device=device)
        return cls(
            pages=pages,
            owner=torch.tensor(owner, dtype=torch.int64, device=device),
            hidden=offsets >= torch.tensor(visible, device=device)[:, None],
        )

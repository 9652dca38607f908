"""Who attends to whom: the two descriptions that travel beside the tokens of a forward.

`Packed`  rows laid end to end, each attending to itself causally: training and scoring.
`Cached`  rows whose earlier tokens lie in pages of a key/value cache: prefill and decoding.

Both hold host lists, which are authoritative, beside device mirrors, so that nothing in a step has
to ask the device. Both are built once per step and shared by all layers.
"""


# T = tokens of this forward, B = rows, P = pages of the longest row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, combinations

import torch
from torch import Tensor

from kernels.packed import HIDDEN


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
    alone: bool  # sampled tokens and drafts, each computed as if it came alone; else prompts
    positions: Tensor  # (T,) int64
    write_page: Tensor  # (T,) int64: where each token's key and value go
    write_offset: Tensor  # (T,) int64
    last: Tensor  # (B,) int64: index of each row's last new token
    block_table: Tensor  # (B, P) int64 device mirror of `tables`, padded with page 0
    cu_queries: Tensor  # (B + 1,) int32: row i's new tokens are cu_queries[i] .. cu_queries[i + 1]
    contexts: Tensor  # (B,) int32 device mirror of `context_lens`
    memo: dict[int | None, list[Pass]] = field(default_factory=dict, compare=False)  # `passes`
    cut: dict[int, Cached] = field(default_factory=dict, compare=False)  # `pieces`

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: str | torch.device = "cpu",
        alone: bool | None = None,
        ahead: int = 0,
    ) -> Cached:
        """Describe one forward; pages for the new tokens must be in `tables` already.

        alone None: decoding if every row brings one token. `ahead`: how often `advance` may be
        called; pages for those tokens must be in `tables` too.
        """
        assert len(query_lens) == len(context_lens) == len(tables), "one entry per row in each list"
        positions, page, offset = [], [], []
        used, ends = [], [0]
        for new, context, table in zip(query_lens, context_lens, tables, strict=True):
            total = context + new
            used.append(-(-(total + ahead) // page_size))
            assert new > 0 and len(table) >= used[-1], (
                f"row of {context} + {new} + {ahead} tokens has {len(table)} pages of {page_size}"
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
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            tables=tuple(tuple(t[:n]) for t, n in zip(tables, used, strict=True)),
            page_size=page_size,
            alone=all(n == 1 for n in query_lens) if alone is None else alone,
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            write_page=torch.tensor(page, dtype=torch.int64, device=device),
            write_offset=torch.tensor(offset, dtype=torch.int64, device=device),
            last=torch.tensor([end - 1 for end in ends[1:]], dtype=torch.int64, device=device),
            block_table=torch.tensor(padded, dtype=torch.int64, device=device).view(rows, width),
            cu_queries=torch.tensor(ends, dtype=torch.int32, device=device),
            contexts=torch.tensor(context_lens, dtype=torch.int32, device=device),
        )

    def advance(self) -> Cached:
        """The same rows one token later, after a step in which each brought one token.

        The device mirrors are moved in place and nothing is copied to the device, so that steps
        can follow each other without a visit to the host (and be captured).
        """
        assert len(self.positions) == len(self.query_lens), "only single tokens can be advanced"
        self.positions.add_(1)
        self.contexts.add_(1)
        page = (self.positions // self.page_size)[:, None]
        self.write_page.copy_(self.block_table.gather(1, page)[:, 0])
        self.write_offset.copy_(self.positions % self.page_size)
        return replace(self, context_lens=tuple(n + 1 for n in self.context_lens), memo={})

    def passes(self, width: int | None) -> list[Pass]:
        """The new tokens as queries of their own: all in one pass at least `width` wide, or, for
        None, by depth: every row's first, every row's second, ..."""
        if width not in self.memo:
            if width is None:
                depths = range(max(self.query_lens, default=0))
                made = [Pass.build(self, depth, 1) for depth in depths]
            else:
                made = [Pass.build(self, 0, max(width, *self.query_lens))]
            self.memo[width] = made
        return self.memo[width]

    def pieces(self, most: int) -> Cached:
        """The same tokens as rows of up to `most`: what is behind them is a row that continues.

        For attention over a cache that holds all of them already.
        """
        if max(self.query_lens, default=0) <= most:
            return self
        if most not in self.cut:
            new, context, tables = [], [], []
            for m, c, table in zip(self.query_lens, self.context_lens, self.tables, strict=True):
                starts = range(0, m, most)
                new += [min(most, m - start) for start in starts]
                context += [c + start for start in starts]
                tables += [table] * len(starts)
            device = self.positions.device
            self.cut[most] = Cached.build(new, context, tables, self.page_size, device, self.alone)
        return self.cut[most]

    @cached_property
    def blocks(self) -> list[Block]:
        """The new tokens by the page they lie in."""
        found: dict[int, list[tuple[int, int]]] = {}  # page of its row -> (row, first new token)
        start = 0
        for row, (new, context) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            for b in range(context // self.page_size, (context + new - 1) // self.page_size + 1):
                found.setdefault(b, []).append((row, start - context))
            start += new
        return [Block.build(self, b, rows) for b, rows in sorted(found.items())]


def _widths(counts: Sequence[int]) -> list[int]:
    """Up to three page counts such that rows padded to the next of them make the least padding.

    A further width is worth SPLIT pages: the calls it takes.
    """
    SPLIT, values = 24, sorted(set(counts))
    most, inner = values[-1], values[:-1]
    tried = [
        [most],
        *([a, most] for a in inner),
        *([a, b, most] for a, b in combinations(inner, 2)),
    ]

    def cost(widths: list[int]) -> int:
        padded = sum(next(w for w in widths if w >= n) for n in counts)
        return padded + SPLIT * len(widths)

    return min(tried, key=cost)


@dataclass(frozen=True)
class Rows:
    """Rows of a `Pass` whose pages lie side by side, padded to the same number P."""

    table: Tensor  # (b, P) int64: the rows' pages, padded with the number of pages looked at
    hidden: Tensor  # (b, W, P * page_size): 0, or HIDDEN for what must not be attended to
    first: int  # where their b P places begin among those of all rows


@dataclass(frozen=True)
class Pass:
    """Up to W queries per row, seen from the cache: the torch path reads all pages where they lie.

    (A gather would copy the whole context.) What a page computes, its lines, are numbered within
    it: key/value head, query, query head of the group.
    """

    pages: int  # pages 0 .. pages - 1 of the cache are looked at
    width: int  # W
    tokens: Tensor | None  # (B W,) int64: each query's place among the new tokens, idle ones
    #   repeat; None where every row has one and they stand in order
    live: Tensor | None  # (m,) int64: of these the ones that are no repeats; None for all
    owner: Tensor  # (pages,) int64: row whose queries meet the page; any where nobody does
    groups: list[Rows]
    order: Tensor | None  # (B,) int64: place of each row in the groups end to end; None: as it is
    place: Tensor  # (pages,) int64: the page's place among those of all groups; 0: nobody's
    stride: Tensor  # (pages,) int64: P of its row's group
    memo: dict[int, tuple[list[Tensor], Tensor]]  # lines of a page -> what `spread` gave

    @classmethod
    def build(cls, cached: Cached, depth: int, width: int) -> Pass:
        """Tokens number depth .. depth + width - 1 of the rows that have so many."""
        size, device = cached.page_size, cached.positions.device
        starts = [0, *accumulate(cached.query_lens)]
        rows = [i for i, new in enumerate(cached.query_lens) if new > depth]
        tokens, live, lengths, tables = [], [], [], []
        for b, i in enumerate(rows):
            new = min(width, cached.query_lens[i] - depth)
            steps = [min(w, new - 1) for w in range(width)]
            tokens += [starts[i] + depth + w for w in steps]
            live += [b * width + w for w in range(new)]
            lengths.append([cached.context_lens[i] + depth + w + 1 for w in steps])
            tables.append(cached.tables[i][: -(-lengths[-1][-1] // size)])
        pages = 1 + max(map(max, tables))
        owner, place, stride = [0] * pages, [0] * pages, [1] * pages
        groups, order, first, least = [], [], 0, 0
        for P in _widths([len(table) for table in tables]):
            members = [b for b, table in enumerate(tables) if least < len(table) <= P]
            for j, b in enumerate(members):
                for p, page in enumerate(tables[b]):
                    owner[page], place[page], stride[page] = b, first + j * P + p, P
            padded = [[*tables[b], *[pages] * (P - len(tables[b]))] for b in members]
            seen = torch.tensor([lengths[b] for b in members])[:, :, None]
            behind = torch.arange(P * size) >= seen
            groups.append(
                Rows(
                    table=torch.tensor(padded, device=device),
                    hidden=torch.zeros(behind.shape).masked_fill_(behind, HIDDEN).to(device),
                    first=first,
                )
            )
            order += members
            first, least = first + P * len(members), P
        back = sorted(range(len(order)), key=order.__getitem__)
        every = len(live) == len(tokens)
        alone = width == 1 and tokens == list(range(len(cached.positions)))
        return cls(
            pages=pages,
            width=width,
            tokens=None if alone else torch.tensor(tokens, device=device),
            live=None if every else torch.tensor(live, device=device),
            owner=torch.tensor(owner, device=device),
            groups=groups,
            order=None if len(groups) == 1 else torch.tensor(back, device=device),
            place=torch.tensor(place, device=device),
            stride=torch.tensor(stride, device=device),
            memo={},
        )

    def spread(self, L: int) -> tuple[list[Tensor], Tensor]:
        """Between page order (page, line) and row order (group, row, line, page of the row): for
        each group where its lines lie in the first, (b L P,), and for the first where its lines
        lie in the second, (pages * L,).
        """
        if L not in self.memo:
            lines = torch.arange(L, device=self.place.device)
            there = [
                (g.table.clamp(max=self.pages - 1)[:, None] * L + lines[:, None]).flatten()
                for g in self.groups
            ]
            start = torch.zeros_like(self.place)  # of the page's group
            for g in self.groups[1:]:
                start[self.place >= g.first] = g.first
            row, page = (self.place - start) // self.stride, (self.place - start) % self.stride
            back = ((start + row * self.stride) * L)[:, None] + lines * self.stride[:, None]
            self.memo[L] = there, (back + page[:, None]).flatten()
        return self.memo[L]


@dataclass(frozen=True)
class Block:
    """Queries at the places of one page of their rows, against all pages up to it.

    The shape of what is computed follows from the place alone, not from where a prompt was cut.
    """

    pages: int  # keys of the first so many pages of each row
    gather: Tensor  # (rows * page_size,) int64: token at each place; 0 where there is none
    scatter: Tensor  # (m,) int64: tokens that are here ...
    source: Tensor  # (m,) int64: ... and their places
    table: Tensor  # (rows, pages) int64

    @classmethod
    def build(cls, cached: Cached, b: int, rows: list[tuple[int, int]]) -> Block:
        """Page b of the rows (row, place of its token 0 among the new tokens)."""
        size, device = cached.page_size, cached.positions.device
        gather = [0] * (len(rows) * size)
        scatter, source = [], []
        for j, (row, zero) in enumerate(rows):
            context, new = cached.context_lens[row], cached.query_lens[row]
            for p in range(max(context, b * size), min(context + new, (b + 1) * size)):
                source.append(j * size + p - b * size)
                scatter.append(zero + p)
                gather[source[-1]] = zero + p
        index = (gather, scatter, source, [cached.tables[row][: b + 1] for row, _ in rows])
        return cls(b + 1, *(torch.tensor(i, device=device) for i in index))

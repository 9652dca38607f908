"""Index tensors of a `Cached` for attention over pages on torch products (on a CPU)

`passes(cached, width)`   decode: new tokens as queries of their own; pages are read where they lie
`blocks(cached)`          prefill: new tokens by the page that they lie in

kernels/cached_attention/torch_form.py computes with them. Each is made once per `Cached` and kept
in its memo for all layers.

A decode pass, for two sequences A (6 keys) and B (3 keys), pages of 4 tokens:

    cache, in page order       page 0      page 1      page 2      page 3
    keys                       A4 A5 . .   (unused)    A0 .. A3    B0 B1 B2 .
    owner  page -> sequence    A           any         A           B

    padded, in sequence order  P = 2 pages each (one group)
    A                          page 2      page 0          slots 0, 1
    B                          page 3      (padding)       slots 2, 3
    hidden                     A: 0 0 0 0  0 0 - -     B: 0 0 0 -  - - - -      (-: HIDDEN)
    slot   page -> slot        page 0: 1   page 2: 0   page 3: 2   page 1: 0 (unused)

Scores are computed in page order, a product for each page with the queries of its owner. Softmax
needs a sequence's pages side by side: sequence order. Values are again read in page order.
`Pass.spread` holds the indices between the two orders.
"""

# T = new tokens, B = sequences of a pass, W = queries per sequence, P = pages per padded sequence
# G = key/value heads, n = query heads per key/value head
# L = G W n lines: what a page computes, ordered by key/value head, query, query head of the group

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.integers import cdiv
from kernels.packed import HIDDEN

EXTRA_WIDTH = 24  # pages of padding that one more width must save: it costs further calls

# ---- decode


@dataclass(frozen=True)
class PaddedGroup:
    """Sequences of a `Pass` with their pages side by side, padded to the same number P."""

    table: Tensor  # (b, P) int64: (sequence of the group, index of a page) -> page; padded with
    #   the number of pages that are read, one more than the last
    hidden: Tensor  # (b, W, P * page_size) fp32, added to scores: 0, or HIDDEN for a key that the
    #   query must not attend to
    first: int  # its b P slots are first .. first + b P - 1 of those of all groups


@dataclass(frozen=True)
class Pass:
    """W queries for each of B sequences, seen from the cache: all pages are read where they lie.

    (A gather would copy the whole context.)
    """

    pages: int  # pages 0 .. pages - 1 of the cache are read
    width: int  # W
    tokens: Tensor | None  # (B W,) int64: query -> new token; a sequence with fewer than W repeats
    #   its last. None where every sequence has one query and they are in the order of the tokens
    live: Tensor | None  # (m,) int64: the queries that are no repeats; None where all are
    owner: Tensor  # (pages,) int64: page -> sequence whose queries meet it; unused page: any
    groups: list[PaddedGroup]
    order: Tensor | None  # (B,) int64: sequence -> its index in the groups laid end to end; None
    #   where there is one group, which has them in order
    slot: Tensor  # (pages,) int64: page -> its slot among those of all groups; unused page: 0
    stride: Tensor  # (pages,) int64: page -> P of the group of its sequence; unused page: 1
    memo: dict[int, tuple[list[Tensor], Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def build(cls, cached: Cached, depth: int, width: int) -> Pass:
        """New tokens number depth .. depth + width - 1 of the sequences that have so many."""
        device = cached.positions.device
        queries = _queries(cached, depth, width)
        tables = [q.table for q in queries]
        pages = 1 + max(map(max, tables))
        grouped = _group_by_page_count([len(table) for table in tables])
        owner, slot, stride = _page_places(tables, grouped, pages)
        tokens, live = _query_places(queries, width, len(cached.positions))
        groups, first = [], 0
        for P, members in grouped:
            chosen = [queries[b] for b in members]
            groups.append(_padded_group(chosen, P, pages, cached.page_size, first, device))
            first += P * len(members)

        def index(values: list[int] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, device=device)

        return cls(
            pages=pages,
            width=width,
            tokens=index(tokens),
            live=index(live),
            owner=index(owner),
            groups=groups,
            order=index(_order_in_groups(grouped, len(queries))),
            slot=index(slot),
            stride=index(stride),
        )

    def spread(self, L: int) -> tuple[list[Tensor], Tensor]:
        """Where lines lie in page order (page, line), and in sequence order (group, sequence, line,
        index of the page).

        from_pages  for each group (b L P,) int64: place in sequence order -> line in page order
        to_pages    (pages * L,) int64: line in page order -> place in sequence order, all groups
        """
        if L not in self.memo:
            lines = torch.arange(L, device=self.slot.device)
            from_pages = []
            for group in self.groups:
                page = group.table.clamp(max=self.pages - 1)  # padding: any page, it is hidden
                from_pages.append((page[:, None] * L + lines[:, None]).flatten())  # (b, L, P)
            group_start = torch.zeros_like(self.slot)  # (pages,) first slot of the page's group
            for group in self.groups[1:]:
                group_start[self.slot >= group.first] = group.first
            within = self.slot - group_start
            sequence, page_index = within // self.stride, within % self.stride  # (pages,)
            first_line = (group_start + sequence * self.stride) * L
            places = first_line[:, None] + lines * self.stride[:, None]  # (pages, L)
            self.memo[L] = from_pages, (places + page_index[:, None]).flatten()
        return self.memo[L]


def passes(cached: Cached, width: int | None) -> list[Pass]:
    """The new tokens as queries of their own.

    All in one pass at least `width` queries wide; or, for None, a pass for every depth: each
    sequence's first token, each one's second, ...
    """
    key = ("passes", width)
    if key not in cached.memo:
        longest = max(cached.query_lens, default=0)
        if width is None:
            cached.memo[key] = [Pass.build(cached, depth, 1) for depth in range(longest)]
        else:
            cached.memo[key] = [Pass.build(cached, 0, max(width, longest))]
    return cached.memo[key]


# ---- the steps of Pass.build, on the host


@dataclass(frozen=True)
class _Queries:
    """The W queries of one sequence."""

    tokens: list[int]  # (W,) their places among the new tokens; the last one repeats
    count: int  # how many are no repeats
    lengths: list[int]  # (W,) keys that each attends to
    table: tuple[int, ...]  # the pages that hold those keys, in order


def _queries(cached: Cached, depth: int, width: int) -> list[_Queries]:
    """The queries of the sequences that bring more than `depth` tokens."""
    starts = [0, *accumulate(cached.query_lens)]
    queries = []
    for i, new in enumerate(cached.query_lens):
        if new <= depth:
            continue
        count = min(width, new - depth)
        numbers = [depth + min(w, count - 1) for w in range(width)]  # of the sequence's new tokens
        lengths = [cached.context_lens[i] + number + 1 for number in numbers]
        table = cached.tables[i][: cdiv(lengths[-1], cached.page_size)]
        queries.append(_Queries([starts[i] + m for m in numbers], count, lengths, table))
    return queries


def _query_places(
    queries: list[_Queries], width: int, T: int
) -> tuple[list[int] | None, list[int] | None]:
    """`Pass.tokens` and `Pass.live`."""
    tokens = [token for q in queries for token in q.tokens]
    live = [b * width + w for b, q in enumerate(queries) for w in range(q.count)]
    in_order = width == 1 and tokens == list(range(T))
    all_live = len(live) == len(tokens)
    return None if in_order else tokens, None if all_live else live


def _group_by_page_count(counts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(P, the sequences that are padded to P pages) for each of up to three P, rising."""
    grouped, least = [], 0
    for P in _widths(counts):
        grouped.append((P, [b for b, count in enumerate(counts) if least < count <= P]))
        least = P
    return grouped


def _widths(counts: Sequence[int]) -> list[int]:
    """Up to three page counts, rising, such that padding each sequence to the next costs least."""
    *inner, most = sorted(set(counts))
    choices = [[most]]
    choices += [[a, most] for a in inner]
    choices += [[a, b, most] for a, b in combinations(inner, 2)]

    def cost(widths: list[int]) -> int:
        padded = sum(next(width for width in widths if width >= count) for count in counts)
        return padded + EXTRA_WIDTH * len(widths)

    return min(choices, key=cost)


def _page_places(
    tables: list[tuple[int, ...]], grouped: list[tuple[int, list[int]]], pages: int
) -> tuple[list[int], list[int], list[int]]:
    """`Pass.owner`, `Pass.slot` and `Pass.stride`."""
    owner, slot, stride = [0] * pages, [0] * pages, [1] * pages
    first = 0
    for P, members in grouped:
        for j, b in enumerate(members):
            for p, page in enumerate(tables[b]):
                owner[page] = b
                slot[page] = first + j * P + p
                stride[page] = P
        first += P * len(members)
    return owner, slot, stride


def _padded_group(
    queries: list[_Queries],
    P: int,
    pages: int,
    page_size: int,
    first: int,
    device: torch.device,
) -> PaddedGroup:
    padded = [[*q.table, *[pages] * (P - len(q.table))] for q in queries]
    lengths = torch.tensor([q.lengths for q in queries])  # (b, W)
    is_hidden = torch.arange(P * page_size) >= lengths[:, :, None]  # (b, W, P * page_size)
    hidden = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, HIDDEN)
    return PaddedGroup(torch.tensor(padded, device=device), hidden.to(device), first)


def _order_in_groups(grouped: list[tuple[int, list[int]]], B: int) -> list[int] | None:
    """`Pass.order`."""
    if len(grouped) == 1:
        return None
    order = [0] * B
    end_to_end = [b for _, members in grouped for b in members]
    for index, b in enumerate(end_to_end):
        order[b] = index
    return order


# ---- prefill


@dataclass(frozen=True)
class Block:
    """Queries at the places of one page of their sequences, against all pages up to it.

    The shape of the computation follows from the place alone, not from how a prompt was cut.
    """

    pages: int  # the keys of each sequence's first so many pages are read
    gather: Tensor  # (b * page_size,) int64: place -> new token; 0 where the place has none
    scatter: Tensor  # (m,) int64: the new tokens of this block ...
    source: Tensor  # (m,) int64: ... and their places
    table: Tensor  # (b, pages) int64: (sequence, index of a page) -> page

    @classmethod
    def build(cls, cached: Cached, page_index: int, sequences: list[tuple[int, int]]) -> Block:
        """Page number `page_index` of these sequences.

        sequences: (i, the place that the sequence's token 0 would have among the new tokens).
        """
        size, device = cached.page_size, cached.positions.device
        page_start, page_end = page_index * size, (page_index + 1) * size
        gather = [0] * (len(sequences) * size)
        scatter, source, table = [], [], []
        for j, (i, zero) in enumerate(sequences):
            context, new = cached.context_lens[i], cached.query_lens[i]
            for position in range(max(context, page_start), min(context + new, page_end)):
                place = j * size + position - page_start
                gather[place] = zero + position
                scatter.append(zero + position)
                source.append(place)
            table.append(cached.tables[i][: page_index + 1])
        return cls(
            pages=page_index + 1,
            gather=torch.tensor(gather, device=device),
            scatter=torch.tensor(scatter, device=device),
            source=torch.tensor(source, device=device),
            table=torch.tensor(table, device=device),
        )


def blocks(cached: Cached) -> list[Block]:
    """The new tokens by the page of their sequence that they lie in, earlier pages first."""
    key = ("blocks",)
    if key not in cached.memo:
        size = cached.page_size
        by_page: dict[int, list[tuple[int, int]]] = {}  # page index -> (i, place of token 0)
        start = 0
        for i, (new, context) in enumerate(
            zip(cached.query_lens, cached.context_lens, strict=True)
        ):
            last = (context + new - 1) // size
            for page_index in range(context // size, last + 1):
                by_page.setdefault(page_index, []).append((i, start - context))
            start += new
        cached.memo[key] = [Block.build(cached, b, rows) for b, rows in sorted(by_page.items())]
    return cached.memo[key]

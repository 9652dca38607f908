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

A prefill block, for two sequences C (3 cached tokens, new ones number 0 .. 5) and D (none cached,
new ones number 6 and 7), the page with index 0 of each:

    position                   C: 0 1 2 3      D: 0 1 2 3
    place                         0 1 2 3         4 5 6 7
    gather  place -> token        - - - 0         6 7 - -          (-: none, 0 is stored)
    source                     places 3, 4, 5
    scatter                    tokens 0, 6, 7
"""

# T = new tokens, B = sequences of a pass or a block, b = sequences of a group
# W = queries per sequence, P = pages per padded sequence
# G = key/value heads, n = query heads per key/value head
# L = G W n lines: what a page computes, ordered by key/value head, query, query head of the group

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

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
        pages = 1 + max(max(table) for table in tables)
        memberships = _group_by_page_count([len(table) for table in tables])
        places = _page_places(tables, memberships, pages)
        groups = []
        for membership in memberships:
            members = [queries[b] for b in membership.sequences]
            groups.append(_padded_group(members, membership, pages, cached.page_size, device))

        def index(values: list[int] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, device=device)

        return cls(
            pages=pages,
            width=width,
            tokens=index(_query_tokens(queries, width, len(cached.positions))),
            live=index(_live_queries(queries, width)),
            owner=index(places.owner),
            groups=groups,
            order=index(_order_in_groups(memberships)),
            slot=index(places.slot),
            stride=index(places.stride),
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
                in_page_order = page[:, None] * L + lines[:, None]  # (b, L, P)
                from_pages.append(in_page_order.flatten())
            group_start = torch.zeros_like(self.slot)  # (pages,) first slot of the page's group
            for group in self.groups[1:]:
                group_start[self.slot >= group.first] = group.first
            within = self.slot - group_start  # (pages,) slot within the group
            sequence = within // self.stride  # (pages,) number of its sequence in the group
            page_index = within % self.stride  # (pages,)
            sequence_start = (group_start + sequence * self.stride) * L  # (pages,)
            line_start = sequence_start[:, None] + lines * self.stride[:, None]  # (pages, L)
            to_pages = line_start + page_index[:, None]  # (pages, L)
            self.memo[L] = from_pages, to_pages.flatten()
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
    queries = []
    start = 0  # the sequence's first new token
    sequences = zip(cached.query_lens, cached.context_lens, cached.tables, strict=True)
    for new, context, table in sequences:
        if new > depth:
            count = min(width, new - depth)
            numbers = [depth + min(w, count - 1) for w in range(width)]  # within the sequence
            tokens = [start + number for number in numbers]
            lengths = [context + number + 1 for number in numbers]
            read = table[: cdiv(lengths[-1], cached.page_size)]
            queries.append(_Queries(tokens, count, lengths, read))
        start += new
    return queries


def _query_tokens(queries: list[_Queries], width: int, T: int) -> list[int] | None:
    """`Pass.tokens`; T is the number of all new tokens."""
    tokens: list[int] = []
    for q in queries:
        tokens += q.tokens
    in_order = width == 1 and tokens == list(range(T))
    return None if in_order else tokens


def _live_queries(queries: list[_Queries], width: int) -> list[int] | None:
    """`Pass.live`."""
    live: list[int] = []
    for b, q in enumerate(queries):
        live += range(b * width, b * width + q.count)
    all_live = len(live) == len(queries) * width
    return None if all_live else live


@dataclass(frozen=True)
class _Membership:
    """The sequences of one group."""

    P: int  # pages that each is padded to
    sequences: list[int]  # (b,) their numbers among those of the pass
    first: int  # the group's first slot among the slots of all groups


def _group_by_page_count(counts: list[int]) -> list[_Membership]:
    """Up to three groups, by how many pages each sequence has; P rises."""
    memberships = []
    shorter = 0  # P of the group before
    first = 0
    for P in _widths(counts):
        members = [b for b, count in enumerate(counts) if shorter < count <= P]
        memberships.append(_Membership(P, members, first))
        shorter = P
        first += P * len(members)
    return memberships


def _widths(counts: list[int]) -> list[int]:
    """Up to three page counts, rising, such that padding each sequence to the next costs least."""
    *inner, most = sorted(set(counts))
    choices = [[most]]
    choices += [[a, most] for a in inner]
    choices += [[a, b, most] for a, b in combinations(inner, 2)]

    def padded(count: int, widths: list[int]) -> int:
        return min(width for width in widths if width >= count)

    def cost(widths: list[int]) -> int:
        pages = sum(padded(count, widths) for count in counts)
        return pages + EXTRA_WIDTH * len(widths)

    return min(choices, key=cost)


@dataclass(frozen=True)
class _PagePlaces:
    """`Pass.owner`, `Pass.slot` and `Pass.stride`: an entry for each page."""

    owner: list[int]
    slot: list[int]
    stride: list[int]


def _page_places(
    tables: list[tuple[int, ...]], memberships: list[_Membership], pages: int
) -> _PagePlaces:
    places = _PagePlaces(owner=[0] * pages, slot=[0] * pages, stride=[1] * pages)
    for group in memberships:
        for j, b in enumerate(group.sequences):
            first = group.first + j * group.P  # the sequence's first slot
            for slot, page in enumerate(tables[b], first):
                places.owner[page] = b
                places.slot[page] = slot
                places.stride[page] = group.P
    return places


def _padded_group(
    queries: list[_Queries],
    membership: _Membership,
    pages: int,
    page_size: int,
    device: torch.device,
) -> PaddedGroup:
    P = membership.P
    table = []
    for q in queries:
        padding = [pages] * (P - len(q.table))
        table.append([*q.table, *padding])
    lengths = torch.tensor([q.lengths for q in queries])  # (b, W)
    keys = torch.arange(P * page_size)
    is_hidden = keys >= lengths[:, :, None]  # (b, W, P * page_size)
    hidden = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, HIDDEN)
    return PaddedGroup(torch.tensor(table, device=device), hidden.to(device), membership.first)


def _order_in_groups(memberships: list[_Membership]) -> list[int] | None:
    """`Pass.order`."""
    if len(memberships) == 1:
        return None
    end_to_end: list[int] = []
    for group in memberships:
        end_to_end += group.sequences
    order = [0] * len(end_to_end)
    for index, b in enumerate(end_to_end):
        order[b] = index
    return order


# ---- prefill


class _NewTokens(NamedTuple):
    """A sequence that brings tokens in some page."""

    sequence: int  # its number in the `Cached`
    zero: int  # index that its position 0 would have among the new tokens; may be negative


@dataclass(frozen=True)
class Block:
    """Queries at the places of one page of their sequences, against all pages up to it.

    The shape of the computation follows from the place alone, not from how a prompt was cut.
    """

    pages: int  # the keys of each sequence's first so many pages are read
    gather: Tensor  # (B * page_size,) int64: place -> new token; 0 where the place has none
    scatter: Tensor  # (m,) int64: the new tokens of this block ...
    source: Tensor  # (m,) int64: ... and their places
    table: Tensor  # (B, pages) int64: (sequence of the block, index of a page) -> page

    @classmethod
    def build(cls, cached: Cached, page_index: int, members: list[_NewTokens]) -> Block:
        """The page with index `page_index` of these sequences."""
        size, device = cached.page_size, cached.positions.device
        page_start = page_index * size  # a position
        gather = [0] * (len(members) * size)
        scatter: list[int] = []
        source: list[int] = []
        table: list[tuple[int, ...]] = []
        for j, (i, zero) in enumerate(members):
            table.append(cached.tables[i][: page_index + 1])
            context = cached.context_lens[i]
            start = max(context, page_start)
            end = min(context + cached.query_lens[i], page_start + size)
            for position in range(start, end):
                token = zero + position
                place = j * size + position - page_start
                gather[place] = token
                scatter.append(token)
                source.append(place)
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
        by_page = _members_by_page(cached)
        cached.memo[key] = [Block.build(cached, page, by_page[page]) for page in sorted(by_page)]
    return cached.memo[key]


def _members_by_page(cached: Cached) -> dict[int, list[_NewTokens]]:
    """Index of a page -> the sequences that bring tokens in their page of that index."""
    size = cached.page_size
    by_page: dict[int, list[_NewTokens]] = {}
    start = 0  # the sequence's first new token
    for i, (new, context) in enumerate(zip(cached.query_lens, cached.context_lens, strict=True)):
        first_page = context // size
        last_page = (context + new - 1) // size
        for page_index in range(first_page, last_page + 1):
            by_page.setdefault(page_index, []).append(_NewTokens(i, zero=start - context))
        start += new
    return by_page

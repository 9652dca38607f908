"""Who attends to whom over a key/value cache: prefill, decoding, verification of drafts.

`Cached` travels beside the tokens of a forward, as `Packed` (kernels/packed.py) does in training
and scoring. It holds host lists, which are authoritative, beside device mirrors, so that nothing in
a step has to read from the device. It is built once per step and shared by all layers.
"""

# T = new tokens, B = sequences, P = pages of the longest sequence

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.upload import upload


@dataclass(frozen=True)
class Cached:
    """New tokens of sequences whose earlier tokens are in a paged cache.

    Sequence i brings query_lens[i] new tokens, laid end to end, to the context_lens[i] tokens that
    the cache holds already. The new ones are written after those and attend to all before them.

        tables[i]             page 7    page 2    page 5       pages of 4 tokens
        tokens in the cache   a b c d   e f . .   . . . .      context_lens[i] = 6
        the new ones                        g h   k            query_lens[i] = 3
        positions                           6 7   8
        write_page                          2 2   5
        write_offset                        2 3   0
    """

    query_lens: tuple[int, ...]  # (B,) host, new tokens per sequence, at least 1
    context_lens: tuple[int, ...]  # (B,) host, tokens in the cache before this forward
    tables: tuple[tuple[int, ...], ...]  # (B,) host, block tables: each sequence's pages in order
    page_size: int  # tokens per page
    decode: bool  # sampled and draft tokens, each computed as if it came alone; else prefill
    positions: Tensor  # (T,) int64, within the sequence
    write_page: Tensor  # (T,) int64: page that each token's key and value are written to
    write_offset: Tensor  # (T,) int64: place in that page, 0 .. page_size - 1
    last: Tensor  # (B,) int64: index of each sequence's last new token
    block_table: Tensor  # (B, P) int64 device mirror of `tables`, padded with page 0
    cu_queries: Tensor  # (B + 1,) int32: new tokens of sequence i: cu_queries[i] .. cu_queries[i+1]
    contexts: Tensor  # (B,) int32 device mirror of `context_lens`
    # results that functions of this description keep for the next layer, by function and arguments
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: str | torch.device = "cpu",
        decode: bool | None = None,
        ahead: int = 0,
    ) -> Cached:
        """Describe one forward; pages for the new tokens must be in `tables` already.

        decode None: true if every sequence brings one token. `ahead`: how often `advance` may be
        called; pages for those tokens must be in `tables` too.
        """
        counts = len(query_lens), len(context_lens), len(tables)
        assert len(set(counts)) == 1, f"expected one entry per sequence in each list, got {counts}"
        positions: list[int] = []
        write_page: list[int] = []
        write_offset: list[int] = []
        own_tables: list[tuple[int, ...]] = []  # without the pages after a sequence's last token
        cu_queries = [0]
        for new, context, table in zip(query_lens, context_lens, tables, strict=True):
            total = context + new
            needed = cdiv(total + ahead, page_size)
            assert new > 0 and len(table) >= needed, (
                f"a sequence of {context} + {new} + {ahead} tokens has {len(table)} pages of "
                f"{page_size}"
            )
            own_tables.append(tuple(table[:needed]))
            for position in range(context, total):
                positions.append(position)
                write_page.append(table[position // page_size])
                write_offset.append(position % page_size)
            cu_queries.append(len(positions))
        last = [end - 1 for end in cu_queries[1:]]
        if decode is None:
            decode = all(n == 1 for n in query_lens)

        def index(values: Sequence[int]) -> Tensor:
            return upload(values, torch.int64, device)

        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            tables=tuple(own_tables),
            page_size=page_size,
            decode=decode,
            positions=index(positions),
            write_page=index(write_page),
            write_offset=index(write_offset),
            last=index(last),
            block_table=_block_table(own_tables, device),
            cu_queries=upload(cu_queries, torch.int32, device),
            contexts=upload(context_lens, torch.int32, device),
        )

    def advance(self) -> Cached:
        """The same sequences one token later, after a step in which each brought one token.

        The device mirrors are changed in place and nothing is copied to the device, so steps can
        follow each other without a host synchronisation (and be captured).
        """
        assert len(self.positions) == len(self.query_lens), "only single tokens can be advanced"
        self.positions.add_(1)
        self.contexts.add_(1)
        page_index = self.positions // self.page_size  # (B,), into each sequence's block table
        page = self.block_table.gather(1, page_index[:, None])  # (B, 1)
        self.write_page.copy_(page[:, 0])
        self.write_offset.copy_(self.positions % self.page_size)
        context_lens = tuple(context + 1 for context in self.context_lens)
        return replace(self, context_lens=context_lens, memo={})

    def pieces(self, most: int) -> Cached:
        """The same tokens as sequences of up to `most` new tokens each.

        A sequence that brings more becomes several, each with the pieces before it as context. For
        attention over a cache that all new tokens have been written to already.
        """
        if max(self.query_lens, default=0) <= most:
            return self
        key = ("pieces", most)
        if key not in self.memo:
            query_lens: list[int] = []
            context_lens: list[int] = []
            tables: list[tuple[int, ...]] = []
            sequences = zip(self.query_lens, self.context_lens, self.tables, strict=True)
            for new, context, table in sequences:
                for start in range(0, new, most):
                    query_lens.append(min(most, new - start))
                    context_lens.append(context + start)
                    tables.append(table)
            device = self.positions.device
            self.memo[key] = Cached.build(
                query_lens, context_lens, tables, self.page_size, device, self.decode
            )
        return self.memo[key]


def _block_table(tables: list[tuple[int, ...]], device: str | torch.device) -> Tensor:
    """(B, P) int64: the pages of each sequence, padded with page 0 to those of the longest."""
    P = max((len(table) for table in tables), default=0)
    padded = [list(table) + [0] * (P - len(table)) for table in tables]
    return upload(padded, torch.int64, device).view(len(tables), P)

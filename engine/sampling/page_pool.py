"""The pages of the rows in flight: how many there are, who has them, what is copied into them

What prompts have in common is computed once and copied: the beginning that many share (the
template), and the whole prompt for further samples of a row, whose pages are kept while such
samples wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from engine.runtime.process_memory import free_memory, is_out_of_memory
from engine.sampling.sequence import FlyingRow
from model.kv_cache import KVCache
from model.llama import Llama

SHARE = 0.9  # of a GPU's free memory is for keys and values, the rest for a step's own tensors
WORTH = 64  # prompt tokens saved from which on a forward for a common beginning pays


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The beginning that saves the most computation: its length times the prompts that have it."""
    group, n, saved, best = list(prompts), 0, WORTH, []
    while group:
        counts = Counter(p[n] for p in group if len(p) > n + 1)  # the last token is never shared
        if not counts:
            break
        token = counts.most_common(1)[0][0]
        group = [p for p in group if len(p) > n + 1 and p[n] == token]
        n += 1
        if n * (len(group) - 1) > saved:
            saved, best = n * (len(group) - 1), list(group[0][:n])
    return best


def shared_tokens(prefix: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of the prefix that a prompt begins with; its last token is always computed."""
    most = min(len(prefix), len(prompt) - 1)
    return next((n for n in range(most) if prefix[n] != prompt[n]), most)


def prefill_chunks(
    rows: Sequence[FlyingRow], size: int, chunk: int
) -> Iterator[list[tuple[FlyingRow, int, int]]]:
    """(row, start, end) of what is prefilled together, up to `chunk` tokens; prompts are cut at
    pages of `size` tokens only."""
    room, together = chunk, []
    for row in rows:
        start, end = row.filled, len(row.prompt)
        while start < end:
            stop = end if end - start <= room else (start + room) // size * size
            if stop > start:
                together.append((row, start, stop))
                room, start = room - (stop - start), stop
            if start < end or room < size:
                yield together
                room, together = chunk, []
    if together:
        yield together


class Pages:
    """A pool of pages for one run of a sampler."""

    def __init__(self, model: Llama, page_size: int, kv_memory: float) -> None:
        self.model, self.size, self.budget = model, page_size, kv_memory * 1e9
        self.cache: KVCache | None = None
        self.prefix: tuple[list[int], list[int]] = [], []  # tokens, pages
        self.kept: dict[tuple[int, ...], list[int]] = {}  # of ended rows, by prompt
        # torch's attention on a CPU does, up to the highest page in use
        packs = (model.ops.sampled or model.ops).packs
        self.read_as_it_lies = model.device.type == "cpu" and packs != "panels"
        self.spare = 0  # pages set aside for the idle rows of a captured step
        self.idle: list[int] = []  # these

    @property
    def free(self) -> int:
        """Pages that can be had at once."""
        return len(self.cache.free)

    def count(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def make_room(self, wanted: int, least: int) -> bool:
        """A pool of the wanted pages as far as memory allows, at least of `least`.

        False where a pool of `least` pages can be had only in the place of the one in use: a pool
        that grows lies beside the old one for a moment. The rows in it have to end first, and then
        `discard` makes room. ValueError where a GPU, or kv_memory, is too small for `least`.
        """
        wanted, least = wanted + self.spare, least + self.spare
        if self.cache is not None and len(self.cache.free) == self.cache.pages < wanted:
            self.discard()
        if self.cache is None:
            self._begin_pool(wanted, least)
        elif not self._grow(wanted, least):
            return False
        if not self.idle:
            self.idle = self.cache.take(self.spare)
        return True

    def _begin_pool(self, wanted: int, least: int) -> None:
        m, pages = self.model, self._allowed(wanted, least)
        while self.cache is None:
            try:
                self.cache = KVCache(m.config, pages, self.size, m.device, m.dtype)
            except RuntimeError as error:  # what is free may lie in pieces
                if not is_out_of_memory(error):
                    raise
                if pages == least:
                    raise ValueError(
                        f"{self._need(least)}, and {m.device} could not give them in one piece: "
                        "end other programs on it, or allow fewer new tokens"
                    ) from None
                pages = max(least, pages // 2)

    def _grow(self, wanted: int, least: int) -> bool:
        have = self.cache.pages
        if wanted <= have:
            return True
        pages = self._allowed(wanted, least)
        if self._by_the_card():  # the new pool must fit beside the old one
            pages = min(pages, int(SHARE * free_memory(self.model.device) // self._page_bytes()))
        try:
            if pages >= least:
                self.cache.grow(pages)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return self.cache.pages >= least

    def _by_the_card(self) -> bool:
        """Whether what the GPU has free is what a pool may take."""
        return not self.budget and self.model.device.type == "cuda"

    def _page_bytes(self) -> int:
        return KVCache.page_bytes(self.model.config, self.size, self.model.dtype)

    def _allowed(self, wanted: int, least: int) -> int:
        """Pages that a pool in the place of this one may have; ValueError for fewer than least."""
        page, budget = self._page_bytes(), self.budget
        if self._by_the_card():
            have = 0 if self.cache is None else self.cache.pages * page
            budget = SHARE * (free_memory(self.model.device) + have)
        elif not budget:
            return max(1, wanted)
        if least * page > budget:
            raise self._too_small(budget, least)
        return max(1, min(wanted, int(budget // page)))

    def _too_small(self, budget: float, least: int) -> ValueError:
        """What to say where not even one row fits."""
        need = self._need(least)
        if self.budget:
            return ValueError(
                f"kv_memory {budget / 1e9:.3g} GB: {need}; allow more, or fewer new tokens"
            )
        return ValueError(
            f"{need}, and {self.model.device} has {budget / 1e9:.3g} GB free for them beside the "
            "weights and what other programs hold; fewer new tokens, or a shorter prompt"
        )

    def _need(self, least: int) -> str:
        return f"the longest row needs {least * self._page_bytes() / 1e9:.3g} GB of keys and values"

    def discard(self) -> None:
        """Give the pool up, with all that is in it: no row may be in flight."""
        self.kept.clear()
        self.prefix, self.idle, self.cache = ([], []), [], None

    def begin(
        self, prompt: tuple[int, ...], twin: list[int] | None, more_wait: bool
    ) -> tuple[list[int], int]:
        """Pages for a prompt, and how many of its tokens are in them already.

        twin: the pages of a row in flight with the same prompt. more_wait: keep what is kept.
        """
        twin = self.kept.get(prompt, twin)
        if twin is not None:
            source, known = twin, len(prompt) - 1
        else:
            source, known = self.prefix[1], shared_tokens(self.prefix[0], prompt)
        pages = self.cache.take(self.count(len(prompt)))
        whole = self.count(known)
        self.cache.copy(source[:whole], pages[:whole])
        if prompt in self.kept and not more_wait:
            self.cache.give_back(self.kept.pop(prompt))
        return pages, known

    def end(self, prompt: tuple[int, ...], pages: list[int], more_wait: bool) -> None:
        """Give a row's pages back, but for its prompt's where more of it wait."""
        if more_wait and prompt not in self.kept:
            whole = self.count(len(prompt))
            self.kept[prompt], pages = pages[:whole], pages[whole:]
        self.cache.give_back(pages)

    def drop_kept(self) -> None:
        """Give back what is kept for samples that have not begun."""
        for pages in self.kept.values():
            self.cache.give_back(pages)
        self.kept.clear()

    def close(self) -> None:
        """Give back what no row has."""
        self.drop_kept()
        if self.cache is not None:
            self.cache.give_back([*self.prefix[1], *self.idle])
        self.prefix, self.idle = ([], []), []

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Bring the pages in use together where attention reads the pool as it lies.

        `tables`: those of the rows in flight; they are changed in place.
        """
        if not self.read_as_it_lies:
            return
        every = [t for t in (self.idle, self.prefix[1], *self.kept.values(), *tables) if t]
        used = sum(map(len, every))
        if used and max(map(max, every)) >= used + max(4, used // 8):
            self.cache.compact(every)

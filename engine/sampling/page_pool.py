"""The pages of the KV cache: how many there are, who holds them, what is copied into them

A page is what vLLM calls a block: the keys and values of `page_size` tokens in all layers. A
sequence's pages, in order, are its block table.

What prompts have in common is computed once and copied: the prefix that many share (the template),
and whole prompts. A duplicate prompt (a further sample) copies the pages of a running sequence, or
those that an ended one left while duplicates wait. Pages are copied, not shared, since the last one
of a prompt goes on to hold the sequence's own tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.runtime.process_memory import free_memory, is_out_of_memory
from engine.runtime.short_memory import attempt
from kernels.integers import cdiv
from model.kv_cache import KVCache
from model.llama import Llama

GPU_SHARE = 0.9  # of a GPU's free memory for the pool; the rest is for a step's own tensors
MIN_SAVED = 64  # prompt tokens that a shared prefix must save: its own forward costs something


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The prefix that saves the most computation: its length times the other prompts that have it.

    [] if none saves more than MIN_SAVED tokens. The last token of a prompt is never shared: its
    hidden state is needed.
    """
    group = list(prompts)  # all begin with the same `length` tokens
    length = 0
    saved = MIN_SAVED
    best: list[int] = []
    while group:
        longer = [p for p in group if len(p) > length + 1]
        if not longer:
            break
        next_tokens = Counter(p[length] for p in longer)
        ((most_common, _),) = next_tokens.most_common(1)
        group = [p for p in longer if p[length] == most_common]
        length += 1
        would_save = length * (len(group) - 1)
        if would_save > saved:
            saved = would_save
            best = list(group[0][:length])
    return best


def shared_tokens(prefix: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of the prefix a prompt begins with; its last token does not count."""
    limit = min(len(prefix), len(prompt) - 1)
    for n in range(limit):
        if prefix[n] != prompt[n]:
            return n
    return limit


class PagePool:
    """The KV cache of one sampler and the block tables that are not a running sequence's."""

    def __init__(self, model: Llama, page_size: int, kv_memory: float) -> None:
        self.model = model
        self.page_size = page_size
        self.budget = kv_memory * 1e9  # bytes; 0: not limited by the user
        self.cache: KVCache | None = None
        self.prefix_tokens: list[int] = []
        self.prefix_pages: list[int] = []
        self.prompt_pages: dict[tuple[int, ...], list[int]] = {}  # of ended sequences' prompts
        # Empty slots of a captured step write into these (cuda_graphs.py).
        self.num_padding_pages = 0
        self.padding_pages: list[int] = []
        # torch's attention on a CPU reads the pool up to the highest page in use.
        packs = (model.ops.sampled or model.ops).packs
        self.reads_whole_pool = model.device.type == "cpu" and packs != "panels"

    @property
    def num_free(self) -> int:
        """Pages that nothing holds."""
        return len(self.cache.free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return cdiv(tokens, self.page_size)

    # ---- the size of the pool

    def ensure_pages(self, wanted: int, least: int) -> bool:
        """Make the pool `wanted` pages large as far as memory allows, at least `least`.

        False if `least` pages fit only in the place of the pool in use, since a pool that grows
        lies beside the old one for a moment. The sequences in it have to end first; then `discard`
        makes room. ValueError if a GPU, or kv_memory, is too small for `least`.
        """
        wanted += self.num_padding_pages
        least += self.num_padding_pages
        if self.cache is not None and wanted > self.cache.pages:
            holds_nothing = self.num_free == self.cache.pages
            if holds_nothing:
                self.discard()  # a new pool then need not lie beside it
        if self.cache is None:
            self._create(wanted, least)
        elif not self._grow(wanted, least):
            return False
        if not self.padding_pages:
            self.padding_pages = self.cache.take(self.num_padding_pages)
        return True

    def discard(self) -> None:
        """Free the pool with all that is in it; no sequence may be running."""
        self.prompt_pages.clear()
        self.prefix_tokens = []
        self.prefix_pages = []
        self.padding_pages = []
        self.cache = None

    def _create(self, wanted: int, least: int) -> None:
        """Make the pool; with fewer pages where memory is not free in one piece."""
        model = self.model
        pages = self._allowed_pages(wanted, least)
        tried_least = False
        while self.cache is None:
            self.cache = attempt(
                model.device,
                KVCache,
                model.config,
                pages,
                self.page_size,
                model.device,
                model.dtype,
            ).result
            if self.cache is None and tried_least:
                raise ValueError(
                    f"{self._needed(least)}, and {model.device} could not give them in one "
                    "piece: end other programs on it, or allow fewer new tokens"
                )
            tried_least = pages == least  # with what is cached given back, it is tried once more
            pages = max(least, pages // 2)

    def _grow(self, wanted: int, least: int) -> bool:
        """Whether the pool now has at least `least` pages."""
        if wanted <= self.cache.pages:
            return True
        pages = self._allowed_pages(wanted, least)
        if self._limited_by_gpu():  # the new pool must fit beside the old one
            free = free_memory(self.model.device)
            pages = min(pages, int(GPU_SHARE * free // self._page_bytes()))
        try:
            if pages >= least:
                self.cache.grow(pages)
        except RuntimeError as error:  # not `attempt`: this may be asked before every step
            if not is_out_of_memory(error):
                raise
        return self.cache.pages >= least

    def _limited_by_gpu(self) -> bool:
        """Whether the free memory of a GPU limits the pool, and not the user's kv_memory."""
        return not self.budget and self.model.device.type == "cuda"

    def _page_bytes(self) -> int:
        return KVCache.page_bytes(self.model.config, self.page_size, self.model.dtype)

    def _allowed_pages(self, wanted: int, least: int) -> int:
        """Pages that a pool in the place of this one may have; ValueError for fewer than least."""
        page_bytes = self._page_bytes()
        if self._limited_by_gpu():
            in_use = 0 if self.cache is None else self.cache.pages * page_bytes
            budget = GPU_SHARE * (free_memory(self.model.device) + in_use)
        elif self.budget:
            budget = self.budget
        else:
            return max(1, wanted)
        if least * page_bytes > budget:
            raise self._too_small(budget, least)
        return max(1, min(wanted, int(budget // page_bytes)))

    def _too_small(self, budget: float, least: int) -> ValueError:
        """The error if not even one sequence fits."""
        needed = self._needed(least)
        if self.budget:
            return ValueError(
                f"kv_memory {budget / 1e9:.3g} GB: {needed}; allow more, or fewer new tokens"
            )
        return ValueError(
            f"{needed}, and {self.model.device} has {budget / 1e9:.3g} GB free for them beside the "
            "weights and what other programs hold; fewer new tokens, or a shorter prompt"
        )

    def _needed(self, least: int) -> str:
        gigabytes = least * self._page_bytes() / 1e9
        return f"the longest sequence needs {gigabytes:.3g} GB of keys and values"

    # ---- the pages of sequences

    def allocate(
        self, prompt: tuple[int, ...], duplicate: list[int] | None, duplicates_wait: bool
    ) -> tuple[list[int], int]:
        """A block table for a prompt, and how many of its tokens are in those pages already.

        duplicate: the block table of a running sequence with the same prompt.
        duplicates_wait: further requests with this prompt wait, so pages kept for them stay.
        """
        source = self.prompt_pages.get(prompt, duplicate)
        if source is not None:
            known = len(prompt) - 1
        else:
            source = self.prefix_pages
            known = shared_tokens(self.prefix_tokens, prompt)
        block_table = self.cache.take(self.pages_for(len(prompt)))
        num_copied = self.pages_for(known)
        self.cache.copy(source[:num_copied], block_table[:num_copied])
        if prompt in self.prompt_pages and not duplicates_wait:
            self.cache.give_back(self.prompt_pages.pop(prompt))
        return block_table, known

    def release(
        self, prompt: tuple[int, ...], block_table: list[int], duplicates_wait: bool
    ) -> None:
        """Free an ended sequence's pages, except for its prompt's while duplicates of it wait."""
        if duplicates_wait and prompt not in self.prompt_pages:
            num_kept = self.pages_for(len(prompt))
            self.prompt_pages[prompt] = block_table[:num_kept]
            block_table = block_table[num_kept:]
        self.cache.give_back(block_table)

    def drop_prompt_pages(self) -> None:
        """Free the pages kept for duplicate prompts; those will be computed again."""
        for pages in self.prompt_pages.values():
            self.cache.give_back(pages)
        self.prompt_pages.clear()

    def close(self) -> None:
        """Free everything that is not a running sequence's."""
        self.drop_prompt_pages()
        if self.cache is not None:
            self.cache.give_back(self.prefix_pages)
            self.cache.give_back(self.padding_pages)
        self.prefix_tokens = []
        self.prefix_pages = []
        self.padding_pages = []

    def compact(self, block_tables: Sequence[list[int]]) -> None:
        """Move the pages in use to the lowest numbers where attention reads the whole pool.

        block_tables: those of the running sequences; they are changed in place.
        """
        if not self.reads_whole_pool:
            return
        tables = [self.padding_pages, self.prefix_pages, *self.prompt_pages.values()]
        tables += block_tables
        tables = [table for table in tables if table]
        if not tables:
            return
        used = sum(len(table) for table in tables)
        highest = max(max(table) for table in tables)
        tolerated_gaps = max(4, used // 8)  # compacting costs copies
        if highest >= used + tolerated_gaps:
            self.cache.compact(tables)

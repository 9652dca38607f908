"""`--invariant` looks before the first row whether a row's bits are its own on this device

The kernels are made so that they are (kernels/lora_linear/batch_invariant.py,
kernels/cached_attention/__init__.py);
what they cannot see to is how the hardware adds up. So: a few rows of random tokens, computed
together and apart, prompts whole and in pieces, drafts at once and one after the other. Logits,
tokens and log-probabilities must be equal to the last bit.
"""

# n = tokens whose logits are looked at, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling.speculation import LONGEST
from kernels.cached import Cached
from kernels.sampling.sample_rows import SampleRows
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora

PROMPTS = (1, 21, 83, 150)  # tokens: less than a tile, some, a page and more
DRAFTED = 1 + LONGEST  # tokens of the widest step


class Probe:
    """Rows of a prompt and drafted tokens, computed by any division into forwards."""

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        page_size: int,
        prompts: Sequence[int],
        drafted: int,
    ) -> None:
        g, vocab = torch.Generator().manual_seed(0), model.config.vocab_size
        room = model.config.max_position - drafted
        self.model, self.lora, self.page_size, self.drafted = model, lora, page_size, drafted
        self.lengths = [min(n, room) for n in prompts]
        self.rows = [torch.randint(vocab, (n + drafted,), generator=g) for n in self.lengths]

    def forward(
        self, cache: KVCache, tables: dict[int, list[int]], spans: dict[int, range], alone: bool
    ) -> dict[int, tuple[Tensor, ...]]:
        """Row -> logits, tokens, log-probabilities of a span of each row (a prompt's: its end)."""
        new, tokens = [len(span) for span in spans.values()], []
        for i, span in spans.items():
            tokens.append(self.rows[i][span.start : span.stop])
        starts, pages = [span.start for span in spans.values()], [tables[i] for i in spans]
        device = self.model.device
        cached = Cached.build(new, starts, pages, self.page_size, device, alone=alone)
        wanted = None if alone else cached.last
        hidden = self.model.forward(
            torch.cat(tokens).to(device), cached, lora=self.lora, cache=cache, logits_indices=wanted
        )
        logits = self.model.head(hidden)
        at = cached.positions if alone else cached.positions[wanted]
        keys = SampleRows(at, torch.zeros_like(at), at, seed=0, temperature=1.0, top_p=0.9)
        drawn = self.model.ops.sample(logits, keys)
        counts = new if alone else [1] * len(new)
        parts = zip(*(values.split(counts) for values in (logits, *drawn)), strict=True)
        return dict(zip(spans, parts, strict=True))

    def run(
        self, rows: Sequence[int], pieces: int | None, drafts: int
    ) -> dict[int, tuple[Tensor, ...]]:
        """Row -> what came of the prompt's end and of every drafted token, for `rows` together.

        Prompts go in pieces of so many pages, drafted tokens so many at once.
        """
        longest = max(self.lengths) + self.drafted
        each = -(-longest // self.page_size)
        c = self.model
        cache = KVCache(c.config, each * len(rows), self.page_size, c.device, c.dtype)
        tables = {i: cache.take(each) for i in rows}
        found: dict[int, list[tuple[Tensor, ...]]] = {i: [] for i in rows}
        step = max(self.lengths) if pieces is None else pieces * self.page_size
        for start in range(0, max(self.lengths[i] for i in rows), step):
            here = [i for i in rows if self.lengths[i] > start]
            spans = {i: range(start, min(start + step, self.lengths[i])) for i in here}
            for i, values in self.forward(cache, tables, spans, alone=False).items():
                if spans[i].stop == self.lengths[i]:
                    found[i].append(values)
        for start in range(0, self.drafted, drafts):
            stop = min(start + drafts, self.drafted)
            spans = {i: range(self.lengths[i] + start, self.lengths[i] + stop) for i in rows}
            for i, values in self.forward(cache, tables, spans, alone=True).items():
                found[i].append(values)
        return {i: tuple(map(torch.cat, zip(*parts, strict=True))) for i, parts in found.items()}


def differing(
    model: Llama,
    lora: Lora | None,
    page_size: int,
    prompts: Sequence[int] = PROMPTS,
    drafted: int = DRAFTED,
) -> list[str]:
    """What changes a row's bits here: empty where nothing that is tried does."""
    probe = Probe(model, lora, page_size, prompts, drafted)
    everyone, found = list(range(len(prompts))), []
    together = probe.run(everyone, None, drafted)

    def look(what: str, others: dict[int, tuple[Tensor, ...]]) -> None:
        pairs = [zip(values, together[i], strict=True) for i, values in others.items()]
        if not all(torch.equal(a, b) for pair in pairs for a, b in pair):
            found.append(what)

    look("their order", probe.run(everyone[::-1], None, drafted))
    look("the number of drafts", probe.run(everyone, None, drafted // 2))
    for i in (0, len(prompts) - 1):
        look(f"the rows beside one of {probe.lengths[i]} tokens", probe.run([i], None, 1))
    look("where a prompt is cut", probe.run(everyone[-1:], 1, drafted))
    return found


def prove(model: Llama, lora: Lora | None, page_size: int) -> None:
    """Say that a row's bits are its own; RuntimeError where that is not so on this GPU."""
    if not isinstance(model.weights["head"], Tensor):  # packed: kernels/cpu/prepack.py
        print("invariant: a row's bits are its own on a CPU in float32, with and without the flag")
        return
    if model.device.type == "cuda" and (found := differing(model, lora, page_size)):
        raise RuntimeError(
            f"invariant: on {torch.cuda.get_device_name(model.device)} a row's bits depend on "
            f"{', on '.join(found)}; leave --invariant out, and texts may depend on --rows"
        )
    print(f"invariant: a row's bits are its own; ops {model.ops.name}")

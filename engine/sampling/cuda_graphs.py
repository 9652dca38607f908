"""Decode steps captured as CUDA graphs: launched once, replayed for every further step

A step of a 7B model is some 350 launches, which take the host longer than the card takes to read
the weights (H100, 32 rows: 15.7 ms a step, of which 7.5 are the reading). `Step` is one step over
buffers that stay where they are: forward, head, drawing a token, moving on by one place. On a GPU
it is captured at first use and replayed; elsewhere it can be called as it is, which tests do.

What a captured step may not do, and how it does without
    look at the host    the numbers of rows and pages are a bucket's: rows 1, 2, 4, 8, 16, 24, 32,
                        48, 64, 96, ..., pages a power of two. The host lists of its `Cached` say
                        the most that the bucket holds, and the grid of attention follows from them;
                        programs behind a row's end leave at once (cached_attention.py). A bucket's
                        idle rows write into a page of nobody, and their tokens are dropped
    be copied to        what changes lies in one buffer, filled by one copy before a visit's first
                        step: last tokens, places, pages, the names of the random numbers, history
    compile, allocate   the first step of a bucket runs as it is, over idle rows. What a step needs
                        for a while (tensor descriptors too) is taken from a pool that all graphs
                        share, and freed in the order of the stream: nothing outlives a step there
An address that changes (a grown cache, another adapter's buffer) ends the graphs; new ones follow.

Guesses are checked, and rows of several temperatures drawn, in steps that are not captured. Padding
changes the number of rows of a product: as with --rows, a text may depend on it on a GPU, and does
not with --invariant.
"""

# B = rows of a bucket, P = pages of each

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling.page_pool import Pages
from engine.sampling.requests import SamplerConfig, SamplerStats
from engine.sampling.sequence import FlyingRow
from engine.sampling.speculation import Controller
from kernels.cached import Cached
from kernels.registry import TORCH, TRITON, VARIANTS, Ops
from model.llama import Llama
from model.lora import Lora

STEPS = 8  # between two visits of the host where nothing else is asked: a row that ends at any of
#   them has run on 3.5 in the mean, 3 % of an answer of 140 tokens
DEVICES = ("cuda",)  # tests add the CPU
ALIGNED = 16  # 8-byte numbers: each buffer begins on 128 bytes, as an allocation does
USED = (
    "rms_norm_forward",
    "add_rms_norm_forward",
    "rope_",
    "swiglu_forward",
    "lora_linear_forward",
    "linear",
    "kv_write_",
    "cached_attention",
    "sample",
)  # operations of a step


def refusal(ops: Ops) -> str:
    """Why a step with these operations cannot be captured, "" where it can.

    torch's attention builds its masks from the host's lists and the definitions go row by row;
    torch's other forms look at nothing but tensors of the device.
    """
    tables = [TRITON, *VARIANTS.values()]
    known = {name: {getattr(t, name) for t in tables} for name in USED}
    for name in set(USED) - {"cached_attention"}:
        known[name].add(getattr(TORCH, name))
    others = [name for name in USED if getattr(ops, name) not in known[name]]
    return f"{', '.join(others)} would look at the host" if others else ""


def row_bucket(rows: int, most: int) -> int:
    """Rows of the step that so many run in: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..., `most`."""
    if rows <= 8:
        return min(most, 1 << (rows - 1).bit_length())
    part = max(8, 1 << (rows - 1).bit_length() - 2)
    return min(most, -(-rows // part) * part)


class Step:
    """One token for each of up to B rows of up to P pages, over buffers that stay where they are.

    `load` fills them; every call appends a line to `results` (tokens, then log-probabilities).
    """

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        pages: Pages,
        config: SamplerConfig,
        B: int,
        P: int,
        temperature: float,
        steps: int,  # calls between two `load`s, at most
    ) -> None:
        self.model, self.lora, self.pages, self.config = model, lora, pages, config
        self.B, self.P, self.temperature, device = B, P, temperature, model.device
        seen = P * config.page_size if config.repetition_penalty != 1 else 0
        single = ("tokens", "positions", "samples", "row_keys", "write_page", "write_offset")
        self.sizes = dict.fromkeys(single, B) | {"table": B * P, "seen": B * seen, "turn": 1}
        self.sizes["contexts"] = -(-B // 2)  # int32 in the place of int64
        whole = sum(-(-n // ALIGNED) * ALIGNED for n in self.sizes.values())
        self.host = torch.zeros(whole, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.state = torch.zeros(whole, dtype=torch.int64, device=device)
        self.there, here = self._views(self.host), self._views(self.state)
        self.tokens, self.turn = here["tokens"], here["turn"]
        self.samples, self.row_keys = here["samples"], here["row_keys"]
        self.history = here["seen"].view(B, seen) if seen else None
        self.results = torch.zeros(steps, 2, B, dtype=torch.float64, device=device)
        most = min(P * config.page_size, model.config.max_position)
        self.behind = Cached(  # one token behind: a step begins by moving on
            query_lens=(1,) * B,
            context_lens=(most - 2,) * B,
            tables=((),) * B,
            page_size=config.page_size,
            alone=True,
            positions=here["positions"],
            write_page=here["write_page"],
            write_offset=here["write_offset"],
            last=torch.arange(B, device=device),
            block_table=here["table"].view(B, P),
            cu_queries=torch.arange(B + 1, dtype=torch.int32, device=device),
            contexts=here["contexts"],
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.angles: Tensor | None = None  # what the graph reads and the model may let go

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, size in self.sizes.items():
            views[name] = flat[start : start + size]
            start += -(-size // ALIGNED) * ALIGNED
        views["contexts"] = views["contexts"].view(torch.int32)[: self.B]
        return views

    def load(self, rows: Sequence[FlyingRow]) -> None:
        """Put these rows in, in one copy that is not waited for; the other rows are idle.

        Their pages must hold every token up to the next `load`. The last copy must have arrived.
        """
        idle, nobody = self.B - len(rows), self.pages.idle[0]
        lengths = [*(row.length - 1 for row in rows), *[-1] * idle]
        columns = {
            "tokens": [*(row.ids[-1] for row in rows), *[0] * idle],
            "positions": lengths,
            "contexts": lengths,
            "samples": [*(row.request.sample for row in rows), *[0] * idle],
            "row_keys": [*(row.key for row in rows), *[0] * idle],
        }  # and "turn" is 0 again, as it is in the host's copy
        tables = [*(row.pages[: self.P] for row in rows), *[[]] * idle]
        columns["table"] = [n for t in tables for n in (*t, *[nobody] * (self.P - len(t)))]
        if self.history is not None:
            wide = self.history.shape[1]
            seen = [*((*row.prompt, *row.ids) for row in rows), *[()] * idle]
            columns["seen"] = [n for ids in seen for n in (*ids, *[-1] * (wide - len(ids)))]
        for name, values in columns.items():
            self.there[name].copy_(torch.tensor(values, dtype=self.there[name].dtype))
        self.state.copy_(self.host, non_blocking=True)

    def replay(self) -> None:
        """The step, as it was captured; where it was not, as it is."""
        return self() if self.graph is None else self.graph.replay()

    def __call__(self) -> None:
        """The step: nothing in here comes from the host or goes to it."""
        cached = self.behind.advance()
        if self.history is not None:
            self.history.scatter_(1, cached.positions[:, None], self.tokens[:, None])
        hidden = self.model.forward(self.tokens, cached, lora=self.lora, cache=self.pages.cache)
        places = (cached.positions + 1, self.samples, self.row_keys)
        keys = self.config.keys(*places, self.temperature, self.history)
        tokens, logprobs = self.model.ops.sample(self.model.head(hidden), keys)
        drawn = torch.stack((tokens.double(), logprobs.double()))  # exact, both
        self.results.index_copy_(0, self.turn, drawn[None])
        self.tokens.copy_(tokens)
        self.turn.add_(1)


_ABANDONED: list[torch.cuda.CUDAGraph] = []  # torch may ask them yet what they were capturing


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are captured: one per device, since a library keeps a workspace per stream."""
    return torch.cuda.Stream(device)


class Graphs:
    """The captured steps of one prepared model and adapter, by bucket and temperature."""

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        pages: Pages,
        config: SamplerConfig,
        stats: SamplerStats,
    ) -> None:
        self.model, self.lora, self.pages = model, lora, pages
        self.config, self.stats = config, stats
        self.usable = config.graphs and model.device.type in DEVICES
        if self.usable:
            failed = "a capture failed before in this process" if _ABANDONED else ""
            self._refuse(failed or refusal(model.ops))
        self.most_steps = config.steps or (STEPS if self.usable else 1)
        pages.spare = int(self.usable)
        self.made: dict[tuple[int, int, float], Step] = {}
        self.addresses: tuple[object, ...] = ()
        self.pool: object | None = None

    def _refuse(self, reason: str) -> None:
        self.stats.not_captured, self.usable = reason, not reason

    def steps(self, rows: int, controller: Controller) -> int:
        """Steps until the host looks again, if nothing is guessed now.

        One where guesses would pay: a token later the reference may be met again.
        """
        c = self.config
        if c.steps or not self.usable:
            return c.steps or 1
        guessing = c.draft == "always" or (c.draft == "auto" and controller.pays(rows))
        return 1 if guessing else self.most_steps

    def run(
        self, rows: Sequence[FlyingRow], steps: int
    ) -> tuple[list[list[int]], list[list[float]]] | None:
        """Tokens and log-probabilities of each step, None where it has to be done uncaptured.

        The rows have pages for `steps` more tokens.
        """
        if not self.usable:
            return None
        if len(heats := {row.heat(self.config.temperature) for row in rows}) > 1:
            return None
        need = self.pages.count(max(row.length for row in rows) + steps)
        B, P = row_bucket(len(rows), self.config.rows), 1 << (need - 1).bit_length()
        step = self._step(B, P, heats.pop())
        if step is None:
            return None
        step.load(rows)
        for _ in range(steps):
            step.replay()
        drawn = step.results[:steps].tolist()  # the one copy back, and the wait for it
        self.stats.replayed += steps
        n = len(rows)
        return [[int(t) for t in x[:n]] for x, _ in drawn], [x[:n] for _, x in drawn]

    def _step(self, B: int, P: int, temperature: float) -> Step | None:
        cache = self.pages.cache
        adapter = None if self.lora is None else self.lora.compute.data_ptr()
        addresses = (cache.k.data_ptr(), cache.v.data_ptr(), cache.shape, adapter)
        if addresses != self.addresses:
            self.clear()
            self.addresses = addresses
        if (found := self.made.get((B, P, temperature))) is not None:
            return found
        started, lora, c = time.perf_counter(), self.lora, self.config
        try:
            step = Step(self.model, lora, self.pages, c, B, P, temperature, self.most_steps)
            self._capture(step)
        except Exception as error:  # whatever a compiler, the driver or the allocator may raise
            self.clear()
            self._refuse(f"capturing failed: {_said(error)}")
            return None
        finally:
            self.stats.capture_seconds += time.perf_counter() - started
        self.stats.captured += 1
        return self.made.setdefault((B, P, temperature), step)

    def _capture(self, step: Step) -> None:
        """Give the step its graph, where there are such."""
        device = self.model.device
        if device.type != "cuda":
            return
        here, side = torch.cuda.current_stream(device), _side_stream(device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        side.wait_stream(here)
        try:
            with torch.cuda.device(device), torch.cuda.stream(side):
                step.load(())
                step()  # compiles what it launches and makes what stays: tables, workspaces
                self._record(step, side)
        finally:
            here.wait_stream(side)

    def _record(self, step: Step, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        how = {"pool": self.pool, "stream": stream}
        try:  # "thread_local": what other threads ask of the card (NCCL's) must not end it
            with torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                step()
        except BaseException:
            self._abandon(graph)
            raise
        step.graph, step.angles = graph, self.model.cos_sin

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell torch that a capture has ended where its own end of it was not reached.

        Its allocator would refuse to empty its cache, and keep the memory of the pool.
        """
        _ABANDONED.append(graph)
        with contextlib.suppress(RuntimeError):  # it had not begun, or was ended
            torch._C._cuda_endAllocateToPool(self.model.device.index, self.pool)
            torch._C._cuda_releasePool(self.model.device.index, self.pool)

    def clear(self) -> None:
        """Let all graphs go, and their memory."""
        self.made.clear()
        if self.pool is not None:
            self.pool = None  # one that was given up cannot be taken again
            torch.cuda.empty_cache()


def _said(error: BaseException) -> str:
    """What was raised first and, if it is another, last: a capture that ends so raises anew."""
    first = error
    while (inner := first.__cause__ or first.__context__) is not None:
        first = inner
    lines = [f"{type(e).__name__}: {e}".strip().splitlines()[0][:200] for e in (first, error)]
    return lines[0] if first is error else "; then ".join(lines)

"""Decode steps captured as CUDA graphs: launched once, replayed for every further step

A step of a 7B model is some 350 launches, which take the host longer than the card takes to read
the weights (H100, 32 sequences: 15.7 ms a step, of which 7.5 are the reading). So on a GPU a
`DecodeStep` (decode_step.py) is captured at first use and replayed; elsewhere it can be called as
it is, which tests do.

What a captured step may not do, and what it does instead
    read on the host    the numbers of sequences and pages are a bucket's: 1, 2, 4, 8, 16, 24, 32,
                        48, 64, 96, ... sequences, a power of two of pages. The host lists of its
                        `Cached` state the most that the bucket holds, and attention's grid follows
                        from them; programs behind the end of a sequence return at once
                        (kernels/cached_attention/). Empty slots of a bucket write into padding
                        pages, and their tokens are dropped
    take new inputs     they lie in one buffer, filled by one copy before the first of several
                        steps: last tokens, positions, block tables, names of random numbers,
                        histories
    compile, allocate   the first step of a bucket runs uncaptured, over empty slots. Memory that a
                        step needs for a while (tensor descriptors too) comes from a pool that all
                        graphs share, freed in the order of the stream: nothing outlives a step
An address that changes (a pool that grew, another adapter's buffer) ends the graphs; new ones
follow.

Steps that verify draft tokens, and steps whose sequences have several temperatures, are not
captured. Padding changes the number of rows of a product: as with --rows, a text may depend on it
on a GPU, and does not with --batch-invariant.
"""

# B = sequences of a bucket, P = pages of each

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence

import torch

from engine.runtime.process_memory import is_out_of_memory
from engine.sampling.decode_step import Bucket, DecodeStep
from engine.sampling.launched import Launched, LaunchQueue
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import SamplerConfig, SamplerStats
from engine.sampling.rows_plan import MOST_ROWS
from engine.sampling.sequence import RunningSequence
from engine.sampling.speculation import DraftController
from kernels.integers import cdiv, power_of_two
from kernels.registry import TORCH, TRITON, VARIANTS, Ops
from model.llama import Llama
from model.lora import Lora

STEPS_PER_SYNC = 8  # decode steps per host synchronisation by default: a sequence that ends at any
#   of them has run on 3.5 in the mean, 3 % of an answer of 140 tokens
DEVICE_TYPES = ("cuda",)  # tests add the CPU
REASON = 200  # characters of an error message that are kept for the summary
STEP_OPERATIONS = (
    "rms_norm_forward",
    "add_rms_norm_forward",
    "rope_",
    "norm_rope_forward",
    "swiglu_forward",
    "lora_linear_forward",
    "linear",
    "kv_write_",
    "cached_attention",
    "sample",
)


def why_not_captured(ops: Ops) -> str | None:
    """Why a step with these operations cannot be captured, None if it can.

    torch's attention builds its masks from the host's lists, and the definitions go row by row;
    torch's other forms read nothing but tensors of the device.
    """
    on_host = []
    for name in STEP_OPERATIONS:
        capturable = [getattr(table, name) for table in (TRITON, *VARIANTS.values())]
        if name != "cached_attention":
            capturable.append(getattr(TORCH, name))
        if getattr(ops, name) not in capturable:
            on_host.append(name)
    if not on_host:
        return None
    return f"{', '.join(on_host)} would read values on the host"


def bucket_size(sequences: int, limit: int) -> int:
    """Slots of the step that so many sequences run in, at most `limit`.

    1, 2, 4, 8, then multiples of 8, and of a quarter of the next power of two: 16, 24, 32, 48, 64,
    96, 128, ...
    """
    power = power_of_two(sequences, least=1)
    if sequences <= 8:
        return min(limit, power)
    unit = max(8, power // 4)
    return min(limit, cdiv(sequences, unit) * unit)


class FailedCaptures:
    """Graphs whose capture failed in this process.

    They are kept alive: torch still queries a graph whose capture failed. And nothing is captured
    after a failure, since a stream may be left that was capturing.
    """

    def __init__(self) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def why_not_captured(self) -> str | None:
        """Why nothing is captured any more, None if nothing failed."""
        return "a capture failed before in this process" if self.graphs else None

    def add(self, graph: torch.cuda.CUDAGraph, device: torch.device, pool: object) -> None:
        """Keep a failed graph, and end its capture where torch's own end of it was not reached.

        The allocator would otherwise refuse to empty its cache, and keep the memory of the pool.
        """
        self.graphs.append(graph)
        with contextlib.suppress(RuntimeError):  # the capture had not begun, or was ended
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)


FAILED_CAPTURES = FailedCaptures()  # of this process: it outlives every sampler


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that captures: one per device, since a library keeps a workspace per stream."""
    return torch.cuda.Stream(device)


class DecodeGraphs:
    """The captured steps of one prepared model and adapter, by bucket and temperature."""

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        pool: PagePool,
        config: SamplerConfig,
        stats: SamplerStats,
        failed: FailedCaptures = FAILED_CAPTURES,
    ) -> None:
        self.model = model
        self.lora = lora
        self.pool = pool
        self.config = config
        self.stats = stats
        self.failed = failed
        self.enabled = config.graphs and model.device.type in DEVICE_TYPES
        if self.enabled:
            reason = failed.why_not_captured() or why_not_captured(model.ops)
            if reason is not None:
                self._disable(reason)
        if config.steps > 0:
            self.max_steps = config.steps
        else:
            self.max_steps = STEPS_PER_SYNC if self.enabled else 1
        pool.num_padding_pages = 1 if self.enabled else 0
        self.captured: dict[Bucket, DecodeStep] = {}
        self.addresses: tuple[object, ...] = ()  # that the captured steps read and write
        self.memory_pool: object | None = None  # shared by all graphs

    def _disable(self, reason: str) -> None:
        """Capture nothing, and say why in the summary."""
        self.enabled = False
        self.stats.why_not_captured = reason

    def steps_per_sync(self, sequences: int, controller: DraftController) -> int:
        """Decode steps until the next host synchronisation, if nothing is drafted now.

        One if draft tokens would pay off: a token later the reference may be met again.
        """
        if self.config.steps > 0:
            return self.config.steps
        if not self.enabled or self.config.draft == "always":
            return 1
        if self.config.draft == "auto" and controller.pays_off(sequences):
            return 1
        return self.max_steps

    def step_for(self, seqs: Sequence[RunningSequence], steps: int) -> DecodeStep | None:
        """The captured step that these sequences fit into, captured now if need be.

        They have pages for `steps` more tokens. None where they must be decoded uncaptured.
        """
        if not self.enabled:
            return None
        temperatures = {seq.temperature(self.config.temperature) for seq in seqs}
        if len(temperatures) > 1:
            return None
        longest = max(seq.context_len for seq in seqs)
        bucket = Bucket(
            sequences=bucket_size(len(seqs), self.config.rows or MOST_ROWS),
            pages=power_of_two(self.pool.pages_for(longest + steps), least=1),
            temperature=temperatures.pop(),
        )
        return self._captured_step(bucket)

    def launch(
        self,
        step: DecodeStep,
        seqs: Sequence[RunningSequence],
        steps: int,
        unread: Sequence[Launched],
        queue: LaunchQueue,
    ) -> Launched:
        """Launch `steps` tokens for every sequence: replays of its step, and one copy back.

        unread: what was launched before and is not read yet. Where that is in the way of nothing
        but this step's inputs (the same sequences go on in the same pages) nothing is loaded.
        """
        launched = Launched(list(seqs), steps, step)
        goes_on = [last.step for last in unread] == [step] and step.holds(seqs)
        sources = [last for last in unread if last.seqs]
        # the step before comes first: its slots are the first places
        sources.sort(key=lambda last: last.step is None)
        side = None
        if not goes_on:
            side = step.stage(seqs, _places(seqs, sources))

        def run() -> None:
            if side is None:
                step.go_on()
            elif sources:
                last_tokens = torch.cat([source.tokens for source in sources])
                step.load(side, last_tokens, sources[0].step)
            else:
                step.load(side, None, None)
            for _ in range(steps):
                step.replay()
            launched.finish(step.tokens, step.results[:steps])

        queue.launch(run)
        for seq in seqs:
            seq.in_flight += steps
        self.stats.replayed += steps
        return launched

    def _captured_step(self, bucket: Bucket) -> DecodeStep | None:
        """The step of a bucket, captured if need be; None (and disabled) if that fails."""
        cache = self.pool.cache
        adapter = None if self.lora is None else self.lora.compute.data_ptr()
        addresses = (cache.k.data_ptr(), cache.v.data_ptr(), cache.shape, adapter)
        if addresses != self.addresses:
            self.clear()
            self.addresses = addresses
        if bucket in self.captured:
            return self.captured[bucket]
        started = time.perf_counter()
        try:
            step = DecodeStep(self.model, self.lora, self.pool, self.config, bucket, self.max_steps)
            self._capture(step)
        except Exception as error:  # whatever a compiler, the driver or the allocator may raise
            self.clear()
            before_recording = not self.failed.graphs
            if is_out_of_memory(error) and before_recording and bucket.sequences > 1:
                raise  # the sampler takes fewer sequences, which can be captured
            self._disable(f"capturing failed: {_first_and_last(error)}")
            return None
        finally:
            self.stats.capture_seconds += time.perf_counter() - started
        self.stats.captured += 1
        self.captured[bucket] = step
        return step

    def _capture(self, step: DecodeStep) -> None:
        """Record the step's graph, on a device that has graphs."""
        device = self.model.device
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        side = _side_stream(device)
        if self.memory_pool is None:
            self.memory_pool = torch.cuda.graph_pool_handle()
        side.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.cuda.stream(side):
                step.load(step.stage(()), None, None)
                step()  # compiles its kernels and makes what stays: tables, workspaces
                self._record(step, side)
        finally:
            current.wait_stream(side)

    def _record(self, step: DecodeStep, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph,
                pool=self.memory_pool,
                stream=stream,
                # other threads' use of the card (NCCL's) must not end the capture
                capture_error_mode="thread_local",
            ):
                step()
        except BaseException:
            self.failed.add(graph, self.model.device, self.memory_pool)
            raise
        step.graph = graph
        step.angles = self.model.rotation.cos_sin

    def clear(self) -> None:
        """Free all graphs and their memory, once they have run."""
        if self.captured and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.captured.clear()
        if self.memory_pool is not None:
            self.memory_pool = None  # one that was released cannot be used again
            torch.cuda.empty_cache()


def _places(seqs: Sequence[RunningSequence], sources: Sequence[Launched]) -> list[int | None]:
    """Where each sequence's last token is in the last tokens of `sources`, laid end to end.

    None for one that has no tokens in flight: the host knows it.
    """
    place_of: dict[RunningSequence, int] = {}
    start = 0
    for source in sources:
        for slot, seq in enumerate(source.seqs):
            place_of[seq] = start + slot
        start += len(source.seqs) if source.step is None else source.step.B
    return [place_of[seq] if seq.in_flight else None for seq in seqs]


def _first_and_last(error: BaseException) -> str:
    """The error that was raised first and, if it is another, the last: ending a failed capture
    raises anew."""
    first = error
    while first.__cause__ is not None or first.__context__ is not None:
        first = first.__cause__ or first.__context__
    if first is error:
        return _one_line(error)
    return f"{_one_line(first)}; then {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:REASON]

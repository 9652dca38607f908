"""Work that was launched on the device, and results that the host has not read yet

A GPU runs what is launched in order while the host goes on. So the sampler launches the next decode
steps first and reads the tokens of the last ones then (sampler.py, `_step_ahead`).
"""

# B = slots of a step or prompts of a forward, n = tokens of each

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.sampling.decode_step import DecodeStep
from engine.sampling.sequence import RunningSequence, SampledTokens


class HostCopy:
    """A tensor's copy in host memory, which arrives while the host does other things."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.event: torch.cuda.Event | None = None  # passed when the copy has arrived

    def start(self, source: Tensor) -> None:
        """Copy what `source` will hold when all that was launched before has run."""
        if source.device.type != "cuda":
            self.tensor = source.clone()
            return
        self.tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self.tensor.copy_(source, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(source.device))

    def has_arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self.event is None or self.event.query()

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


@dataclass(eq=False)
class Launched:
    """Tokens of some sequences that were launched together: n decode steps, or a prefill (n = 1).

    Until they are read they are counted by `in_flight` of their sequences.
    """

    seqs: list[RunningSequence]  # in the order of the slots
    steps: int  # n
    step: DecodeStep | None = None  # that is replayed; None for a prefill
    # set by the device's work:
    tokens: Tensor | None = None  # (B,) int64, on the device: the last token of every sequence
    results: HostCopy = field(default_factory=HostCopy)  # (n, 2, B) fp64: tokens, log-probabilities

    def finish(self, tokens: Tensor, results: Tensor) -> None:
        """To be launched last: keep the last tokens (B,), and copy the results (n, 2, B) back."""
        self.tokens = tokens
        self.results.start(results)


class LaunchQueue:
    """Launches work on the device, in order, and reads its results.

    A test delays the work: on a CPU it would otherwise be done as soon as it is launched.
    """

    def launch(self, work: Callable[[], None]) -> None:
        """Run `work` behind all that was launched before; it must not read anything back."""
        work()

    def has_run(self, launched: Launched) -> bool:
        """Whether its results have arrived."""
        return launched.results.has_arrived()

    def read(self, launched: Launched) -> SampledTokens:
        """Its tokens, once they have arrived."""
        count = len(launched.seqs)
        if not count:
            return SampledTokens([], [])
        results = launched.results.wait()  # (n, 2, B)
        used = results[:, :, :count].transpose(0, 2)  # (count, 2, n)
        tokens = used[:, 0].long()
        logprobs = used[:, 1]
        for seq in launched.seqs:
            seq.in_flight -= launched.steps
        return SampledTokens(tokens.tolist(), logprobs.tolist())

"""Where a sampling run on a CPU spends its time: the C functions, and Python around them.

Called by `python -m benchmarks.sampler ... --profile`. Rows are sampled twice without drafts: as
always, for the share of Python in decoding, and with a step's layers called one by one, for the
share of each function. The clock around a call takes a microsecond or two, which counts as Python.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from kernels.cpu import native

PHASES = ("prefill", "decode")


@contextmanager
def timed(seconds: Counter[tuple[str, str]], phase: list[str], vocab: int) -> Iterator[None]:
    """Inside, add up the seconds of every C function by (phase, name).

    Weights that are packed inside keep the timed functions.
    """
    library = native.library()

    def clocked(name: str) -> Callable:
        function = getattr(library, name)

        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            label = "head" if name == "linear" and args[-1] == vocab else name
            seconds[phase[0], label] += time.perf_counter() - started
            return result

        return call

    functions = {name: clocked(name) for name in native.SIGNATURES}
    clocked_library = SimpleNamespace(_name=library._name, **functions)
    with native.loading_by(native.Loader(loaded=native.Loaded(clocked_library))):
        yield


class PhasedSampler(Sampler):
    """A sampler that notes its phase."""

    phase: list[str]

    def _prefill(self, rows: list) -> None:
        self.phase[0] = "prefill"
        super()._prefill(rows)

    def _decode(self) -> None:
        self.phase[0] = "decode"
        super()._decode()
        self.phase[0] = "else"


def profile(
    session: Session, requests: list[Request], rows: int, end_ids: list[int]
) -> dict[str, dict[str, float]]:
    """Phase -> function -> seconds, "python" for the rest; "share": Python's of decoding."""
    if reason := native.why_unavailable():
        raise ValueError(f"--profile looks at the C functions, and there are none here: {reason}")
    found: dict[str, dict[str, float]] = {}
    decode, vocab = session.chat.tokenizer.decode, session.model.config.vocab_size
    for one_by_one in (False, True):
        seconds: Counter[tuple[str, str]] = Counter()
        PhasedSampler.phase = ["else"]
        config = SamplerConfig(rows=rows, draft="off")
        with timed(seconds, PhasedSampler.phase, vocab):
            with PhasedSampler(session.model, decode, end_ids, config) as sampler:
                if one_by_one:
                    sampler.model.fused_layers = None
                for _ in sampler.run(requests):
                    pass
            stats = sampler.stats
        totals = {"prefill": stats.prefill_seconds, "decode": stats.decode_seconds}
        parts = {p: {n: s for (at, n), s in seconds.items() if at == p} for p in PHASES}
        for phase, total in totals.items():
            parts[phase]["python"] = total - sum(parts[phase].values())
        if one_by_one:
            found |= parts
        else:
            found["share"] = {"python": parts["decode"]["python"] / totals["decode"]}
    return found

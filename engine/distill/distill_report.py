"""The summary of a distillation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from engine.data.distilled import CONTEXT, Distilled
from engine.distill.cascade import (
    REFERENCE,
)
from engine.sampling.requests import SamplerStats

LOW_SHARE = 0.2  # under this share of differing targets SFT and SDFT are nearly the same run


@dataclass
class DistillReport:
    """What is in the file, and what this process did."""

    lines: list[Distilled]
    stats: SamplerStats
    seconds: float  # of generation in this process
    written: int  # lines written in this process
    before: int = 0  # lines that an earlier start had written
    cut_at: int = 0  # tokens at which prompts lost their end (Rules.cut_prompts)

    @property
    def counts(self) -> Counter[str]:
        return Counter(line.status for line in self.lines)

    @property
    def targets(self) -> list[Distilled]:
        """The lines that are trained on: all but those that are context only."""
        return [line for line in self.lines if line.status != CONTEXT]

    @property
    def differ(self) -> float:
        """Share of targets that are not the reference."""
        targets = self.targets
        return sum(line.target != line.reference for line in targets) / max(1, len(targets))

    def stages(self) -> Iterator[str]:
        """What every stage of a cascade was asked and gave; nothing for one try a turn."""
        names = dict.fromkeys(name for line in self.lines for name in line.tries)
        if all(sum(map(len, line.tries.values())) <= 1 for line in self.lines):
            return
        for name in names:
            asked = [line.tries[name] for line in self.lines if name in line.tries]
            counts = Counter(status for tries in asked for status in tries).most_common()
            won = sum(line.stage == name for line in self.lines)
            yield (
                f"{name}: {won} of {len(asked)} turns decided by {sum(n for _, n in counts)} tries "
                f"({', '.join(f'{status} {n}' for status, n in counts)})"
            )
        left = sum(line.stage == REFERENCE for line in self.lines)
        yield f"{REFERENCE}: {left} turns"

    def text(self) -> str:
        """Counts and shares by status, speed, a warning where the two arms will be nearly one."""
        n = len(self.targets)
        counts = self.counts
        silent = counts.pop(CONTEXT, 0)
        parts = [f"{k} {v} ({v / n:.0%})" for k, v in counts.most_common()]
        text = f"{n} turns: " + ", ".join(parts)
        text += f"; {silent} further turns are context only" if silent else ""
        text += "".join(f"\n{line}" for line in self.stages())
        text += f"\ntargets that differ from the reference: {self.differ:.1%}"
        if self.cut_at:
            cut = sum(line.prompt_tokens >= self.cut_at for line in self.lines)
            text += f"\nprompts cut at {self.cut_at} tokens (or just as long): {cut}"
        if self.differ < LOW_SHARE:
            text += (
                f"\nWARNING: under {LOW_SHARE:.0%} of the targets are the model's own words, so "
                "SFT and SDFT will nearly be the same run"
            )
        if self.written:
            rows, tokens = self.written / self.seconds, self.stats.new_tokens / self.seconds
            since = f"since the last start {self.written} turns were " if self.before else ""
            prefill, decode = self.stats.prefill_seconds, self.stats.decode_seconds
            text += (
                f"\n{since}generated in {self.seconds:.1f} s (prefill {prefill:.1f}, "
                f"decoding {decode:.1f}): {rows:.2f} rows/s, "
                f"{tokens:.0f} new tokens/s; {self.stats.text()}"
            )
        return text

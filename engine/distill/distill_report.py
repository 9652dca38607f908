"""The summary of a distillation, as printed at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from engine.data.distilled import CONTEXT, Distilled
from engine.distill.cascade import REFERENCE
from engine.sampling.requests import SamplerStats

LOW_SHARE = 0.2  # under this share of differing targets SFT and SDFT are nearly the same run


@dataclass
class DistillReport:
    """The lines of the file, and the work of this process in this start."""

    lines: list[Distilled]
    stats: SamplerStats
    seconds: float  # of sampling
    written: int  # lines written
    before: int = 0  # lines that an earlier start had written
    cut_at: int = 0  # tokens to which prompts were cut (Rules.cut_prompts); 0: not cut

    @property
    def counts(self) -> Counter[str]:
        """Number of lines by status."""
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
        """A line for every stage of a cascade: turns decided, tries, statuses; no line where every
        turn had one try."""
        stages = dict.fromkeys(stage for line in self.lines for stage in line.tries)
        if all(sum(map(len, line.tries.values())) <= 1 for line in self.lines):
            return
        for stage in stages:
            tries = [line.tries[stage] for line in self.lines if stage in line.tries]
            counts = Counter(status for statuses in tries for status in statuses).most_common()
            total = sum(n for _, n in counts)
            won = sum(line.stage == stage for line in self.lines)
            statuses = ", ".join(f"{status} {n}" for status, n in counts)
            yield f"{stage}: {won} of {len(tries)} turns decided by {total} tries ({statuses})"
        left = sum(line.stage == REFERENCE for line in self.lines)
        yield f"{REFERENCE}: {left} turns"

    def text(self) -> str:
        """Counts and shares by status, stages, speed, and a warning where the targets hardly differ
        from the references."""
        n = len(self.targets)
        counts = self.counts
        context_only = counts.pop(CONTEXT, 0)
        parts = [f"{status} {count} ({count / n:.0%})" for status, count in counts.most_common()]
        text = f"{n} turns: " + ", ".join(parts)
        if context_only:
            text += f"; {context_only} further turns are context only"
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
            text += "\n" + self._speed()
        return text

    def _speed(self) -> str:
        rows_s, tokens_s = self.written / self.seconds, self.stats.new_tokens / self.seconds
        since = f"since the last start {self.written} turns were " if self.before else ""
        return (
            f"{since}generated in {self.seconds:.1f} s (prefill "
            f"{self.stats.prefill_seconds:.1f}, decoding {self.stats.decode_seconds:.1f}): "
            f"{rows_s:.2f} rows/s, {tokens_s:.0f} new tokens/s; {self.stats.text()}"
        )

"""The summary of a distillation, as printed at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from engine.data.distilled import CONTEXT, Distilled
from engine.distill.cascade import REFERENCE
from engine.sampling.requests import SamplerStats

LOW_SHARE = 0.2  # with a smaller share of differing targets SFT and SDFT are nearly the same run


@dataclass
class DistillReport:
    """The lines of the file, and the sampling that this process has done since it started."""

    lines: list[Distilled]
    stats: SamplerStats
    seconds: float  # of sampling
    written: int  # lines that this process has written
    before: int = 0  # lines that were in the file already
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
        """Share of targets that are not the reference, 0 to 1."""
        targets = self.targets
        differing = [line for line in targets if line.target != line.reference]
        return len(differing) / max(1, len(targets))

    def stages(self) -> Iterator[str]:
        """A printed line for every stage of a cascade: turns decided, tries, statuses.

        Nothing where every turn had at most one try.
        """
        statuses_by_stage: dict[str, Counter[str]] = {}
        turns_by_stage: Counter[str] = Counter()  # turns that had tries of the stage
        has_several_tries = False  # of one turn
        for line in self.lines:
            for stage, statuses in line.tries.items():
                statuses_by_stage.setdefault(stage, Counter()).update(statuses)
                turns_by_stage[stage] += 1
            if sum(len(statuses) for statuses in line.tries.values()) > 1:
                has_several_tries = True
        if not has_several_tries:
            return
        decided = Counter(line.stage for line in self.lines)  # turns by the stage of their target
        for stage, counts in statuses_by_stage.items():
            tries = sum(counts.values())
            text = ", ".join(f"{status} {n}" for status, n in counts.most_common())
            yield (
                f"{stage}: {decided[stage]} of {turns_by_stage[stage]} turns decided by "
                f"{tries} tries ({text})"
            )
        yield f"{REFERENCE}: {decided[REFERENCE]} turns"

    def text(self) -> str:
        """The printed summary: counts and shares by status, stages, share of differing targets.

        With a warning where the targets hardly differ from the references, and the speed.
        """
        turns = len(self.targets)
        counts = self.counts
        context_only = counts.pop(CONTEXT, 0)
        parts = []
        for status, count in counts.most_common():
            parts.append(f"{status} {count} ({count / turns:.0%})")
        text = f"{turns} turns: " + ", ".join(parts)
        if context_only:
            text += f"; {context_only} further turns are context only"
        for line in self.stages():
            text += f"\n{line}"
        text += f"\ntargets that differ from the reference: {self.differ:.1%}"
        if self.cut_at:
            cut = [line for line in self.lines if line.prompt_tokens >= self.cut_at]
            text += f"\nprompts cut at {self.cut_at} tokens (or just as long): {len(cut)}"
        if self.differ < LOW_SHARE:
            text += (
                f"\nWARNING: under {LOW_SHARE:.0%} of the targets are the model's own words, so "
                "SFT and SDFT will nearly be the same run"
            )
        if self.written:
            text += "\n" + self._speed()
        return text

    def _speed(self) -> str:
        stats = self.stats
        turns_per_second = self.written / self.seconds
        tokens_per_second = stats.new_tokens / self.seconds
        since = f"since the last start {self.written} turns were " if self.before else ""
        return (
            f"{since}generated in {self.seconds:.1f} s (prefill {stats.prefill_seconds:.1f}, "
            f"decoding {stats.decode_seconds:.1f}): {turns_per_second:.2f} rows/s, "
            f"{tokens_per_second:.0f} new tokens/s; {stats.text()}"
        )

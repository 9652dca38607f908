"""The summary of a distillation, as printed at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from engine.data.distilled import CONTEXT, Distilled
from engine.distill.cascade import REFERENCE
from engine.sampling.requests import SamplerStats

LOW_SHARE = 0.2  # with a smaller share of differing targets SFT and SDFT are nearly the same run


@dataclass
class LineCounts:
    """Counts of distilled lines."""

    status: Counter[str] = field(default_factory=Counter)  # lines by status
    differing: int = 0  # targets that are not the reference
    stage: Counter[str] = field(default_factory=Counter)  # turns by the stage of their target
    # of a cascade, by stage: statuses of its tries, turns that had any
    tries: dict[str, Counter[str]] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)
    have_several_tries: bool = False  # one of the turns has
    prompt_tokens: Counter[int] = field(default_factory=Counter)  # lines by the tokens

    @classmethod
    def of(cls, lines: Iterable[Distilled]) -> LineCounts:
        """The counts of lines, which are read once."""
        counts = cls()
        for line in lines:
            counts.add(line)
        return counts

    def add(self, line: Distilled) -> None:
        """Count a line."""
        self.status[line.status] += 1
        if line.status != CONTEXT and line.target != line.reference:
            self.differing += 1
        self.stage[line.stage] += 1
        for stage, statuses in line.tries.items():
            self.tries.setdefault(stage, Counter()).update(statuses)
            self.turns[stage] += 1
        if sum(len(statuses) for statuses in line.tries.values()) > 1:
            self.have_several_tries = True
        self.prompt_tokens[line.prompt_tokens] += 1


@dataclass
class DistillReport:
    """The lines of the file, and the sampling that this process has done since it started."""

    lines: Sequence[Distilled]  # on disk, where `distill` made the report
    stats: SamplerStats
    seconds: float  # of sampling
    written: int  # lines that this process has written
    before: int = 0  # lines that were in the file already
    cut_at: int = 0  # tokens to which prompts were cut (Rules.cut_prompts); 0: not cut

    @cached_property
    def line_counts(self) -> LineCounts:
        """The counts of the lines, which are read at the first call."""
        return LineCounts.of(self.lines)

    @property
    def counts(self) -> Counter[str]:
        """Number of lines by status."""
        return Counter(self.line_counts.status)

    @property
    def targets(self) -> list[Distilled]:
        """The lines that are trained on, in memory: all but those that are context only."""
        return [line for line in self.lines if line.status != CONTEXT]

    @property
    def target_count(self) -> int:
        """How many lines are trained on."""
        return len(self.lines) - self.line_counts.status[CONTEXT]

    @property
    def differ(self) -> float:
        """Share of targets that are not the reference, 0 to 1."""
        return self.line_counts.differing / max(1, self.target_count)

    def stages(self) -> Iterator[str]:
        """A printed line for every stage of a cascade: turns decided, tries, statuses.

        Nothing where every turn had at most one try.
        """
        of_lines = self.line_counts
        if not of_lines.have_several_tries:
            return
        for stage, counts in of_lines.tries.items():
            tries = sum(counts.values())
            text = ", ".join(f"{status} {n}" for status, n in counts.most_common())
            yield (
                f"{stage}: {of_lines.stage[stage]} of {of_lines.turns[stage]} turns decided by "
                f"{tries} tries ({text})"
            )
        yield f"{REFERENCE}: {of_lines.stage[REFERENCE]} turns"

    def text(self) -> str:
        """The printed summary: counts and shares by status, stages, share of differing targets.

        With a warning where the targets hardly differ from the references, and the speed.
        """
        turns = self.target_count
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
            by_length = self.line_counts.prompt_tokens
            cut = sum(count for tokens, count in by_length.items() if tokens >= self.cut_at)
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
        stats = self.stats
        turns_per_second = self.written / self.seconds
        tokens_per_second = stats.new_tokens / self.seconds
        since = f"since the last start {self.written} turns were " if self.before else ""
        return (
            f"{since}generated in {self.seconds:.1f} s (prefill {stats.prefill_seconds:.1f}, "
            f"decoding {stats.decode_seconds:.1f}): {turns_per_second:.2f} rows/s, "
            f"{tokens_per_second:.0f} new tokens/s; {stats.text()}"
        )

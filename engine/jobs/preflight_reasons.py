"""Preflight's verdict: the limits on its figures, with their sources, and the report's text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NGRAM = 4  # words; copying is the share of the rewrite's n-grams that stand in the reference


@dataclass(frozen=True)
class Reason:
    """A limit on a measured figure: the reason holds below `below`, and above `above`."""

    figure: str
    why: str
    stops: bool  # NO-GO, or a mere warning
    below: float = -math.inf
    above: float = math.inf

    def holds(self, figures: dict[str, Any]) -> bool:
        """Whether the figure was measured and is beyond the limit."""
        if self.figure not in figures:
            return False
        return not self.below <= figures[self.figure] <= self.above


REASONS = (
    Reason(
        "differ",
        "so few targets are the model's own words that SFT and SDFT are the same run (the paper's "
        "OpenFunctions: 10.7 %)",
        stops=True,
        below=0.10,
    ),
    Reason(
        "differ",
        "under a fifth of the targets are the model's own words: expect little between SFT and "
        "SDFT",
        stops=False,
        below=0.20,
    ),
    Reason(
        "kl",
        "showing the reference hardly changes what the model would say: it does not follow it "
        "(2601.19897 at 3B; its working teacher is at 0.68)",
        stops=True,
        below=0.02,
    ),
    Reason(
        "copy",
        "the rewrites are the references word for word: SDFT would be SFT",
        stops=True,
        above=0.90,
    ),
    Reason(
        "copy",
        "the rewrites copy most of the references (2602.11220: a rewrite should be in the model's "
        "own style)",
        stops=False,
        above=0.60,
    ),
    Reason(
        "lift",
        "shown the answer the model does worse than without: its rewrites teach nothing (an "
        "in-context learner is needed, 2601.19897 3.2)",
        stops=True,
        below=0.0,
    ),
    Reason(
        "own_nll",
        "the model's own greedy answers are unlikely to itself: a broken load, a wrong chat format "
        "or a damaged file (sail-sg/sdft I#9: token soup)",
        stops=True,
        above=1.5,
    ),
    Reason(
        "garbled",
        "many greedy answers are no text (sail-sg/sdft I#9)",
        stops=True,
        above=0.25,
    ),
    Reason(
        "ended",
        "most greedy answers do not end within the limit: a base model (sail-sg/sdft I#3), or "
        "--max-new-tokens is too low",
        stops=False,
        below=0.5,
    ),
    Reason(
        "own_template",
        "the chat format is not the checkpoint's own: is it a base model? (sail-sg/sdft I#3, I#11)",
        stops=False,
        below=0.5,
    ),
    Reason(
        "length",
        "rewrites are less than half as long as the references: what they leave out is not taught",
        stops=False,
        below=0.5,
    ),
    Reason(
        "hedges_kept",
        "shown the reference the model stops doubting aloud, which can cost reasoning models much "
        "(2603.24472)",
        stops=False,
        below=0.5,
    ),
)


def reasons_that_hold(figures: dict[str, Any]) -> list[Reason]:
    """Of REASONS; a mere warning is left out where the same figure is a reason to stop."""
    held = [reason for reason in REASONS if reason.holds(figures)]
    stopping = {reason.figure for reason in held if reason.stops}
    return [reason for reason in held if reason.stops or reason.figure not in stopping]


def report_text(figures: dict[str, Any], reasons: Sequence[Reason], verify: str) -> str:
    """The figures and the verdict as text."""
    f = figures
    by_count = sorted(f["status"].items(), key=lambda item: -item[1])
    status = ", ".join(f"{name} {count}" for name, count in by_count)
    lines = [f"preflight on {f['sample']} of {f['rows']} rows, {f['took']:.0f} s"]
    if "lift" in f:
        lines.append(
            f"  right ({verify}): {f['plain']:.0%} plain, {f['shown']:.0%} shown the reference"
        )
    lines += [
        f"  rewrites: {status}; {f['differ']:.0%} of the targets would differ from the reference",
        f"  copied from the reference: {f['copy']:.0%} of {NGRAM}-grams; length {f['length']:.2f} "
        "of the reference's (median, tokens)",
        f"  being shown the reference: KL {f['kl']:.3f} (back {f['reverse_kl']:.3f}), NLL gap "
        f"{f['nll_gap']:.3f} nats per token; rewrites cost {f['nll_plain']:.3f} under the plain "
        "prompt",
        f"  own greedy answers: NLL {f['own_nll']:.3f} per token, {f['ended']:.0%} end, "
        f"{f['garbled']:.0%} garbled; hedging words per 100: {f['hedges_plain']:.2f} plain, "
        f"{f['hedges_shown']:.2f} shown",
    ]
    cost = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in f["seconds"].items())
    lines.append(f"  the whole job: {cost}; {f['disk_mb']:.0f} MB on disk")
    for reason in reasons:
        verdict = "NO" if reason.stops else "mind"
        lines.append(f"  {verdict}: {reason.figure} {f[reason.figure]:.3f}: {reason.why}")
    stops = [reason.figure for reason in reasons if reason.stops]
    lines.append("GO" if f["go"] else f"NO-GO: {', '.join(stops)}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

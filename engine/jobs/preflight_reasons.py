"""Preflight's verdict: the limits on its figures, with their sources, and the report's text

Sources: 2601.19897, 2602.11220 and 2603.24472 are arXiv papers; sail-sg/sdft I#N is an issue of the
published code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NGRAM = 4  # words; copying is the share of the rewrite's n-grams that occur in the reference


@dataclass(frozen=True)
class Reason:
    """A reason against the job: it holds where a figure is less than `below`, or over `above`."""

    figure: str  # key of the figures (preflight.py)
    why: str
    stops: bool  # True: NO-GO; False: a warning
    below: float = -math.inf
    above: float = math.inf

    def holds(self, figures: dict[str, Any]) -> bool:
        """Whether the figure was measured and is beyond the limit."""
        if self.figure not in figures:
            return False
        return not self.below <= figures[self.figure] <= self.above

    def text(self, figures: dict[str, Any]) -> str:
        """The figure with its value, and the reason."""
        return f"{self.figure} {figures[self.figure]:.3f}: {self.why}"


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
        "showing the reference hardly changes the model's predictions: the model does not follow "
        "it (2601.19897 at 3B; its working teacher is at 0.68)",
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
        "the model is right less often when it is shown the reference: its rewrites teach nothing "
        "(a model that learns in context is needed, 2601.19897 3.2)",
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
        "many greedy answers are not readable text (sail-sg/sdft I#9)",
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
        "rewrites are less than half as long as the references: the parts that they leave out are "
        "not taught",
        stops=False,
        below=0.5,
    ),
    Reason(
        "hedges_kept",
        "shown the reference the model writes fewer hedging words (wait, maybe), which can cost "
        "reasoning models much (2603.24472)",
        stops=False,
        below=0.5,
    ),
)


def reasons_that_hold(figures: dict[str, Any]) -> list[Reason]:
    """The REASONS that hold; a warning is left out where the same figure is a reason to stop."""
    held = [reason for reason in REASONS if reason.holds(figures)]
    stopping = {reason.figure for reason in held if reason.stops}
    return [reason for reason in held if reason.stops or reason.figure not in stopping]


def report_text(figures: dict[str, Any], reasons: Sequence[Reason], verify: str) -> str:
    """The figures and the verdict as text."""
    f = figures
    by_count = Counter(f["status"]).most_common()
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
        f"  being shown the reference: KL {f['kl']:.3f} (reverse {f['reverse_kl']:.3f}), NLL gap "
        f"{f['nll_gap']:.3f} nats per token; NLL of the rewrites under the plain prompt "
        f"{f['nll_plain']:.3f}",
        f"  own greedy answers: NLL {f['own_nll']:.3f} per token, {f['ended']:.0%} end, "
        f"{f['garbled']:.0%} garbled; hedging words per 100: {f['hedges_plain']:.2f} plain, "
        f"{f['hedges_shown']:.2f} shown",
    ]
    cost = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in f["seconds"].items())
    lines.append(f"  the whole job: {cost}; {f['disk_mb']:.0f} MB on disk")
    for reason in reasons:
        verdict = "NO" if reason.stops else "warning"
        lines.append(f"  {verdict}: {reason.text(f)}")
    stops = [reason.figure for reason in reasons if reason.stops]
    lines.append("GO" if f["go"] else f"NO-GO: {', '.join(stops)}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"

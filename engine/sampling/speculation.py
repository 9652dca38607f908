"""Guesses at a row's next tokens, taken from the reference it is about to paraphrase

Nothing here can change a text: a guess is kept only where the model draws the same token by itself.

`Drafter`     one per row: where in the reference (else in the row's own output) the text is now
`Controller`  one per run: how many guesses a step may carry, from the measured cost of steps and
              the share of guesses that held so far

The pointer begins at the head of the reference, moves with every token that agrees, and after a
mismatch goes to the nearest later place where the last two tokens stand; failing that, the last
place in the row's own output. (LLMA, arXiv 2304.04487, takes the first place in the reference and
has no pointer; suffix decoding, arXiv 2411.04975, lets the draft grow with the match.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

LONGEST = 12  # guesses per row and step
SEEN = 8  # a match of so many tokens is as good as a longer one


class Drafter:
    """Follows one row's text through its reference."""

    def __init__(self, reference: Sequence[int]) -> None:
        self.reference, self.out = list(reference), []
        self.source, self.at, self.match = self.reference, 0, 0
        self.places: dict[tuple[int, int], list[int]] = {}  # two tokens -> where what follows is
        for i, pair in enumerate(zip(self.reference, self.reference[1:], strict=False)):
            self.places.setdefault(pair, []).append(i + 2)
        self.own: dict[tuple[int, int], int] = {}  # the same for the output, the last place only
        self.furthest = 0  # in the reference: the pointer never goes back behind it

    def extend(self, token: int) -> None:
        """The row has got this token."""
        agreed = self.at < len(self.source) and self.source[self.at] == token
        self.out.append(token)
        if agreed:
            self.at, self.match = self.at + 1, self.match + 1
            if self.source is self.reference:
                self.furthest = self.at
        else:
            self._find()
        if len(self.out) > 1:
            self.own[self.out[-2], token] = len(self.out)

    def _find(self) -> None:
        """Look for the last two tokens after a mismatch."""
        pair = tuple(self.out[-2:])
        places = self.places.get(pair, [])
        later = bisect_left(places, self.furthest)
        self.match = 2
        if later < len(places):
            self.source, self.at = self.reference, places[later]
            self.furthest = self.at
        elif pair in self.own:
            self.source, self.at = self.out, self.own[pair]
        else:
            self.source, self.at, self.match = self.reference, len(self.reference), 0

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        return self.source[self.at : self.at + max(0, min(most, LONGEST))]


class Controller:
    """Decides per step which guesses are worth their computation.

    A step of n tokens, of at most w in each of B rows, is taken to cost a + b n + c B w seconds
    (products; attention, where the widest row sets the width), and s more, or less, if it was
    replayed (graphs.py; one with guesses never is), fitted to the steps so far with older ones
    fading. A guess at depth j of a row whose match is m holds with the share seen at
    (m, j). For each width the guesses likeliest to be reached are taken while tokens per second
    rise; the best width wins, if it promises GAIN: the fit is no better than that, and at full
    rows, where computing is what a step costs, drafts that promised less lost (measured).
    """

    FADE = 0.98  # per step: what was 50 steps ago counts a third
    PRIOR = 4.0  # tries at which experience weighs as much as the first opinion below
    GAIN = 1.1
    WIDTHS = (1, 2, 3, 5, 8, 1 + LONGEST)

    def __init__(self) -> None:
        # first opinion of a step's cost: half of it at 20 tokens, a wide row costs a fifth more
        self.products, self.seconds = np.zeros((4, 4)), np.zeros(4)
        for tokens, area in ((1, 1), (20, 20), (20, 40), (60, 60)):
            self.measured(tokens, area, 0.02 + 0.001 * tokens + 0.0002 * (area - tokens))
        self.tried = [[self.PRIOR] * LONGEST for _ in range(SEEN + 1)]
        first = [0.5, 0.6, 0.5, *[0.8] * (SEEN - 2)]  # by match: the head of a reference is likely
        self.held = [[p * self.PRIOR] * LONGEST for p in first]

    def measured(self, tokens: int, area: int, seconds: float, replayed: bool = False) -> None:
        """A step of that many tokens, and rows times the widest row, took that long."""
        x = np.array([1.0, tokens, area, replayed])
        self.products = self.FADE * self.products + np.outer(x, x)
        self.seconds = self.FADE * self.seconds + seconds * x

    def judged(self, match: int, drafted: int, held: int) -> None:
        """Of the guesses of a row with that match, so many held before one failed or all did."""
        row = min(match, SEEN)
        for depth in range(min(drafted, held + 1)):
            fade = 1.0 if self.tried[row][depth] < 200 else 0.5
            self.tried[row][depth] = self.tried[row][depth] * fade + 1
            self.held[row][depth] = self.held[row][depth] * fade + (depth < held)

    def pays(self, rows: int) -> bool:
        """Whether guesses at their likeliest would be taken of so many rows, by replayed steps."""
        return any(self.choose([SEEN] * rows, [LONGEST] * rows, replayed=True))

    def choose(
        self, matches: Sequence[int], offered: Sequence[int], replayed: bool = False
    ) -> list[int]:
        """Guesses to take of each row, which offers so many; `replayed`: steps without are."""
        rows, slots = len(matches), []
        for i, (match, most) in enumerate(zip(matches, offered, strict=True)):
            row, reached = min(match, SEEN), 1.0
            for depth in range(most):
                reached *= self.held[row][depth] / self.tried[row][depth]
                slots.append((-reached, depth, i))
        slots.sort()
        known = 4 if self.products[3, 3] else 3
        fitted = np.linalg.lstsq(self.products[:known, :known], self.seconds[:known], rcond=1e-9)
        a, b, c, s = [*fitted[0].tolist(), 0.0][:4]
        a, b, c = max(a, 1e-9), max(b, 0.0), max(c, 0.0)
        plain = max(a + (b + c) * rows + (s if replayed else 0.0), 1e-9)
        best, keep = self.GAIN * rows / plain, []
        for width in self.WIDTHS[1:]:
            fixed, expected = a + c * rows * width, float(rows)
            inside = [slot for slot in slots if slot[1] + 1 < width]
            for n, (reached, _, _) in enumerate(inside, start=1):
                expected -= reached
                if (rate := expected / (fixed + b * (rows + n))) > best:
                    best, keep = rate, inside[:n]
        taken = [0] * rows
        for _, _, i in keep:
            taken[i] += 1
        return taken

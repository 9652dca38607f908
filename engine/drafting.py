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
        return self.source[self.at : self.at + min(most, LONGEST)]


class Controller:
    """Decides per step which guesses are worth their computation.

    A step of n tokens is taken to cost a + b n seconds, fitted to the steps so far with older ones
    fading; a guess at depth j of a row whose match is m holds with the share seen at (m, j). The
    guesses likeliest to be reached are taken while tokens per second rise.
    """

    FADE = 0.98  # per step: what was 50 steps ago counts a third
    PRIOR = 4.0  # tries at which experience weighs as much as the first opinion below

    def __init__(self) -> None:
        self.moments = [0.0] * 5  # faded sums of 1, n, n n, seconds, n seconds
        self.tried = [[self.PRIOR] * LONGEST for _ in range(SEEN + 1)]
        first = [0.5, 0.6, 0.5, *[0.8] * (SEEN - 2)]  # by match: the head of a reference is likely
        self.held = [[p * self.PRIOR] * LONGEST for p in first]

    def cost(self, tokens: int) -> float:
        """Seconds (of any unit) of a step with so many tokens."""
        w, x, xx, y, xy = self.moments
        spread = w * xx - x * x
        if w == 0 or spread <= 1e-6 * w * xx:
            return 20.0 + tokens  # until two sizes were seen: half of the cost at 20 tokens
        slope = max((w * xy - x * y) / spread, 0.0)
        return max((y - slope * x) / w, 0.0) + slope * tokens + 1e-9

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long."""
        terms = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self.moments = [self.FADE * m + t for m, t in zip(self.moments, terms, strict=True)]

    def judged(self, match: int, drafted: int, held: int) -> None:
        """Of the guesses of a row with that match, so many held before one failed or all did."""
        row = min(match, SEEN)
        for depth in range(min(drafted, held + 1)):
            tried = self.tried[row][depth]
            fade = 1.0 if tried < 200 else 0.5
            self.tried[row][depth] = tried * fade + 1
            self.held[row][depth] = self.held[row][depth] * fade + (depth < held)

    def choose(self, matches: Sequence[int], offered: Sequence[int], room: int) -> list[int]:
        """Guesses to take of each row, which offers so many; at most `room` in all."""
        slots = []
        for i, (match, most) in enumerate(zip(matches, offered, strict=True)):
            row, reached = min(match, SEEN), 1.0
            for depth in range(most):
                reached *= self.held[row][depth] / self.tried[row][depth]
                slots.append((-reached, depth, i))
        slots.sort()
        taken, rows = [0] * len(matches), len(matches)
        expected, best, keep = float(rows), rows / self.cost(rows), 0
        for n, (reached, _, _) in enumerate(slots[:room], start=1):
            expected -= reached
            if (rate := expected / self.cost(rows + n)) > best:
                best, keep = rate, n
        for _, _, i in slots[:keep]:
            taken[i] += 1
        return taken

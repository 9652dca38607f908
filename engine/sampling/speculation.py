"""Speculative decoding: draft tokens are copied from the reference that is being paraphrased

Nothing here can change a text: a draft token is accepted only where the model samples the same
token by itself.

`Drafter`          one per sequence: follows the text through the reference (else through the
                   sequence's own output) and proposes what comes next there
`DraftController`  one per sampler: how many draft tokens a step may carry, from the measured cost
                   of steps and the share of draft tokens accepted so far

The pointer begins at the head of the reference, moves with every token that agrees, and after a
mismatch goes to the nearest later place where the last two tokens stand; failing that, to the last
such place in the sequence's own output. (LLMA, arXiv 2304.04487, takes the first place in the
reference and has no pointer; suffix decoding, arXiv 2411.04975, lets the draft grow with the
match.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

MAX_DRAFT = 12  # draft tokens per sequence and step
MAX_MATCH = 8  # a match of so many tokens is as good as a longer one


class Drafter:
    """Follows one sequence through its reference and proposes draft tokens."""

    def __init__(self, reference: Sequence[int]) -> None:
        self.reference = list(reference)
        self.output: list[int] = []  # tokens of the sequence so far
        self.source = self.reference  # where draft tokens are copied from: reference or output
        self.position = 0  # in the source: the token expected next
        self.match = 0  # tokens before the position that agreed
        self.furthest = 0  # position in the reference behind which the pointer never goes back
        # two tokens -> positions behind them: all in the reference, the last one in the output
        self.in_reference: dict[tuple[int, int], list[int]] = {}
        for i, pair in enumerate(zip(self.reference, self.reference[1:], strict=False)):
            self.in_reference.setdefault(pair, []).append(i + 2)
        self.in_output: dict[tuple[int, int], int] = {}

    def extend(self, token: int) -> None:
        """Move on by a token that was sampled."""
        agreed = self.position < len(self.source) and self.source[self.position] == token
        self.output.append(token)
        if agreed:
            self.position += 1
            self.match += 1
            if self.source is self.reference:
                self.furthest = self.position
        else:
            self._relocate()
        if len(self.output) > 1:
            self.in_output[self.output[-2], token] = len(self.output)

    def _relocate(self) -> None:
        """After a mismatch: look for the last two tokens, in the reference first."""
        pair = tuple(self.output[-2:])
        positions = self.in_reference.get(pair, [])
        later = bisect_left(positions, self.furthest)
        self.match = 2
        if later < len(positions):
            self.source, self.position = self.reference, positions[later]
            self.furthest = self.position
        elif pair in self.in_output:
            self.source, self.position = self.output, self.in_output[pair]
        else:
            self.source, self.position = self.reference, len(self.reference)
            self.match = 0

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` draft tokens, at most MAX_DRAFT."""
        count = max(0, min(limit, MAX_DRAFT))
        return self.source[self.position : self.position + count]


class DraftController:
    """Decides how many draft tokens of each sequence are worth their computation.

    Seconds of a step, fitted by least squares to the steps so far, older ones weighing less:

        seconds = a + b * tokens + c * area + s * replayed

        tokens     of the forward: one per sequence, and the draft tokens
        area       sequences * width, width = 1 + the most draft tokens of any sequence: attention
        replayed   1 for a replayed CUDA graph (cuda_graphs.py), 0 else and with draft tokens

    Probability that the draft token at depth j (0 is the first) is reached and accepted, for a
    sequence whose match is m tokens long, from the counts so far:

        share(m, j)    = accepted[m][j] / proposed[m][j]
        reached(m, j)  = share(m, 0) * share(m, 1) * ... * share(m, j)

    For every width of WIDTHS the n draft tokens with the highest `reached` among those that fit
    into the width would give

        tokens per second = (sequences + sum of reached) / (a + b * (sequences + n) + c * area)

    The best (width, n) is taken if it promises GAIN times the rate of a step without draft tokens:
    the fit is no better than that, and with many sequences, where computing is the cost of a step,
    drafts that promised less lost (measured).
    """

    DECAY = 0.98  # per step: a step 50 steps ago counts a third
    PRIOR = 4.0  # proposals at which the counts weigh as much as the first estimate below
    GAIN = 1.1
    WIDTHS = (2, 3, 5, 8, 1 + MAX_DRAFT)
    MANY = 200  # proposals from which on older ones count half

    def __init__(self) -> None:
        # normal equations of the least squares, over x = (1, tokens, area, replayed)
        self.xx = np.zeros((4, 4))  # sum of x x^T
        self.xy = np.zeros(4)  # sum of x * seconds
        # first estimate: half of a step's cost at 20 tokens; a wide sequence costs a fifth more
        for tokens, area in ((1, 1), (20, 20), (20, 40), (60, 60)):
            self.record_step(tokens, area, 0.02 + 0.001 * tokens + 0.0002 * (area - tokens))
        # by match, then by depth; the head of a reference (match 0) is likely to be followed
        shares = [0.5, 0.6, 0.5] + [0.8] * (MAX_MATCH - 2)
        self.proposed = [[self.PRIOR] * MAX_DRAFT for _ in shares]
        self.accepted = [[share * self.PRIOR] * MAX_DRAFT for share in shares]

    def record_step(self, tokens: int, area: int, seconds: float, replayed: bool = False) -> None:
        """Take the measured time of a step into the fit."""
        x = np.array([1.0, tokens, area, replayed])
        self.xx = self.DECAY * self.xx + np.outer(x, x)
        self.xy = self.DECAY * self.xy + seconds * x

    def record_acceptance(self, match: int, drafted: int, accepted: int) -> None:
        """Count a sequence's draft tokens: `accepted` of `drafted`, then one failed or none was
        left. Those behind a failed one say nothing."""
        m = min(match, MAX_MATCH)
        for depth in range(min(drafted, accepted + 1)):
            decay = 1.0 if self.proposed[m][depth] < self.MANY else 0.5
            self.proposed[m][depth] = self.proposed[m][depth] * decay + 1
            self.accepted[m][depth] = self.accepted[m][depth] * decay + (depth < accepted)

    def pays_off(self, sequences: int) -> bool:
        """Whether the likeliest draft tokens would be taken, beside replayed steps without."""
        return any(self.choose([MAX_MATCH] * sequences, [MAX_DRAFT] * sequences, replayed=True))

    def choose(
        self, matches: Sequence[int], offered: Sequence[int], replayed: bool = False
    ) -> list[int]:
        """Draft tokens to take of each sequence, from its match and how many it offers.

        replayed: whether a step without draft tokens would be a replayed CUDA graph.
        """
        sequences = len(matches)
        a, b, c, s = self._fit()
        plain_seconds = max(a + (b + c) * sequences + (s if replayed else 0.0), 1e-9)
        best_rate = self.GAIN * sequences / plain_seconds
        best: list[tuple[float, int, int]] = []
        candidates = self._candidates(matches, offered)
        for width in self.WIDTHS:
            fixed_seconds = a + c * sequences * width
            fitting = [candidate for candidate in candidates if candidate[1] + 1 < width]
            expected_tokens = float(sequences)
            for n, (minus_reached, _, _) in enumerate(fitting, start=1):
                expected_tokens -= minus_reached
                rate = expected_tokens / (fixed_seconds + b * (sequences + n))
                if rate > best_rate:
                    best_rate, best = rate, fitting[:n]
        taken = [0] * sequences
        for _, _, i in best:
            taken[i] += 1
        return taken

    def _fit(self) -> tuple[float, float, float, float]:
        """a, b, c, s of the cost of a step, in seconds; s is 0 while no step was replayed."""
        known = 4 if self.xx[3, 3] else 3
        fitted = np.linalg.lstsq(self.xx[:known, :known], self.xy[:known], rcond=1e-9)[0].tolist()
        a, b, c = fitted[:3]
        s = fitted[3] if known == 4 else 0.0
        return max(a, 1e-9), max(b, 0.0), max(c, 0.0), s

    def _candidates(
        self, matches: Sequence[int], offered: Sequence[int]
    ) -> list[tuple[float, int, int]]:
        """(-reached, depth, sequence) of every offered draft token, the likeliest first."""
        candidates = []
        for i, (match, count) in enumerate(zip(matches, offered, strict=True)):
            m = min(match, MAX_MATCH)
            reached = 1.0
            for depth in range(count):
                reached *= self.accepted[m][depth] / self.proposed[m][depth]
                candidates.append((-reached, depth, i))
        candidates.sort()
        return candidates

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
from typing import NamedTuple

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
        self.in_output: dict[tuple[int, int], int] = {}
        self.is_indexed = False  # `in_reference` is made

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Move on to the end of these tokens: all that were sampled so far."""
        for token in token_ids[len(self.output) :]:
            self.extend(token)

    def _index_reference(self) -> None:
        for end in range(2, len(self.reference) + 1):
            pair = (self.reference[end - 2], self.reference[end - 1])
            self.in_reference.setdefault(pair, []).append(end)
        self.is_indexed = True

    def extend(self, token: int) -> None:
        """Move on by a token that was sampled."""
        if not self.is_indexed:
            self._index_reference()
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
            pair = (self.output[-2], token)
            self.in_output[pair] = len(self.output)

    def _relocate(self) -> None:
        """After a mismatch: look for the last two tokens, in the reference first."""
        pair = tuple(self.output[-2:])
        positions = self.in_reference.get(pair, [])  # increasing
        nearest_later = bisect_left(positions, self.furthest)
        if nearest_later < len(positions):
            self.source = self.reference
            self.position = positions[nearest_later]
            self.furthest = self.position
            self.match = 2
        elif pair in self.in_output:
            self.source = self.output
            self.position = self.in_output[pair]
            self.match = 2
        else:  # nothing to copy
            self.source = self.reference
            self.position = len(self.reference)
            self.match = 0

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` draft tokens, at most MAX_DRAFT."""
        count = max(0, min(limit, MAX_DRAFT))
        return self.source[self.position : self.position + count]


class StepCost(NamedTuple):
    """The fitted seconds of a step: a + b * tokens + c * area + s * replayed."""

    a: float
    b: float
    c: float
    s: float  # 0 while no step was replayed


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

    A visit is what the host launches between two synchronisations: one step or several.
    """

    DECAY = 0.98  # per step: a step 50 steps ago counts a third
    PRIOR = 4.0  # proposals that the first estimates of the shares weigh as much as
    GAIN = 1.1
    WIDTHS = (2, 3, 5, 8, 1 + MAX_DRAFT)
    MANY = 200  # proposals from which on each further one halves the counts before it
    PAUSE = 20  # visits
    ROUNDING = 1 + 1e-9  # more than sums of some thousand numbers are wrong by
    LEAST = 1e-9  # seconds: a fitted cost is never taken for less

    def __init__(self) -> None:
        # normal equations of the least squares, over x = (1, tokens, area, replayed)
        self.xx = np.zeros((4, 4))  # sum of x x^T
        self.xy = np.zeros(4)  # sum of x * seconds
        # first estimate: half of a step's cost at 20 tokens; a wide sequence costs a fifth more
        for tokens, area in ((1, 1), (20, 20), (20, 40), (60, 60)):
            seconds = 0.02 + 0.001 * tokens + 0.0002 * (area - tokens)
            self.record_step(tokens, area, seconds)
        # by match, then by depth; the head of a reference (match 0) is likely to be followed
        first_shares = [0.5, 0.6, 0.5] + [0.8] * (MAX_MATCH - 2)
        counts = (len(first_shares), MAX_DRAFT)
        self.proposed = np.full(counts, self.PRIOR)
        self.accepted = np.empty(counts)
        self.accepted[:] = self.PRIOR * np.array(first_shares)[:, None]
        # after a "no": so many visits of so many sequences and more are not asked about
        self.paused_visits = 0
        self.paused_from = 0

    def record_step(self, tokens: int, area: int, seconds: float, replayed: bool = False) -> None:
        """Take the measured time of a step into the fit."""
        x = np.array([1.0, tokens, area, 1.0 if replayed else 0.0])
        self.xx = self.DECAY * self.xx + np.outer(x, x)
        self.xy = self.DECAY * self.xy + seconds * x

    def record_acceptance(self, match: int, drafted: int, accepted: int) -> None:
        """Count a sequence's draft tokens: the first `accepted` of `drafted` were accepted.

        The next one, if there was one, was rejected. Those behind it were not judged, and are not
        counted.
        """
        m = min(match, MAX_MATCH)
        judged = min(drafted, accepted + 1)
        for depth in range(judged):
            decay = 1.0 if self.proposed[m][depth] < self.MANY else 0.5
            was_accepted = 1 if depth < accepted else 0
            self.proposed[m][depth] = self.proposed[m][depth] * decay + 1
            self.accepted[m][depth] = self.accepted[m][depth] * decay + was_accepted

    def pays_off(self, sequences: int) -> bool:
        """Whether the likeliest draft tokens would be taken, beside replayed steps without.

        A "no" holds for the next PAUSE visits, for so many sequences and for more.
        """
        if self.is_paused(sequences):
            return False
        matches = [MAX_MATCH] * sequences
        offered = [MAX_DRAFT] * sequences
        if any(self.choose(matches, offered, replayed=True)):
            return True
        self.paused_visits = self.PAUSE
        self.paused_from = sequences
        return False

    def is_paused(self, sequences: int) -> bool:
        """Whether `pays_off` said no a short while ago: nothing is to be drafted or asked now."""
        return self.paused_visits > 0 and sequences >= self.paused_from

    def count_visit(self) -> None:
        """Decode steps were launched, as many as lie between two synchronisations."""
        self.paused_visits = max(0, self.paused_visits - 1)

    def choose(
        self, matches: Sequence[int], offered: Sequence[int], replayed: bool = False
    ) -> list[int]:
        """Draft tokens to take of each sequence, from its match and how many it offers.

        replayed: whether a step without draft tokens would be a replayed CUDA graph.
        """
        sequences = len(matches)
        if not any(offered):
            return [0] * sequences
        cost = self._fit()
        plain_seconds = cost.a + (cost.b + cost.c) * sequences + (cost.s if replayed else 0.0)
        best_rate = self.GAIN * sequences / max(plain_seconds, self.LEAST)
        reached, depth, owner = self._candidates(matches, offered)
        # no choice is faster than all draft tokens at the price of one
        least_seconds = cost.a + cost.b * (sequences + 1) + cost.c * sequences * self.WIDTHS[0]
        bound = (sequences + float(reached.sum())) / least_seconds
        if bound * self.ROUNDING <= best_rate:
            return [0] * sequences
        order = np.lexsort((owner, depth, -reached))  # the likeliest first
        reached, depth, owner = reached[order], depth[order], owner[order]
        rates, fits = self._rates(cost, sequences, reached, depth)
        width, last = np.unravel_index(np.argmax(rates), rates.shape)
        if not rates[width, last] > best_rate:
            return [0] * sequences
        taken = owner[: last + 1][fits[width, : last + 1]]  # of each draft token its sequence
        return np.bincount(taken, minlength=sequences).tolist()

    def _rates(
        self, cost: StepCost, sequences: int, reached: np.ndarray, depth: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens per second by width (W of them) and by the last draft token that is taken; (W, n).

        reached, depth: (n,) of all draft tokens, the likeliest first. Also (W, n): which of them
        fit into the width. A rate is 0 where the last one does not.
        """
        widths = np.array(self.WIDTHS)[:, None]
        # a width of w has room for the last token and draft tokens of depth 0 to w - 2
        fits = depth <= widths - 2
        tokens = np.empty((len(widths), len(reached) + 1))
        tokens[:, 0] = sequences  # one for each is certain
        tokens[:, 1:] = np.where(fits, reached, 0.0)
        expected_tokens = np.cumsum(tokens, axis=1)[:, 1:]
        counts = np.cumsum(fits, axis=1)
        seconds = cost.a + cost.c * sequences * widths + cost.b * (sequences + counts)
        return np.where(fits, expected_tokens / seconds, 0.0), fits

    def _fit(self) -> StepCost:
        """The least squares over the steps so far."""
        known = 4 if self.xx[3, 3] > 0 else 3  # replayed steps among them?
        solution = np.linalg.lstsq(self.xx[:known, :known], self.xy[:known], rcond=1e-9)[0]
        fitted = solution.tolist()
        return StepCost(
            a=max(fitted[0], self.LEAST),
            b=max(fitted[1], 0.0),
            c=max(fitted[2], 0.0),
            s=fitted[3] if known == 4 else 0.0,
        )

    def _candidates(
        self, matches: Sequence[int], offered: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every offered draft token: `reached`, depth, sequence; (n,) each."""
        shares = self.accepted / self.proposed  # by match, then by depth
        match = np.minimum(np.array(matches), MAX_MATCH)
        reached = np.cumprod(shares, axis=1)[match]  # (sequences, MAX_DRAFT)
        is_offered = np.arange(MAX_DRAFT) < np.array(offered)[:, None]
        owner, depth = np.nonzero(is_offered)  # (n,) both
        return reached[owner, depth], depth, owner

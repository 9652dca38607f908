"""Intervals and tests against values computed by hand, by counting, or by each other."""

import math

import numpy as np
import pytest

from engine.measure.intervals import (
    bootstrap,
    crossed_bootstrap,
    lost_won,
    mcnemar,
    sign_flip_test,
    t_interval,
    wilson,
)


def test_wilson():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943."""
    low, high = wilson(0.8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    low, high = wilson(0.0, 20)
    assert low == 0 and 0.15 < high < 0.17
    assert all(map(math.isnan, wilson(0.0, 0)))


def test_bootstrap_mcnemar_student():
    """McNemar: 2 (1 + 10) / 2^10; Student: t = 4.303 at two degrees of freedom."""
    assert mcnemar(1, 9) == pytest.approx(22 / 1024) and mcnemar(0, 0) == mcnemar(3, 3) == 1
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.303 / 3**0.5) == pytest.approx(mean - low)
    assert all(map(math.isnan, t_interval([1.0])[1:])) and math.isnan(bootstrap([1], [1])[0])
    assert bootstrap([2, 4, 6], [1, 2, 3]) == (2, 2)
    values = [float(i % 10) for i in range(400)]  # mean 4.5, sd 2.87, so 4.5 +- 0.28
    low, high = bootstrap(values, [1] * 400)
    assert low == pytest.approx(4.22, abs=0.04) and high == pytest.approx(4.78, abs=0.04)


def test_sign_flip_against_counting():
    """By hand: 2 + 1 - 1 = 2; the 8 sums of +-2 +-1 +-1 are 4, 2, 2, 0, 0, -2, -2, -4."""
    assert sign_flip_test([2, 1, -1]) == 6 / 8
    for counts in ((1, 9), (0, 0), (3, 3), (0, 6), (12, 30)):  # one seed: McNemar's
        ones = [-1] * counts[0] + [1] * counts[1] + [0] * 5
        assert sign_flip_test(ones) == pytest.approx(mcnemar(*counts), rel=1e-12)
    differences = [3, -1, 2, 2, 0, -3, 1, 1, 2]
    sizes = np.abs(differences)
    signs = (np.arange(2**9)[:, None] >> np.arange(9) & 1) * 2 - 1
    share = (np.abs(signs @ sizes) >= abs(sum(differences))).mean()
    assert sign_flip_test(differences) == pytest.approx(share, rel=1e-12)


def test_crossed_bootstrap():
    """One seed: the items alone. Items without spread: the seeds alone, means of 3 of (0, 3, 6)."""
    sums, weights = [float(i % 7) for i in range(300)], [1.0 + i % 3 for i in range(300)]
    mean, low, high = crossed_bootstrap([sums], weights)
    assert mean == sum(sums) / sum(weights)
    assert (low, high) == pytest.approx(bootstrap(sums, weights), abs=0.03)
    mean, low, high = crossed_bootstrap([[0.0] * 50, [3.0] * 50, [6.0] * 50], [1.0] * 50)
    assert mean == 3 and low == 0 and high == 6  # (1/3)^3 = 3.7 % each: beyond 2.5 %
    # both: variances of items and seeds add; a spread of seeds widens the interval
    values = np.array([sums, sums, sums])
    narrow = crossed_bootstrap(values, weights)
    wide = crossed_bootstrap(values + [[-1.0], [0.0], [1.0]], weights)
    assert narrow[1:] == pytest.approx(crossed_bootstrap([sums], weights)[1:], abs=0.03)
    assert wide[2] - wide[1] > 1.5 * (narrow[2] - narrow[1])
    assert math.isnan(crossed_bootstrap([[1.0]], [1.0])[1])


def test_lost_and_won_items():
    assert lost_won([1, 1, 0, 0, 0.5], [0, 1, 1, 1, 0.5]) == (1, 2)

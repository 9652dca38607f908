"""Intervals and tests against values computed by hand, by counting, or by each other."""

import itertools
import math

import numpy as np
import pytest

from engine.measure.intervals import (
    bootstrap,
    crossed_bootstrap,
    lost_won,
    mcnemar,
    mcnemar_power,
    sign_flip_test,
    smallest_difference,
    t_interval,
    wilson,
)


def test_wilson_gives_the_values_of_the_paper_and_nan_for_no_items():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943."""
    low, high = wilson(0.8, 10)
    assert round(low, 3) == 0.490
    assert round(high, 3) == 0.943
    low, high = wilson(0.0, 20)
    assert low == 0
    assert 0.15 < high < 0.17
    low, high = wilson(0.0, 0)
    assert math.isnan(low) and math.isnan(high)


def test_mcnemar_is_a_binomial_tail():
    """2 (1 + 10) / 2^10 for 1 and 9 items; 1 where the arms are equal."""
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1


def test_t_interval_has_students_width_and_is_nan_for_one_value():
    """t = 4.303 at two degrees of freedom."""
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.303 / 3**0.5)
    assert high - mean == pytest.approx(mean - low)
    _, low, high = t_interval([1.0])
    assert math.isnan(low) and math.isnan(high)


def test_bootstrap_is_the_interval_of_a_ratio_of_sums():
    low, _ = bootstrap([1], [1])
    assert math.isnan(low)
    assert bootstrap([2, 4, 6], [1, 2, 3]) == (2, 2), "every item has the same ratio"
    values = [float(i % 10) for i in range(400)]  # mean 4.5, sd 2.87, so 4.5 +- 0.28
    low, high = bootstrap(values, [1] * 400)
    assert low == pytest.approx(4.22, abs=0.04)
    assert high == pytest.approx(4.78, abs=0.04)


def test_sign_flip_test_equals_counting_all_signs():
    """By hand: 2 + 1 - 1 = 2; the 8 sums of +-2 +-1 +-1 are 4, 2, 2, 0, 0, -2, -2, -4."""
    assert sign_flip_test([2, 1, -1]) == 6 / 8
    differences = [3, -1, 2, 2, 0, -3, 1, 1, 2]
    sizes = np.abs(differences)
    bits = np.arange(2**9)[:, None] >> np.arange(9) & 1  # (512, 9), every choice of signs
    sums = (2 * bits - 1) @ sizes  # (512,)
    is_extreme = np.abs(sums) >= abs(sum(differences))
    assert sign_flip_test(differences) == pytest.approx(is_extreme.mean(), rel=1e-12)


@pytest.mark.parametrize("lost, won", [(1, 9), (0, 0), (3, 3), (0, 6), (12, 30)])
def test_sign_flip_test_of_one_seed_is_mcnemar(lost, won):
    differences = [-1] * lost + [1] * won + [0] * 5
    assert sign_flip_test(differences) == pytest.approx(mcnemar(lost, won), rel=1e-12)


SUMS = [float(i % 7) for i in range(300)]
WEIGHTS = [1.0 + i % 3 for i in range(300)]


def test_crossed_bootstrap_of_one_seed_resamples_the_items():
    mean, low, high = crossed_bootstrap([SUMS], WEIGHTS)
    assert mean == sum(SUMS) / sum(WEIGHTS)
    assert (low, high) == pytest.approx(bootstrap(SUMS, WEIGHTS), abs=0.03)
    _, low, _ = crossed_bootstrap([[1.0]], [1.0])
    assert math.isnan(low)


def test_crossed_bootstrap_of_equal_items_resamples_the_seeds():
    """Means of 3 draws of (0, 3, 6): all three are 0 in (1/3)^3 = 3.7 %, more than 2.5 %."""
    mean, low, high = crossed_bootstrap([[0.0] * 50, [3.0] * 50, [6.0] * 50], [1.0] * 50)
    assert mean == 3
    assert low == 0
    assert high == 6


def test_crossed_bootstrap_is_wider_where_seeds_differ():
    """The variances of items and seeds add."""
    values = np.array([SUMS, SUMS, SUMS])
    shifts = [[-1.0], [0.0], [1.0]]  # by seed
    _, one_low, one_high = crossed_bootstrap([SUMS], WEIGHTS)
    _, narrow_low, narrow_high = crossed_bootstrap(values, WEIGHTS)
    _, wide_low, wide_high = crossed_bootstrap(values + shifts, WEIGHTS)
    assert (narrow_low, narrow_high) == pytest.approx((one_low, one_high), abs=0.03)
    assert wide_high - wide_low > 1.5 * (narrow_high - narrow_low)


def test_lost_and_won_items_are_counted():
    assert lost_won([1, 1, 0, 0, 0.5], [0, 1, 1, 1, 0.5]) == (1, 2)


def test_the_power_of_mcnemars_test_is_exact():
    """By counting all outcomes of six items; and by hand where the loser never wins."""
    lost, won = 0.1, 0.6
    counted = 0.0
    for outcomes in itertools.product((lost, won, 1 - lost - won), repeat=6):
        only_first, only_second = outcomes.count(lost), outcomes.count(won)
        if mcnemar(only_first, only_second) < 0.05:
            counted += math.prod(outcomes)
    assert mcnemar_power(6, lost, won) == pytest.approx(counted, rel=1e-12) and counted > 0.04
    # six items all won: p = 2/64, five: p = 2/32
    assert mcnemar_power(6, 0.0, 0.5) == pytest.approx(0.5**6)
    assert mcnemar_power(5, 0.0, 1.0) == 0 and mcnemar_power(6, 0.0, 1.0) == 1
    assert mcnemar_power(900, 0.0, 0.0) == 0
    # equal arms: rejected in at most 5 % of the cases, as an exact test must
    assert 0.02 < mcnemar_power(900, 0.05, 0.05) < 0.05


def test_900_items_show_three_points_where_a_tenth_of_them_differ():
    """The claim of engine/evaluate/tasks/README.md, by the formula and by simulation."""
    lost, won = 0.035, 0.065  # 10 % of the items differ, by 3 points
    power = mcnemar_power(900, lost, won)
    assert 0.78 < power < 0.80
    draw = np.random.default_rng(0).multinomial(900, [lost, won, 1 - lost - won], size=4000)
    seen = [mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draw]
    assert np.mean(seen) == pytest.approx(power, abs=3 * math.sqrt(power * (1 - power) / 4000))
    # percent of items that differ -> points seen four times of five, as the page's table says
    for differ, points in ((4, 1.9), (6, 2.4), (8, 2.7), (10, 3.0), (15, 3.7), (20, 4.3)):
        smallest = 100 * smallest_difference(900, differ / 100)
        assert smallest == pytest.approx(points, abs=0.06)
    assert 15 < 100 * smallest_difference(40, 0.2) < 20, "forty items see a difference of 20 points"
    assert math.isnan(smallest_difference(40, 0.05))

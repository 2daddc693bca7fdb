"""Spreads and intervals, by hand and against what is known of them."""

from __future__ import annotations

import math
import random

import pytest

from edgespec.samples import Spread, interval, median, midmean, quantile, spread, widening


def test_a_spread_by_hand() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(5, 3.0, 1.0, 5.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(1, 7.0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize(("q", "value"), [(0, 1.0), (0.25, 1.75), (0.5, 2.5), (1, 4.0)])
def test_quantiles_lie_between_two_values(q: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], q) == value


def test_the_midmean_leaves_both_ends_out() -> None:
    assert midmean([1000.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -1000.0]) == 4.5
    assert midmean([1.0, 2.0]) == 1.5
    assert median([1000.0, 2.0, 3.0, -1000.0]) == 2.5


def test_the_same_items_give_the_same_interval() -> None:
    items = [random.Random(1).gauss(0, 1) for _ in range(20)]
    assert interval(items, median) == interval(list(items), median)
    assert interval([1.0] * 9, midmean) == (1.0, 1.0)


def test_few_items_widen_the_interval() -> None:
    """t of 99 % is 3.499 for 7 degrees of freedom and 2.651 for 70; z is 2.576."""
    assert widening(8) == pytest.approx(math.sqrt(8 / 7) * 3.499 / 2.576, rel=0.02)
    assert widening(71) == pytest.approx(math.sqrt(71 / 70) * 2.648 / 2.576, rel=0.001)
    assert widening(1) == 1.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """99 %: of 150 samples of ten, two or three may miss."""
    chance = random.Random(3)
    runs = [[chance.gauss(5, 1) for _ in range(10)] for _ in range(150)]
    hits = sum(low <= 5 <= high for low, high in (interval(items, midmean) for items in runs))
    assert 145 <= hits <= 150

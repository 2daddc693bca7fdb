"""What several measurements of one thing say together: their spread, and the interval of a figure over pairs.

Everything is seeded and in plain Python: the same numbers give the same bits on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TypeVar

RESAMPLES = 2000
CONFIDENCE = 0.99
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """n measurements: the median, the least and the most, and the quartiles."""

    n: int
    median: float
    least: float
    most: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of one or more values."""
    ordered = sorted(values)
    lower, middle, upper = (quantile(ordered, q) for q in (0.25, 0.5, 0.75))
    return Spread(len(ordered), middle, ordered[0], ordered[-1], lower, upper)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of ascending values, linear between two of them."""
    at = q * (len(ordered) - 1)
    i = min(int(at), len(ordered) - 2)
    return ordered[0] if len(ordered) == 1 else ordered[i] + (at - i) * (ordered[i + 1] - ordered[i])


def median(values: Sequence[float]) -> float:
    """The value in the middle."""
    return quantile(sorted(values), 0.5)


def midmean(values: Sequence[float]) -> float:
    """The mean of the middle half: bursts of load fall off its ends, and it varies less than the median."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return fmean(ordered[cut : len(ordered) - cut])


def interval(items: Sequence[T], figure: Callable[[Sequence[T]], float]) -> tuple[float, float]:
    """Where the figure of two or more such items lies with CONFIDENCE: a percentile bootstrap, widened.

    Efron (The Annals of Statistics 7, 1979). Of few items its interval is too narrow by the factor
    sqrt(n / (n-1)) t / z (Hesterberg, The American Statistician 69, 2015), so both ends move away by it.
    """
    chance = random.Random(0)
    found = sorted(figure(chance.choices(items, k=len(items))) for _ in range(RESAMPLES))
    middle, wider = figure(items), widening(len(items))
    low, high = (quantile(found, q) for q in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return middle + (low - middle) * wider, middle + (high - middle) * wider


def widening(n: int) -> float:
    """sqrt(n / (n-1)) t / z, t the quantile of n - 1 degrees of freedom by its expansion in 1 / (n-1)."""
    if n < 2:
        return 1.0
    z, v = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return math.sqrt(n / v) * t / z

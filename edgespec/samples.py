"""What several measurements of one thing say together: their spread, and the interval of a figure over pairs.

Everything is seeded and in plain Python: the same numbers give the same bits on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
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
    """Where the figure of such items lies with CONFIDENCE: the percentile bootstrap over items.

    Efron, The Annals of Statistics 7 (1979). With fewer than 8 items it covers less than it says.
    """
    chance = random.Random(0)
    found = sorted(figure(chance.choices(items, k=len(items))) for _ in range(RESAMPLES))
    return quantile(found, (1 - CONFIDENCE) / 2), quantile(found, (1 + CONFIDENCE) / 2)

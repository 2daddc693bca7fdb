"""How fast the wording is: its first questions answered with and without speculation, here and on devices.

`edgespec bench` does the measuring: this file only says what is asked.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgespec.bench_figures import ALL, Figures, figures_of, texts_different
from edgespec.bench_report import Prediction, Sample
from edgespec.suite import Item
from edgespec.workloads.recommend.wording import Asked


@dataclass(frozen=True)
class Speed:
    """Measured figures over all questions, predictions for devices, and questions whose texts differ (none).

    `bytes_rss_peak`: the most memory that this program had at once, the model's own process left out.
    """

    figures: Figures
    predicted: tuple[Prediction, ...]
    texts_different: tuple[str, ...]
    bytes_rss_peak: int

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


def questions(asked: Sequence[Asked]) -> tuple[Item, ...]:
    """The first question for every cluster's name and text."""
    found = []
    for i, one in enumerate(asked, 1):
        for what in ("name", "text") if one.candidates else ("name",):
            found.append(Item(f"{what}/{i}", what, one.prompt(what, 0)))
    return tuple(found)


def speed(samples: Sequence[Sample], predicted: Sequence[Prediction]) -> Speed:
    """The figures of what was measured."""
    return Speed(figures_of(ALL, samples, 0.0), tuple(predicted), texts_different(samples), _peak())


def _peak() -> int:
    """Bytes; the system counts them in KiB, but for macOS."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

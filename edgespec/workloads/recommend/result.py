"""What a run found, as plain facts, and the same as JSON. What was measured in time is not in it (speed)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgespec.workloads.recommend.placing import Typical
from edgespec.workloads.recommend.wording import Refused

SCHEMA = "edgespec.recommend/1"


@dataclass(frozen=True)
class Recommendation:
    """An artist: fans of the cluster who follow, their smoothed share, and its lift over everyone's."""

    artist: str
    fans: int
    rate: float
    lift: float


@dataclass(frozen=True)
class Cluster:
    """A group of fans: its words, what is recommended to it (best first), posts of its most typical fans.

    `name_by` and `text_by`: model, or plain where no answer of the model was believed; those are `refused`.
    """

    fans: int
    name: str
    name_by: str
    text: str
    text_by: str
    words: tuple[str, ...]
    recommended: tuple[Recommendation, ...]
    typical: tuple[Typical, ...]
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class Result:
    """The clusters, largest first in the sample, and what became of every line and name.

    `faults`: a sentence for each kind of line that was skipped. `silent`: posts without a word. `unplaced`:
    fans none of whose words is known. `unnamed`: artists of the list whom no post names.
    """

    lines: int
    posts: int
    silent: int
    faults: tuple[str, ...]
    fans: int
    unplaced: int
    artists: int
    unnamed: tuple[str, ...]
    notes: tuple[str, ...]
    silhouettes: dict[str, float]
    clusters: tuple[Cluster, ...]

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)

    @property
    def by_model(self) -> tuple[int, int]:
        """How many names and how many texts are the model's."""
        return tuple(sum(getattr(c, by) == "model" for c in self.clusters) for by in ("name_by", "text_by"))  # type: ignore[return-value]

"""Which artists a cluster's fans may like: counts of who follows whom, smoothed, against everyone's.

A fan follows an artist whom their posts name; posts are not counted, so that who writes much weighs no more.
Of an artist a, n of a cluster's N fans and the share p of all fans follow:

    rate  = (n + SMOOTHING p) / (N + SMOOTHING)     of a small cluster little is known: it leans on everyone
    lift  = rate / p
    score = rate lift^LIFT

LIFT 0 ranks by the chance that such a fan follows the artist, and repeats everyone's favourites in every
cluster; 1 ranks by what is peculiar to the cluster, however few follow. On made-up fans all three find
held-out artists alike (scripts/recommend_accuracy prints 0, a half and 1), so a half stays: it tells clusters
apart, and an artist of few fans needs a large lift.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

SMOOTHING = 10.0  # fans that everyone's taste counts for
LIFT = 0.5


@dataclass(frozen=True)
class Candidate:
    """An artist of a cluster: how many of its fans follow, their smoothed share, and that over everyone's."""

    artist: int
    fans: int
    rate: float
    lift: float


def ranked(
    follows: Sequence[int], fans: int, everyone: Sequence[int], all_fans: int, power: float = LIFT
) -> list[Candidate]:
    """The artists that at least one fan of the cluster follows, best first.

    follows[a]: fans of the cluster who follow a; everyone[a]: of all fans.
    """
    found = []
    for artist, (n, total) in enumerate(zip(follows, everyone, strict=True)):
        if n:
            share = total / all_fans
            rate = (n + SMOOTHING * share) / (fans + SMOOTHING)
            found.append(Candidate(artist, n, rate, rate / share))
    return sorted(found, key=lambda c: (-c.rate * c.lift**power, c.artist))


def popular(everyone: Sequence[int]) -> list[int]:
    """The artists by how many fans follow them: what is recommended to who is in no cluster."""
    return sorted((a for a, n in enumerate(everyone) if n), key=lambda a: (-everyone[a], a))


def recommended(order: Sequence[int], known: Container[int], count: int) -> list[int]:
    """The first of an order that a fan does not follow yet."""
    return [artist for artist in order if artist not in known][:count]

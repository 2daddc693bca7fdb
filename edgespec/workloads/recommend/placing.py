"""Third stage: every fan in their cluster, and what a cluster's fans say and follow.

placed-NNN.jsonl     [user, cluster or -1, distance to its centre, artists], a shard's fans
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import nsmallest
from itertools import islice
from pathlib import Path

import numpy as np

from edgespec.files import replaced
from edgespec.progress import Advance
from edgespec.workloads.recommend.artists import MARK
from edgespec.workloads.recommend.clusters import Places
from edgespec.workloads.recommend.fans import Fan, fans_of
from edgespec.workloads.recommend.folder import Folder
from edgespec.workloads.recommend.split import hashed, posts_of

PLACED = "placed"
TOGETHER = 500  # fans whose words are in memory as vectors
TYPICAL = 5  # fans of a cluster who are shown, with one post each
WORDS = 12  # of a cluster
Placed = tuple[str, int, float, list[int]]


@dataclass
class Group:
    """A cluster's counts: its fans, how many of them follow each artist, the fans nearest to its centre."""

    fans: int
    follows: list[int]
    nearest: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Typical:
    """A post that shows what a cluster talks about."""

    user: str
    time: str
    text: str


def place(places: Places, folder: Folder, shards: int, advance: Advance) -> None:
    """Write every shard's fans with their clusters, where that is missing."""
    for number in range(shards):
        path = folder.stage(PLACED, number)
        if not path.exists():
            replaced(path, partial(_write, _placed(places, fans_of(folder, number))))
        advance(number + 1, shards)


def placed(folder: Folder, shards: int) -> Iterator[Placed]:
    """All fans with their clusters."""
    for number in range(shards):
        with open(folder.stage(PLACED, number), encoding="utf-8") as file:
            for line in file:
                yield tuple(json.loads(line))


def count(fans: Iterable[Placed], clusters: int, artists: int) -> tuple[list[Group], Group]:
    """The counts of each cluster, and those of everyone, placed or not."""
    groups = [Group(0, [0] * artists) for _ in range(clusters)]
    everyone = Group(0, [0] * artists)
    for user, cluster, distance, follows in fans:
        for group in (everyone, *(groups[cluster : cluster + 1] if cluster >= 0 else ())):
            group.fans += 1
            for artist in follows:
                group.follows[artist] += 1
        if cluster >= 0:
            nearest = groups[cluster].nearest
            nearest.append((distance, user))
            if len(nearest) > 100 * TYPICAL:
                nearest[:] = nsmallest(TYPICAL, nearest)
    for group in groups:
        group.nearest = nsmallest(TYPICAL, group.nearest)
    return groups, everyone


def words(places: Places, fans: Iterable[Fan]) -> list[list[str]]:
    """Each cluster's words: those whose mean weight is furthest above everyone's, artists left out."""
    sums = np.zeros((len(places.centres), len(places.vocabulary)))
    sizes = np.zeros(len(places.centres))
    for some in _together(fans):
        counted = [fan.words for fan in some]
        vectors = places.vectors(counted)
        clusters, _ = places.nearest(counted, vectors)
        for cluster in set(clusters.tolist()) - {-1}:
            rows = vectors[clusters == cluster]
            sums[cluster] += np.asarray(rows.sum(axis=0)).ravel()
            sizes[cluster] += rows.shape[0]
    above = sums / np.maximum(sizes, 1)[:, None] - sums.sum(axis=0) / max(sizes.sum(), 1)
    kept = np.array([not word.startswith(MARK) for word in places.vocabulary])
    found = []
    for row in np.where(kept, above, 0.0):
        best = np.argsort(-row, kind="stable")[:WORDS]
        found.append([places.vocabulary[i] for i in best if row[i] > 0])
    return found


def typical(
    folder: Folder, shards: int, groups: Sequence[Group], said: Sequence[list[str]]
) -> list[list[Typical]]:
    """Of each cluster's fans nearest to its centre, the post with most of the cluster's words."""
    of = {user: cluster for cluster, group in enumerate(groups) for _, user in group.nearest}
    best: dict[str, tuple[int, Typical]] = {}
    for shard in sorted({hashed(user) % shards for user in of}):
        for user, time, post_words, text in posts_of(folder, shard):
            if user in of:
                score = len(set(post_words) & set(said[of[user]]))
                if user not in best or score > best[user][0]:
                    best[user] = score, Typical(user, time, text)
    return [[best[user][1] for _, user in group.nearest] for group in groups]


def _placed(places: Places, fans: Iterable[Fan]) -> Iterator[Placed]:
    for some in _together(fans):
        counted = [fan.words for fan in some]
        clusters, distances = places.nearest(counted, places.vectors(counted))
        for fan, cluster, distance in zip(some, clusters.tolist(), distances.tolist(), strict=True):
            yield fan.user, cluster, round(distance, 6), list(fan.artists)


def _together(fans: Iterable[Fan]) -> Iterator[list[Fan]]:
    left = iter(fans)
    while some := list(islice(left, TOGETHER)):
        yield some


def _write(lines: Iterable[Placed], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

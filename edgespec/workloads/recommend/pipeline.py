"""A run from posts to recommendations, stage by stage; each stage's files say what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgespec.files import replaced
from edgespec.progress import Progress
from edgespec.workloads.recommend import clusters, placing
from edgespec.workloads.recommend.artists import Artists
from edgespec.workloads.recommend.clusters import Places
from edgespec.workloads.recommend.fans import gather, sample, sampled
from edgespec.workloads.recommend.folder import FANS, Folder
from edgespec.workloads.recommend.placing import Group, Placed, Typical
from edgespec.workloads.recommend.ranking import Candidate, popular, ranked, recommended
from edgespec.workloads.recommend.result import Cluster, Recommendation, Result
from edgespec.workloads.recommend.split import Split, split
from edgespec.workloads.recommend.wording import Asked, Worded, readable

TOP = 5  # artists that are recommended
PLACES = "places"


@dataclass(frozen=True)
class Found:
    """What the posts say, before anything is worded: each cluster's counts, ranking, words, typical posts."""

    split: Split
    artists: Artists
    places: Places
    groups: list[Group]
    everyone: Group
    ranking: list[list[Candidate]]
    words: list[list[str]]
    typical: list[list[Typical]]


def find(posts: str, artists: Artists, wanted: int, folder: Folder, progress: Progress) -> Found:
    """Read, gather, cluster and count; stages that are done are not done again."""
    with progress.stage("posts") as advance:
        done = split(posts, artists, folder, advance)
    with progress.stage("fans") as advance:
        gather(folder, done.shards, advance)
    with progress.stage("clusters"):
        chosen = sample(folder, done.shards, clusters.SAMPLE)
        path = folder.stage(PLACES, form="npz")
        if not path.exists():
            found = clusters.fit((fan.words for fan in sampled(folder, done.shards, chosen)), wanted)
            found.save(path)
        places = Places.load(path)
        words = placing.words(places, sampled(folder, done.shards, chosen))
    with progress.stage("places") as advance:
        placing.place(places, folder, done.shards, advance)
    with progress.stage("counts"):
        number = len(artists.names)
        groups, everyone = placing.count(placing.placed(folder, done.shards), len(places.centres), number)
        ranking = [ranked(g.follows, g.fans, everyone.follows, everyone.fans) for g in groups]
        typical = placing.typical(folder, done.shards, groups, words)
    return Found(done, artists, places, groups, everyone, ranking, words, typical)


def write_fans(found: Found, folder: Folder) -> None:
    """A line for every user: cluster (null where they have none), whom they follow, whom they may like."""
    names = found.artists.names
    orders = [[one.artist for one in ranking] for ranking in found.ranking]
    orders.append(popular(found.everyone.follows))  # of cluster -1

    def line(fan: Placed) -> str:
        user, cluster, _, follows = fan
        further = recommended(orders[cluster], set(follows), TOP)
        told: dict[str, Any] = {"user": user, "cluster": None if cluster < 0 else cluster + 1}
        told |= {"follows": [names[a] for a in follows], "recommended": [names[a] for a in further]}
        return json.dumps(told, ensure_ascii=False) + "\n"

    replaced(
        folder.path / FANS, lambda path: _write(path, map(line, placing.placed(folder, found.split.shards)))
    )


def asked(found: Found, tokens_of: Callable[[str], int]) -> list[Asked]:
    """What a model that makes so many tokens of a word is told of each cluster."""
    names = found.artists.names
    return [
        Asked(
            readable(words, tokens_of) or tuple(words[:3]),
            tuple(names[one.artist] for one in ranking[:TOP]),
        )
        for words, ranking in zip(found.words, found.ranking, strict=True)
    ]


def result(found: Found, worded: Sequence[Worded]) -> Result:
    """All of it as plain facts."""
    names, split_ = found.artists.names, found.split
    made = []
    for i, (group, said) in enumerate(zip(found.groups, worded, strict=True)):
        best = tuple(
            Recommendation(names[c.artist], c.fans, round(c.rate, 6), round(c.lift, 6))
            for c in found.ranking[i][:TOP]
        )
        made.append(
            Cluster(
                group.fans,
                said.name,
                said.name_by,
                said.text,
                said.text_by,
                tuple(found.words[i]),
                best,
                tuple(found.typical[i]),
                said.refused,
            )
        )
    return Result(
        split_.lines,
        split_.posts,
        split_.silent,
        tuple(split_.faults.shown()),
        found.everyone.fans,
        found.everyone.fans - sum(group.fans for group in found.groups),
        len(names),
        tuple(name for name, n in zip(names, found.everyone.follows, strict=True) if not n),
        found.artists.notes,
        {str(k): round(value, 6) for k, value in found.places.silhouettes.items()},
        tuple(made),
    )


def _write(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)

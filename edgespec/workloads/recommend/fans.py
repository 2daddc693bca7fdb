"""Second stage: a shard's posts gathered into its fans, a line each. A fan is a user and all they wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import TextIO

from edgespec.files import replaced
from edgespec.progress import Advance
from edgespec.workloads.recommend.artists import MARK
from edgespec.workloads.recommend.folder import Folder
from edgespec.workloads.recommend.split import hashed, posts_of

FANS = "fans"
MOST_WORDS = 2_000  # different words of one fan; of a user who wrote more, the most used stay


@dataclass(frozen=True)
class Fan:
    """How often a user wrote each word, artists' marks among them, and in how many posts."""

    user: str
    posts: int
    words: dict[str, int]

    @property
    def artists(self) -> tuple[int, ...]:
        """Whom they follow: who is named in their posts at least once."""
        return tuple(sorted(int(word[1:]) for word in self.words if word.startswith(MARK)))


def gather(folder: Folder, shards: int, advance: Advance) -> None:
    """Write the fans of every shard that lacks them."""
    for number in range(shards):
        path = folder.stage(FANS, number)
        if not path.exists():
            replaced(path, partial(_write, _gathered(folder, number)))
        advance(number + 1, shards)


def fans_of(folder: Folder, shard: int) -> Iterator[Fan]:
    """The fans of a shard, by name."""
    with open(folder.stage(FANS, shard), encoding="utf-8") as file:
        for line in file:
            yield Fan(*json.loads(line))


def all_fans(folder: Folder, shards: int) -> Iterator[Fan]:
    """The fans of all shards."""
    for number in range(shards):
        yield from fans_of(folder, number)


def sample(folder: Folder, shards: int, size: int) -> set[int]:
    """The hashes of so many fans (or of all): those smallest, a draw that no order of the posts changes."""
    names = (hashed(f"sample {fan.user}") for fan in all_fans(folder, shards))
    return set(nsmallest(size, names))


def sampled(folder: Folder, shards: int, chosen: set[int]) -> Iterator[Fan]:
    """The fans of a sample."""
    return (fan for fan in all_fans(folder, shards) if hashed(f"sample {fan.user}") in chosen)


def _gathered(folder: Folder, shard: int) -> dict[str, tuple[int, Counter[str]]]:
    found: dict[str, tuple[int, Counter[str]]] = {}
    for user, _, words, _ in posts_of(folder, shard):
        posts, counts = found.get(user) or (0, Counter())
        counts.update(words)
        if len(counts) > 2 * MOST_WORDS:
            counts = _most(counts)
        found[user] = posts + 1, counts
    return found


def _most(counts: Counter[str]) -> Counter[str]:
    """The most used words, of equals the first by spelling."""
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]))


def _write(found: dict[str, tuple[int, Counter[str]]], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for user in sorted(found):
            _line(file, user, *found[user])


def _line(file: TextIO, user: str, posts: int, counts: Counter[str]) -> None:
    words = dict(sorted(_most(counts).items()))
    file.write(json.dumps([user, posts, words], ensure_ascii=False) + "\n")

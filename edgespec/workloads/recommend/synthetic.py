"""Made-up fans of known types and tastes, and their posts: what the recommender is judged by, and tried with.

A fan has a type, a language (Korean, English or both) and artists that they follow, drawn from their type's
taste: everyone's popularity, times BOOST for the type's favourites. Only a part of what they write is their
type's words; the rest is everybody's, some of it another type's, with links, accounts, hashtags, particles
and laughter. What is made is easier than the world: types share no words but everybody's, and each fan has
one type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from edgespec.workloads.recommend.synthetic_words import ARTISTS, EVERYBODY, PARTICLES, TYPES

POSTS_A_FAN = 32
FAVOURITES, BOOST = 6, 8.0  # artists of a type, and how much more its fans follow them
FOLLOWED = (2, 7)  # artists of a fan, least and most
OWN, OTHERS = 0.25, 0.05  # of a post's words: the type's, another type's
NAMED = 0.45  # posts that name an artist
LANGUAGES = ((0,), (1,), (0, 1))
LANGUAGE_WEIGHTS = (40, 40, 20)
LATIN, HANGUL = 1, 0


@dataclass(frozen=True)
class MadeFan:
    """Who writes: their type's number, the languages they write in, whom they follow."""

    user: str
    kind: int
    languages: tuple[int, ...]
    follows: tuple[int, ...]
    weight: float


class World:
    """Fans and their tastes, all drawn from one seed; `posts` draws what they write."""

    def __init__(self, seed: int, fans: int) -> None:
        self.chance = Random(f"fans {seed}")
        self.spellings = [[part.strip() for part in line.split("|")] for line in ARTISTS.splitlines()]
        count = len(self.spellings)
        self.popularity = [1 / (rank + 3) ** 0.8 for rank in range(count)]
        self.tastes = [self._taste(self.chance.sample(range(count), FAVOURITES)) for _ in TYPES]
        self.words = [[language.split() for language in both] for both in TYPES.values()]
        self.fans = [self._fan(number) for number in range(fans)]

    def artists(self) -> str:
        """The list that a recommender is given."""
        return ARTISTS + "\n"

    def posts(self, count: int) -> Iterator[tuple[MadeFan, int | None, str]]:
        """So many posts in no order: who writes, whom the post names, its text."""
        weights = list(accumulate(fan.weight for fan in self.fans))
        for _ in range(count):
            (fan,) = self.chance.choices(self.fans, cum_weights=weights)
            named = self.chance.choice(fan.follows) if self.chance.random() < NAMED else None
            yield fan, named, self._text(fan, named)

    def write(self, folder: Path, count: int) -> None:
        """posts.jsonl, artists.txt and, of every fan, what is true: truth.jsonl."""
        names = list(TYPES)
        (folder / "artists.txt").write_text(self.artists(), encoding="utf-8")
        with open(folder / "truth.jsonl", "w", encoding="utf-8") as file:
            for fan in self.fans:
                follows = [self.spellings[a][0] for a in fan.follows]
                line = {"user": fan.user, "type": names[fan.kind], "follows": follows}
                file.write(json.dumps(line) + "\n")
        with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
            for fan, _, text in self.posts(count):
                file.write(post(fan, text, self.chance.randrange(86_400)) + "\n")

    def _taste(self, favourites: list[int]) -> list[float]:
        return [p * (BOOST if a in favourites else 1.0) for a, p in enumerate(self.popularity)]

    def _fan(self, number: int) -> MadeFan:
        kind = self.chance.randrange(len(TYPES))
        follows: list[int] = []
        wanted = self.chance.randint(*FOLLOWED)
        while len(follows) < wanted:
            (one,) = self.chance.choices(range(len(self.popularity)), self.tastes[kind])
            if one not in follows:
                follows.append(one)
        (languages,) = self.chance.choices(LANGUAGES, LANGUAGE_WEIGHTS)
        weight = self.chance.lognormvariate(0.0, 0.7)
        return MadeFan(f"fan{number:06d}", kind, languages, tuple(follows), weight)

    def _text(self, fan: MadeFan, named: int | None) -> str:
        language = self.chance.choice(fan.languages)
        parts = [self._word(fan, language) for _ in range(self.chance.randint(4, 10))]
        if named is not None:
            parts.insert(self.chance.randrange(len(parts) + 1), self._name(named, language))
        for odds, extra in (
            (0.15, f"https://t.co/{self.chance.randrange(10**8):x}"),
            (0.15, f"@friend{self.chance.randrange(1000)}"),
            (0.15, self.chance.choice(["ㅋㅋㅋ", "ㅠㅠ", "😭😭", "!!!", "&lt;3", "💜"])),
        ):
            if self.chance.random() < odds:
                parts.insert(self.chance.randrange(len(parts) + 1), extra)
        return ("RT @someone: " if self.chance.random() < 0.05 else "") + " ".join(parts)

    def _word(self, fan: MadeFan, language: int) -> str:
        draw = self.chance.random()
        kind = fan.kind if draw < OWN else self.chance.randrange(len(TYPES))
        source = self.words[kind][language] if draw < OWN + OTHERS else EVERYBODY[language].split()
        word = self.chance.choice(source)
        if language == HANGUL:
            return word + (self.chance.choice(PARTICLES) if self.chance.random() < 0.4 else "")
        return word.capitalize() if self.chance.random() < 0.1 else word

    def _name(self, artist: int, language: int) -> str:
        spellings = self.spellings[artist]
        name = spellings[min(1, len(spellings) - 1)]
        if language == LATIN or self.chance.random() < 0.3:
            name = self.chance.choice(
                [spellings[0], spellings[-1] if spellings[-1][0] == "@" else spellings[0]]
            )
        if name[0] == "@":
            return name
        if self.chance.random() < 0.3:
            return "#" + name.replace(" ", "")
        if self.chance.random() < 0.2:
            name = name.lower()
        return name + (self.chance.choice(PARTICLES) if language == HANGUL else "")


def post(fan: MadeFan, text: str, second: int) -> str:
    """A line of the posts' file."""
    time = f"2025-06-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"
    return json.dumps({"user": fan.user, "text": text, "time": time}, ensure_ascii=False)

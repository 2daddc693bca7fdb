"""Fourth stage: the model names each cluster and words what is recommended to it, and may do nothing else.

The model sees a cluster's words and its candidates' names, never a post. It may choose among the candidates;
what it writes is believed only if every artist in it is one of them and every other word is an ordinary one
(`ordinary`) or one it was given, so that no artist, listed or not, can be invented: what could still pass is
one spelled in small letters of ordinary words. Every try is greedy, over other words and candidates; after
TRIES a plain sentence is written instead, and counted as such.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from edgespec.evaluation_log import whole_lines
from edgespec.progress import Advance
from edgespec.workloads.recommend.artists import MARK, Artists, artists_of
from edgespec.workloads.recommend.tokens import HASH, TOKEN, plain, stem, tokens

TRIES = 4
TOKENS = 40  # most of one answer
SHOWN_WORDS = 6  # of a cluster, to the model
LONGEST = {"name": 60, "text": 400}  # characters
FEWEST, MOST = {"name": 1, "text": 5}, {"name": 5, "text": 60}  # words beside artists' names
WORDED = "worded"
SHIPPED = (
    ("edgespec", ("specbench.json", "questions.json")),
    ("edgespec.exporters", ("wikitext.txt", "calibration.txt")),
)
OURS = "fans music song songs artists bands band listen enjoy recommend"  # ordinary here
MODEL, PLAIN = "model", "plain"
Say = Callable[[str], str]  # a prompt -> what the model says


@dataclass(frozen=True)
class Asked:
    """What the model is told of a cluster: words that it can read, and the candidates it may choose from."""

    words: tuple[str, ...]
    candidates: tuple[str, ...]

    def prompt(self, what: str, number: int) -> str:
        """The question of a try for a name, or for a text that recommends; each try shows other material."""
        words, artists = _turned(self.words or ("music",), number), _turned(self.candidates, number)[:2]
        if what == "name":
            return f"Write a title of three words about {listed(words[:3])}. Answer with the title only."
        told = f"If you love {listed(words[:2])}, you may also like {listed(artists)}."
        return f"Rewrite this sentence in a friendlier way: {told}"


@dataclass(frozen=True)
class Refused:
    """A try that was not believed: for what, why, and what it said."""

    what: str
    why: str
    said: str


@dataclass(frozen=True)
class Worded:
    """A cluster's name and text, who wrote each (model or plain), and the tries that were refused."""

    cluster: int
    name: str
    name_by: str
    text: str
    text_by: str
    refused: tuple[Refused, ...]


def word(asked: Sequence[Asked], artists: Artists, say: Say, path: Path, advance: Advance) -> list[Worded]:
    """Every cluster worded; each is a line of the file at once, and a stopped run goes on there."""
    lines = whole_lines(path) if path.exists() else []
    done = [_read(line) for line in lines]
    for cluster in range(len(done), len(asked)):
        done.append(_worded(cluster, asked[cluster], artists, say))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done[-1]), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        advance(cluster + 1, len(asked))
    return done


def plainly(cluster: int, asked: Asked) -> Worded:
    """What is written without a model."""
    name = " · ".join(asked.words[:3]) or f"cluster {cluster + 1}"
    text = "These fans name no artist of the list."
    if asked.candidates:
        text = f"Fans like these also follow {listed(asked.candidates[:3])}."
    return Worded(cluster, name, PLAIN, text, PLAIN, ())


def readable(words: Sequence[str], tokens_of: Callable[[str], int]) -> tuple[str, ...]:
    """The first words that a model was taught to read: those of no more tokens than letters."""
    return tuple(word for word in words if tokens_of(word) <= len(word))[:SHOWN_WORDS]


def problem(what: str, said: str, asked: Asked, artists: Artists) -> str | None:
    """Why an answer is not believed, or None."""
    if len(said) > LONGEST[what]:
        return "too long"
    marked = [token for token in artists.marked(tokens(said)) if token != HASH]
    named = {artists.names[artist] for artist in artists_of(marked)}
    own = [token for token in marked if not token.startswith(MARK)]
    if others := sorted(named - set(asked.candidates)):
        return f"names {others[0]}, which is no candidate"
    if what == "text" and not named:
        return "names none of the candidates"
    given = set(tokens(" ".join(asked.words)))
    for token in own:
        if token not in given and stem(token) not in given and token not in ordinary():
            return f"{token!r} is no ordinary word and might be a name"
    if not FEWEST[what] <= len(own) <= MOST[what]:
        return f"{len(own)} words beside the names"
    if what == "name":
        return None if given & set(own) and not named else "is not about the cluster's words"
    capital = _capital(said, asked)
    return f"{capital!r} is written like a name" if capital else None


@cache
def ordinary() -> frozenset[str]:
    """Words that are no names: what edgespec's own texts write in small letters, and scikit-learn's list."""
    found = set(ENGLISH_STOP_WORDS) | set(OURS.split()) | {"s"}
    for package, names in SHIPPED:
        for name in names:
            text = files(package).joinpath(name).read_text(encoding="utf-8")
            found |= set(re.findall(r"(?<![\w'])[a-z]+(?:'(?!s\b)[a-z]+)?(?!\w)", text))
    return frozenset(found)


def _worded(cluster: int, asked: Asked, artists: Artists, say: Say) -> Worded:
    refused: list[Refused] = []
    name = _tried("name", asked, artists, say, refused)
    text = _tried("text", asked, artists, say, refused) if asked.candidates else ""
    plain = plainly(cluster, asked)
    by = tuple(MODEL if said else PLAIN for said in (name, text))
    return Worded(cluster, name or plain.name, by[0], text or plain.text, by[1], tuple(refused))


def _tried(what: str, asked: Asked, artists: Artists, say: Say, refused: list[Refused]) -> str:
    """The first answer that is believed, or nothing."""
    for prompt in dict.fromkeys(asked.prompt(what, number) for number in range(TRIES)):
        said = _first(what, say(prompt))
        why = problem(what, said, asked, artists)
        if why is None:
            return said
        refused.append(Refused(what, why, said[: LONGEST["text"]]))
    return ""


def _first(what: str, said: str) -> str:
    """The first line of an answer, without quotes; of a text its first sentence."""
    line = next((line for line in said.splitlines() if line.strip()), "").strip(" \t\"'*“”")
    if what == "name":
        return re.split(r"[:,.!?]", line)[0].strip()
    sentence = re.match(r".+?[.!?](?=\s|$|[\"”])", line)
    return sentence.group() if sentence else line


def _capital(said: str, asked: Asked) -> str | None:
    """A word within a sentence that begins with a capital and is part of no candidate's name."""
    known = {token for name in asked.candidates for token in tokens(name)} | {"i"}
    text = plain(said)
    for found in TOKEN.finditer(text):
        token = found.group()
        before = text[: found.start()].rstrip(" \"'“(")
        if token[0].isupper() and token.casefold() not in known and before and before[-1] not in ".!?:":
            return token
    return None


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _turned(items: Sequence[str], number: int) -> tuple[str, ...]:
    at = number % max(1, len(items))
    return (*items[at:], *items[:at])


def _read(line: str) -> Worded:
    data: dict[str, Any] = json.loads(line)
    return Worded(**{**data, "refused": tuple(Refused(**one) for one in data["refused"])})

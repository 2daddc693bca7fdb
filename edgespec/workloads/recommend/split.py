"""First stage: every post cleaned, its artists marked, and put with the others of its user.

Users are dealt to shards by a hash of their names, so that a later stage holds one shard's users at a time.
The place reached is noted every CHECKPOINT lines: a run that was killed goes on from there, its shards cut
back to what they held.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from edgespec.errors import InputError
from edgespec.files import written_whole
from edgespec.progress import Advance
from edgespec.workloads.recommend.artists import MARK, Artists
from edgespec.workloads.recommend.folder import Folder, loaded
from edgespec.workloads.recommend.posts import Faults, read
from edgespec.workloads.recommend.tokens import is_word, stem, tokens

CHECKPOINT = 20_000  # lines
BYTES_A_SHARD, MOST_SHARDS = 4 * 2**20, 128
LONGEST_SHOWN = 500  # characters of a post that are kept for the page
STATE, POSTS = "split", "posts"


@dataclass
class Split:
    """How far the posts are read: `silent` are those without any letter, `sizes` the shards' bytes."""

    shards: int
    offset: int = 0
    lines: int = 0
    posts: int = 0
    silent: int = 0
    sizes: list[int] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    done: bool = False


def hashed(text: str) -> int:
    """64 bits of a text that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split(path: str, artists: Artists, folder: Folder, advance: Advance) -> Split:
    """The posts of a file in the folder's shards; goes on where an earlier run stopped."""
    size = os.path.getsize(path)
    state = _state(folder, size)
    if state.done:
        return state
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        file.seek(state.offset)
        shards = [stack.enter_context(_opened(folder, state, i)) for i in range(state.shards)]
        for post, offset in read(file, state.lines, state.faults):
            state.offset, state.lines = offset, state.lines + 1
            if post is not None:
                words = worded(artists.marked(tokens(post.text)))
                state.posts += 1
                state.silent += not words
                line = [post.user, post.time, words, post.text[:LONGEST_SHOWN]]
                shard = shards[hashed(post.user) % state.shards]
                shard.write(json.dumps(line, ensure_ascii=False) + "\n")
            if state.lines % CHECKPOINT == 0:
                _note(folder, state, shards)
                advance(offset, size)
        if not state.posts:
            raise InputError(f"{path} holds no post{_why(state)}", 'a line is {"user": ..., "text": ...}')
        state.done = True
        _note(folder, state, shards)
    return state


def worded(marked: list[str]) -> list[str]:
    """What is counted of a post: its words without particles, and its artists' marks."""
    return [token if token.startswith(MARK) else stem(token) for token in marked if is_word(token)]


def posts_of(folder: Folder, shard: int) -> Iterator[tuple[str, str, list[str], str]]:
    """User, time, words and text of every post in a shard."""
    with open(folder.stage(POSTS, shard), encoding="utf-8") as file:
        for line in file:
            user, time, words, text = json.loads(line)
            yield user, time, words, text


def _state(folder: Folder, size: int) -> Split:
    path = folder.stage(STATE, form="json")
    if not path.exists():
        shards = min(MOST_SHARDS, 1 + size // BYTES_A_SHARD)
        return Split(shards, sizes=[0] * shards)
    found: dict[str, Any] = loaded(path)
    return Split(**{**found, "faults": Faults(**found["faults"])})


def _opened(folder: Folder, state: Split, number: int) -> TextIO:
    """A shard's file, cut back to what it held when the place was last noted."""
    path = folder.stage(POSTS, number)
    path.touch()
    os.truncate(path, state.sizes[number])
    return path.open("a", encoding="utf-8")


def _note(folder: Folder, state: Split, shards: list[TextIO]) -> None:
    for i, file in enumerate(shards):
        file.flush()
        os.fsync(file.fileno())
        state.sizes[i] = Path(file.name).stat().st_size
    written_whole(folder.stage(STATE, form="json"), json.dumps(asdict(state)))


def _why(state: Split) -> str:
    said = state.faults.shown()
    return f" ({'; '.join(said)})" if said else ""

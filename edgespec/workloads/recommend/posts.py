"""The posts of a file, one JSON object a line: user, text and, where it is known, time.

Nobody vouches for the file: a line that is no post is counted by its fault, the first few are named by
number, and the others are read. A line is never held whole if it is longer than LONGEST_LINE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

LONGEST_LINE = 2**20  # bytes
LONGEST_USER, LONGEST_TIME = 200, 100  # characters
NAMED = 5  # lines of each fault that are named
BOM = b"\xef\xbb\xbf"

TOO_LONG = "longer than 1 MiB"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "broken JSON"
NO_OBJECT = "no JSON object"
NO_USER = "no user"
NO_TEXT = "no text"


@dataclass(frozen=True)
class Post:
    """What one user wrote; `time` is the file's own words, or empty."""

    user: str
    text: str
    time: str


@dataclass
class Faults:
    """How many lines had which fault, and the numbers of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, fault: str, line: int) -> None:
        """Count one more."""
        self.counts[fault] = self.counts.get(fault, 0) + 1
        named = self.lines.setdefault(fault, [])
        if len(named) < NAMED:
            named.append(line)

    def shown(self) -> list[str]:
        """A sentence for each fault."""
        return [f"{n:,} lines {fault}: {self._named(fault)}" for fault, n in sorted(self.counts.items())]

    def _named(self, fault: str) -> str:
        more = ", ..." if self.counts[fault] > len(self.lines[fault]) else ""
        return ", ".join(f"{n:,}" for n in self.lines[fault]) + more


def read(file: BinaryIO, line: int, faults: Faults) -> Iterator[tuple[Post | None, int]]:
    """Every line from where the file stands, as a post or None, and the bytes read; `line` counts on."""
    offset = file.tell()
    while content := file.readline(LONGEST_LINE + 1):
        offset += len(content)
        line += 1
        too_long = len(content) > LONGEST_LINE
        while too_long and not content.endswith(b"\n") and (content := file.readline(LONGEST_LINE)):
            offset += len(content)
        found = TOO_LONG if too_long else parsed(content)
        if isinstance(found, str):
            faults.add(found, line)
        yield (found if isinstance(found, Post) else None), offset


def parsed(content: bytes) -> Post | str | None:
    """A line's post, or its fault; None where it is empty."""
    content = content.removeprefix(BOM).strip()
    if not content:
        return None
    try:
        data = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(data, dict):
        return NO_OBJECT
    user, text = _name(data.get("user")), data.get("text")
    if not user:
        return NO_USER
    if not isinstance(text, str) or not text.strip():
        return NO_TEXT
    return Post(user, _sound(text), _name(data.get("time"))[:LONGEST_TIME])


def _name(value: Any) -> str:
    """A text or a number as a text, else nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = _sound(str(value)).strip()
    return text if len(text) <= LONGEST_USER else ""


def _sound(text: str) -> str:
    """The text without halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")

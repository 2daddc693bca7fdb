"""The evaluation's record: one JSON line for each finished cell, so that a run that was stopped goes on.

FOLDER/log.jsonl     {"schema": ..., "settings": ...}, then {"task": ..., "scores": [...], "time_s": ...}
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgespec.errors import InputError
from edgespec.evaluation_plan import Cell

SCHEMA = "edgespec.eval-log/1"
NAME = "log.jsonl"


@dataclass(frozen=True)
class Score:
    """One question's answer: are all its tokens the likeliest ones; -log p and KL from the un-evicted model.

    Both are means over the answer's tokens, in nats. `depth` is where the answer stands in the context.
    """

    depth: float | None
    right: bool
    nll: float
    kl: float


class Log:
    """The cells that are done, and where the next ones are written. Times are measured, and only in here."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / NAME
        self.done: dict[Cell, tuple[Score, ...]] = {}
        try:
            folder.mkdir(exist_ok=True)
            if self.path.exists() and (lines := whole_lines(self.path)):
                self._read(lines, settings)
            else:
                head = {"schema": SCHEMA, "settings": settings}
                self.path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path} cannot be used: {error}", "choose another folder with -o"
            ) from None

    def add(self, cell: Cell, scores: tuple[Score, ...], time_s: float) -> None:
        """Note a finished cell; it is on disk when this returns."""
        line = {**asdict(cell), "scores": [asdict(s) for s in scores], "time_s": round(time_s, 3)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[cell] = scores

    def _read(self, lines: list[str], settings: dict[str, Any]) -> None:
        hint = "choose another folder with -o, or remove this one"
        try:
            head, *rest = (json.loads(line) for line in lines)
            theirs = head["settings"] if head["schema"] == SCHEMA else None
            for line in rest:
                scores = tuple(Score(**score) for score in line.pop("scores"))
                line.pop("time_s")
                self.done[Cell(**line)] = scores
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} is damaged: {error}", hint) from None
        for name in settings:
            if theirs is None or theirs.get(name) != settings[name]:
                old, new = (None if s is None else s.get(name) for s in (theirs, settings))
                raise InputError(
                    f"{self.path} was made with another {name}: {short(old)}, not {short(new)}", hint
                )


def short(value: Any) -> str:
    """A value as a few words."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole_lines(path: Path) -> list[str]:
    """A log's lines; what a killed run left of its last one is cut off the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.decode("utf-8").splitlines()

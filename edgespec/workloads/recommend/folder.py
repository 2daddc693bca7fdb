"""A run's folder: what was asked, the finished stages, the results. The same run goes on, another is refused.

OUT/run.json       what the run is of: settings, and the SHA-256 of posts, artists and bundle
OUT/work/          stages that are done; removed at the end
OUT/fans.jsonl, speed.json, table.txt, report.html and, last, result.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from edgespec.errors import InputError
from edgespec.evaluation_log import short
from edgespec.files import written_whole

RUN, WORK = "run.json", "work"
FANS, SPEED, TABLE, PAGE, RESULT = "fans.jsonl", "speed.json", "table.txt", "report.html", "result.json"
SCHEMA = "edgespec.recommend-run/1"
CHOOSE = "choose another folder with -o, or remove this one"


class Folder:
    """The folder of one run, made or gone on with; InputError where it holds anything else."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.work = path, path / WORK
        try:
            path.mkdir(exist_ok=True)
            if (path / RUN).exists():
                self._compare(settings)
            elif any(path.iterdir()):
                raise InputError(f"{path} holds files of something else", CHOOSE)
            else:
                written_whole(path / RUN, json.dumps({"schema": SCHEMA, **settings}, indent=1) + "\n")
            if not self.finished:
                self.work.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be used: {error.strerror}", CHOOSE) from None

    @property
    def finished(self) -> bool:
        """Was the last file written?"""
        return (self.path / RESULT).exists()

    def stage(self, name: str, number: int | None = None, form: str = "jsonl") -> Path:
        """A stage's file, of one shard where they are numbered."""
        return self.work / f"{name}{'' if number is None else f'-{number:03d}'}.{form}"

    def clear(self) -> None:
        """The results are written: the stages, which hold every post, have no use any more."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _compare(self, settings: dict[str, Any]) -> None:
        theirs = loaded(self.path / RUN)
        if theirs.pop("schema", None) != SCHEMA:
            raise InputError(f"{self.path / RUN} is not of this version", CHOOSE)
        for name, value in settings.items():
            if theirs.get(name) != value:
                old, new = short(theirs.get(name)), short(value)
                raise InputError(f"{self.path} was made with another {name}: {old}, not {new}", CHOOSE)


def loaded(path: Path) -> dict[str, Any]:
    """A JSON object of the run's own; InputError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}", CHOOSE) from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: no object", CHOOSE)
    return found


def sha256(path: Path | str) -> str:
    """A file's digest, read in parts; InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "give a file that can be read") from None

"""A benchmark's record: a JSON line for each prompt that every contender has answered, so that it can go on.

OUTPUT.part     {"schema": ..., "run": ..., "settings": ...}, then {"device": ..., "round": ..., ...}
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgespec.bench_report import Sample, Traced
from edgespec.errors import BundleError, InputError
from edgespec.evaluation_log import short, whole_lines
from edgespec.plain import from_json

SCHEMA = "edgespec.bench-log/2"


@dataclass(frozen=True)
class Entry:
    """One prompt in one round: each contender's samples and traces, or why the prompt was left out.

    `device`: whose predicted call costs ended the drafts, for the traces alone; empty where it was measured.
    `process`: each contender's how-manieth process of the benchmark answered.
    """

    device: str
    round: int
    process: int
    prompt: str
    left_out: str
    samples: dict[str, tuple[Sample, ...]]
    traces: dict[str, tuple[Traced, ...]]


class BenchLog:
    """The entries that are done. `head` is what was true when the benchmark began, also a stopped one."""

    def __init__(self, path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[tuple[str, int, str], Entry] = {}
        self.head: dict[str, Any] = {
            "schema": SCHEMA,
            "run": uuid.uuid4().hex,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "facts": dict(facts),
            "settings": json.loads(json.dumps(settings)),
        }
        try:
            if path.exists() and (lines := whole_lines(path)):
                self._read(lines)
            else:
                path.write_text(json.dumps(self.head) + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be used: {error}", "choose another output with -o") from None

    @property
    def processes(self) -> int:
        """How many processes of each contender have answered so far."""
        return 1 + max((entry.process for entry in self.done.values()), default=-1)

    def add(self, entry: Entry) -> None:
        """Note a finished prompt; it is on disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[entry.device, entry.round, entry.prompt] = entry

    def remove(self) -> None:
        """The report is written: the record has no use any more."""
        self.path.unlink(missing_ok=True)

    def _read(self, lines: list[str]) -> None:
        hint = f"remove {self.path}, or choose another output with -o"
        try:
            head, *rest = (json.loads(line) for line in lines)
            theirs = head["settings"] if head["schema"] == SCHEMA else {}
            entries: list[Entry] = [from_json(Entry, data, "entry") for data in rest]
            head["facts"], head["run"], head["made"]
        except BundleError as error:
            raise InputError(f"{self.path} is damaged: {error.message}", hint) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} is damaged: {error}", hint) from None
        for name, value in self.head["settings"].items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{self.path}, of a benchmark that was stopped, has another {name}: "
                    f"{short(theirs.get(name))}, not {short(value)}",
                    hint,
                )
        self.head = head
        self.done = {(e.device, e.round, e.prompt): e for e in entries}

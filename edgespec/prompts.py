"""Reads files of prompts: what people ask a model, from the formats that data sets come in.

JSON lines, a JSON list (both also gzipped), CSV with a header, or plain text with a prompt a line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgespec.errors import InputError

# A record's text is its first field of these; of a list, `turns` in MT-Bench and Spec-Bench, the first entry.
FIELDS = ("turns", "instruction", "prompt", "question", "text", "Q")
ANSWERS = ("output", "response", "answer", "A")
HINT = f"give .jsonl, .json, .csv or .txt; a record's prompt is its field {', '.join(FIELDS)}"


@dataclass(frozen=True)
class Prompt:
    """One question: its text, and the category that its file names (else the file's own name)."""

    text: str
    category: str


def digest(text: str) -> str:
    """16 hexadecimal digits of a prompt, the same however it is spaced and in whatever case."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]


def read(path: str | Path, answers: bool = False) -> list[Prompt]:
    """The prompts of a file, in its order, with their `answers` below if wanted; InputError for a file that
    holds none or cannot be read.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = raw.decode("utf-8")
    except OSError as error:
        reason = error.strerror or "it is not gzip"
        raise InputError(f"prompts {path} cannot be read: {reason}", "give an existing file") from None
    except (EOFError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {path} cannot be read: {error}", HINT) from None
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    name = path.name.split(".")[0]
    try:
        pairs = ((text_of(r, answers), r) for r in records(text, kind))
        found = [Prompt(t, str(r.get("category", name))) for t, r in pairs if t]
    except (ValueError, KeyError) as error:
        raise InputError(f"prompts {path}: {error}", HINT) from None
    if not found:
        raise InputError(f"prompts {path} holds no prompt", HINT)
    return found


def records(text: str, kind: str) -> Iterator[dict[str, Any]]:
    """The records of a file's text; ValueError says which line is none."""
    if kind == ".json":
        whole = json.loads(text)
        if not isinstance(whole, list):
            raise ValueError("it is no list")
        lines = list(enumerate(whole, 1))
    elif kind == ".csv":
        lines = list(enumerate(csv.DictReader(io.StringIO(text)), 2))
    elif kind == ".jsonl":
        lines = [(n, parsed(n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        lines = [(n, {"text": line}) for n, line in enumerate(text.split("\n"), 1)]
    for number, record in lines:
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is no object")
        yield record


def parsed(number: int, line: str) -> Any:
    """A line's JSON; ValueError with its number."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON: {error}") from None


def text_of(record: dict[str, Any], answers: bool = False) -> str:
    """A record's prompt with its `input`, where it has one, below, then its answer if wanted; empty where it
    has none.
    """
    value = next((record[name] for name in FIELDS if record.get(name)), "")
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str):
        raise ValueError(f"a prompt is {type(value).__name__}, not text")
    parts = [value, record.get("input", ""), *((record.get(name) for name in ANSWERS) if answers else ())]
    return "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())

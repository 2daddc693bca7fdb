"""What the runtime recorded of a conversation: every graph call with its width, valid rows and time.

JSON lines, as `edgespec generate --trace FILE` writes them: for each request a `prompt`, which also says
what drafts were decided by, and its `round`s. A call is [model, kind, width, rows, microseconds]. Nobody
vouches for a trace, so every field is checked when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgespec.errors import InputError
from edgespec.spec import KINDS, MODELS, VISION

UNKNOWN = "unknown"
RECORD = "record it again: edgespec generate BUNDLE PROMPT --trace FILE"


@dataclass(frozen=True)
class Call:
    """One graph call as it ran: `rows` of its width were valid."""

    model: str
    kind: str
    width: int
    rows: int
    time_s: float


@dataclass(frozen=True)
class Round:
    """One round: tokens emitted, drafted and accepted, who drafted and why the draft ended, its calls."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    drafter: str
    stop: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Turn:
    """A request: the prompt's tokens, the calls that absorbed it, and the rounds that answered. `known`:
    tokens of the conversation before it, fewer than were said where some were taken back; None if unsaid.
    `unheard`: how many of the tokens before it, and with it, are rows of pictures that a draft does not hold.
    """

    known: int | None
    tokens_prompt: int
    calls: tuple[Call, ...]
    rounds: tuple[Round, ...]
    unheard: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Trace:
    """A conversation. `table` names the call costs that the runtime decided by, `stop_rule` the rule that
    ended drafts; `unknown` in a trace that does not say. `lines` is the text it was read from.
    """

    turns: tuple[Turn, ...]
    table: str = UNKNOWN
    stop_rule: str = UNKNOWN
    temperature: float = 0.0
    lines: tuple[str, ...] = field(default=(), repr=False)


def read_trace(path: Path | str) -> Trace:
    """The trace in a file of JSON lines; InputError for one that cannot be read, is empty or makes no
    sense.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"trace {path} cannot be read: {error}", RECORD) from None
    return parse_trace(text.splitlines(), str(path))


def parse_trace(lines: Iterable[str], where: str = "trace") -> Trace:
    """The trace in these lines; `where` only names it in errors."""
    kept = tuple(line for line in lines if line.strip())
    settings: dict[str, Any] = {}
    turns: list[tuple[int | None, int, tuple[Call, ...], list[Round], tuple[int, int]]] = []
    for number, line in enumerate(kept, 1):
        place = f"{where}, line {number}"
        event = _event(line, place)
        if event["event"] == "prompt":
            settings = settings or event
            known = _whole(event, "known", place) if "known" in event else None
            unheard = _unheard(event, place)
            turns.append((known, _whole(event, "tokens", place), _calls(event, place), [], unheard))
        elif event["event"] == "round":
            if not turns:
                raise InputError(f"{place}: a round stands before any prompt", RECORD)
            turns[-1][3].append(_round(event, place))
    if not turns:
        raise InputError(f"{where} is empty: it holds no prompt", RECORD)
    heat = settings.get("temperature", 0.0)
    if type(heat) not in (int, float) or heat < 0:
        raise InputError(f"{where}: temperature is {heat!r}", RECORD)
    return Trace(
        tuple(
            Turn(known, tokens, calls, tuple(rounds), unheard)
            for known, tokens, calls, rounds, unheard in turns
        ),
        str(settings.get("table", UNKNOWN)),
        str(settings.get("stop_rule", UNKNOWN)),
        float(heat),
        kept,
    )


def _event(line: str, place: str) -> dict[str, Any]:
    try:
        event = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {str(error)[:80]}", RECORD) from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise InputError(f"{place} is no event of a trace", RECORD)
    return event


def _unheard(event: dict[str, Any], place: str) -> tuple[int, int]:
    found = event.get("unheard", [0, 0])
    right = isinstance(found, list) and [type(n) for n in found] == [int, int]
    if not right or not 0 <= found[0] <= found[1] < 2**31:
        raise InputError(f"{place}: unheard is {str(found)[:40]}", RECORD)
    return found[0], found[1]


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _round(event: dict[str, Any], place: str) -> Round:
    tokens = event.get("tokens")
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise InputError(f"{place}: tokens are no list of ids", RECORD)
    drafted, accepted = _whole(event, "drafted", place), _whole(event, "accepted", place)
    if accepted > drafted:
        raise InputError(f"{place}: {accepted} tokens accepted of {drafted} drafted", RECORD)
    words = (str(event.get("drafter", UNKNOWN)), str(event.get("stop", UNKNOWN)))
    return Round(tuple(tokens), drafted, accepted, *words, _calls(event, place))


def _calls(event: dict[str, Any], place: str) -> tuple[Call, ...]:
    data = event.get("calls")
    if not isinstance(data, list):
        raise InputError(f"{place} has no calls", RECORD)
    return tuple(_call(item, place) for item in data)


def _call(item: Any, place: str) -> Call:
    right = isinstance(item, list) and [type(x) for x in item[:4]] == [str, str, int, int] and len(item) == 5
    if not right or item[0] not in (*MODELS, VISION) or item[1] not in KINDS or min(item[2:4]) < 1:
        raise InputError(f"{place}: {str(item)[:80]} is no call", RECORD)
    if type(item[4]) not in (int, float) or not 0 <= item[4] < math.inf:
        raise InputError(f"{place}: a call took {item[4]!r} microseconds", RECORD)
    model, kind, width, rows, us = item
    return Call(model, kind, width, rows, us * 1e-6)


def _whole(event: dict[str, Any], name: str, place: str) -> int:
    value = event.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(f"{place}: {name} is {value!r}, no count", RECORD)
    return value

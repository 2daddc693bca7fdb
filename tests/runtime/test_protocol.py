"""The protocol's parser among nonsense: each line gets one answer, and the next request is served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime
from tests.helpers.running import LIST, OPEN, PLAIN, SAY, driven, lines, start, text, tokens, told


@pytest.fixture(scope="module")
def bundle(opened: Callable[..., Runtime]) -> Path:
    return opened(**PLAIN).bundle.path


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


WRONG = "a request is one JSON object a line of at most 64 MiB"
NONSENSE = {
    b"{": WRONG,
    b"\xff\xfe\x00": WRONG,
    b'{"op":"sessions","id":1} {}': WRONG,
    b'"' + b"x" * (65 << 20) + b'"': WRONG,
    b'{"op":"sessions","id":' + deep(10**6) + b"}": WRONG,  # a stack that overflowed ended it
    b'{"op":"sessions","id":7,"x":' + b'{"a":' * 10**6 + b"0" + b"}" * 10**6 + b"}": WRONG,
    b'{"op":"cancel","id":7,"request":' + deep(10**6) + b"}": WRONG,
    b"[" * (10 << 20): WRONG,
    b'{"op":"sessions","id":1e999}': WRONG,
    b'{"op":"sessions"}': "a request's id is a text or a whole number",
    b'{"op":"sessions","id":[[1]]}': "a request's id is a text or a whole number",
    b'{"op":"sessions","id":18446744073709551615}': "id must be at most 9223372036854775807",
    b'{"op":"sessions","id":"' + b"x" * 5000 + b'"}': "id must be a text",
}


def test_lines_that_are_no_requests(bundle: Path) -> None:
    with start(bundle) as process:
        requests = lines(OPEN) + b"".join(line + b"\n\n" for line in NONSENSE) + lines(SAY)
        events = told(process.communicate(requests, timeout=120)[0])
    errors = [e for e in events if e["event"] == "error"]
    assert [e["error"] for e in errors] == list(NONSENSE.values())
    assert all(e["id"] is None and e["hint"] == "see edgespec-runtime --help" for e in errors)
    assert len(tokens(events)) == 30 and process.returncode == 0


def test_an_endless_line_at_the_end(bundle: Path) -> None:
    """It got no answer where no line's end came."""
    with start(bundle) as process:
        events = told(process.communicate(b"x" * (65 << 20), timeout=60)[0])
    assert [e.get("error") for e in events] == [None, WRONG] and process.returncode == 0


def test_a_long_line_that_waits_is_not_read_again_and_again(bundle: Path) -> None:
    """Each round parsed what waited and held the word cancel; a deep one ended the program."""
    request = {**SAY, "max_new_tokens": 900}
    waits = [b'{"op":"sessions","id":5,"cancel":["cancel"' + b',"x"' * 10**5 + b"]}\n"]
    waits += [b'{"op":"cancel","id":6,"request":' + deep(10**4) + b"}\n"]
    with start(bundle) as process:
        events = told(process.communicate(lines(OPEN, request) + b"".join(waits), timeout=120)[0])
    assert [e["error"] for e in events if e["event"] == "error"] == ['unknown field "cancel"', WRONG]
    assert [e["reason"] for e in events if "reason" in e] in (["length"], ["stop"])


REQUESTS = [
    OPEN,
    LIST,
    {"op": "close", "id": 2, "session": "b"},
    {"op": "truncate", "id": 3, "session": "a", "tokens": 1},
    {"op": "cancel", "id": 4, "request": "x"},
    {"op": "restore", "id": 5, "session": "a", "path": "/"},
    {"op": "generate", "id": "x", "session": "a", "tokens": [5, 6, 7], "max_new_tokens": 3},
    {"op": "generate", "id": "x", "session": "a", "tokens": [5, 6, 7], "max_new_tokens": 3,
     "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 7,
     "drafter": "draft", "stop_rule": "fixed", "draft_tokens": 2, "threshold": 0.5, "lambda": 0.5,
     "acceptance": 0.5, "stop_ids": [2], "trace": True},
]  # fmt: skip
PIECES = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u0000", b"\\ud800", b"\xf0\x9f", b"\x00", b"null"]
PIECES += [b"1e308", b"-1", b"9" * 20, b"1" * 400, b"[" * 3000, b'{"a":' * 3000, b'"id":1,']


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request with bytes cut out, doubled and put in."""
    line = json.dumps(draw(st.sampled_from(REQUESTS))).encode()
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(line)))
        end = min(len(line), at + draw(st.integers(0, 8)))
        new = draw(st.sampled_from(PIECES) | st.binary(max_size=3) | st.just(line[at:end] * 2))
        line = line[:at] + new + line[end:]
    return line


@pytest.fixture(scope="module")
def fuzzed(bundle: Path) -> Iterator[tuple[Process, list[int]]]:
    with driven(bundle) as process:
        process.ask("open", session="kept")
        yield process, text(process, "kept", [5, 6, 7], 5)
    assert process.child.returncode == 0


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(junk=st.lists(mutated() | st.binary(max_size=60), max_size=5))
def test_fuzzed_lines_get_one_answer_each(fuzzed: tuple[Process, list[int]], junk: list[bytes]) -> None:
    """Whatever was sent, the next request is served, and a conversation that was open says the same."""
    process, wanted = fuzzed
    junk = [line.replace(b"\n", b" ") for line in junk if line]
    assert process.child.stdin
    process.child.stdin.buffer.write(b"".join(line + b"\n" for line in junk) + lines({**LIST, "id": "last"}))
    process.child.stdin.buffer.flush()
    answers: list[dict[str, Any]] = []
    while not answers or answers[-1]["id"] != "last":
        event = process._next()
        if event["event"] in ("done", "error"):
            answers.append(event)
        assert event["event"] != "error" or (event["error"] and event["hint"])
    assert len(answers) == len(junk) + 1
    assert text(process, "kept", [5, 6, 7], 5) == wanted

"""The driver against a scripted runtime: death, silence, nonsense and refusals all end in two clear lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgespec.errors import BackendError, InputError
from edgespec.runtime.process import Process
from tests.helpers.fake_runtime import SAYS

FAKE = Path(__file__).parent.parent / "helpers" / "fake_runtime.py"


def start(how: str, timeout: float = 30) -> Process:
    return Process([sys.executable, str(FAKE), how], timeout)


def test_events_in_order_and_a_clean_end() -> None:
    with start("well") as process:
        events = list(process.events("generate", tokens=[1, 2]))
        assert [e["event"] for e in events] == ["prompt", *["round"] * len(SAYS), "done"]
        assert process.ask("open", session="a")["event"] == "done"
    assert process.child.returncode == 0


def test_what_an_early_reader_left_is_not_mixed_with_the_next_answer() -> None:
    with start("well") as process:
        next(process.events("generate", tokens=[1]))
        tokens = [
            t for e in process.events("generate", tokens=[5]) if e["event"] == "round" for t in e["tokens"]
        ]
        assert tokens == SAYS


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dies", "the runtime ended with exit code 7: the last words"),
        ("killed", "the runtime was killed by signal 9"),
        ("babbles", "the runtime's output makes no sense: 'no JSON"),
        ("panics", "a bug of edgespec-runtime"),
    ],
)
def test_a_broken_runtime(how: str, message: str) -> None:
    with start(how) as process, pytest.raises(BackendError) as caught:
        list(process.events("generate", tokens=[1]))
    assert message in caught.value.message


def test_after_a_death_every_request_says_so() -> None:
    with start("dies") as process:
        for _ in range(3):
            with pytest.raises(BackendError, match="exit code 7: the last words"):
                list(process.events("generate", tokens=[1]))


def test_silence_ends() -> None:
    with start("hangs", timeout=1) as process, pytest.raises(BackendError, match="has said nothing for 1 s"):
        list(process.events("generate", tokens=[1]))
    assert process.child.poll() is not None


def test_a_refused_request_leaves_the_process() -> None:
    with start("declines") as process:
        with pytest.raises(InputError, match="not that") as caught:
            list(process.events("generate", tokens=[1]))
        assert caught.value.hint == "something else"
        assert process.ask("open", session="a")["event"] == "done"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("refuses", "the bundle is odd"),
        ("old", "the runtime speaks another protocol"),
        ("greets", "makes no sense: 'Welcome"),
    ],
)
def test_a_start_that_fails(how: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        start(how)


def test_no_such_program() -> None:
    with pytest.raises(BackendError, match="nowhere cannot be started"):
        Process(["/nowhere"])


def test_a_start_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote shell's greeting left the runtime behind."""
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(BackendError):
        start("greets")
    assert started[0].poll() is not None


def test_a_new_request_ends_one_that_is_half_read() -> None:
    """The half-read one waited for events that had gone to the new one, until the time was up."""
    with start("slow") as process:
        first = process.events("generate", tokens=[1])
        assert [next(first)["event"], next(first)["event"]] == ["prompt", "round"]
        assert process.ask("open", session="a")["event"] == "done"
        with pytest.raises(InputError, match="another request began before the generate was over"):
            next(first)
        assert process.ask("open", session="b")["event"] == "done"


def test_leaving_early_or_closing_cancels() -> None:
    with start("slow") as process:
        reader = process.events("generate", tokens=[1])
        next(reader)
        reader.close()
        assert process.ask("seen")["event"] == "done"
        left = process.events("generate", tokens=[1])
        next(left)
    assert process.child.returncode == 0  # it was asked to end, not killed

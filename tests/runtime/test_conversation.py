"""Sessions over a scripted runtime: what is sent, what is kept, and what a reader gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import BackendError, InputError
from edgespec.runtime.machine import table_of
from edgespec.runtime.session import Answer, Runtime, Session
from tests.helpers.fake_runtime import SAYS
from tests.helpers.talking import FAKE, talking


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking(tmp_path_factory.mktemp("talk") / "x.bundle").path


@pytest.fixture
def opened(bundle: Path) -> Iterator[Callable[[str], Runtime]]:
    made: list[Runtime] = []

    def get(how: str) -> Runtime:
        made.append(Runtime.open(bundle, command=(sys.executable, str(FAKE), how), timeout=30))
        return made[-1]

    yield get
    for runtime in made:
        runtime.close()


def sent(session: Session, op: str = "generate") -> list[dict[str, Any]]:
    requests = session.runtime.process.ask("seen")["requests"]
    return [r for r in requests if r["op"] == op]


def test_a_turn_sends_only_what_is_new(opened: Callable[[str], Runtime]) -> None:
    session = opened("well").session()
    said = session.runtime.tokenizer.decode(SAYS)
    assert session.generate("one").text == said
    session.generate("two")
    first, second = (r["tokens"] for r in sent(session))
    assert session.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": said},
    ]
    # The template of these tests puts no assistant header: what follows the answer is all that is new.
    whole = session.runtime.encode(session.messages[:3])
    same = next((i for i, (a, b) in enumerate(zip(whole, first + SAYS, strict=False)) if a != b), None)
    same = min(len(whole), len(first) + len(SAYS)) if same is None else same
    assert second == whole[same:]
    cuts = [r["tokens"] for r in sent(session, "truncate")]
    assert cuts == ([] if same == len(first) + len(SAYS) else [same])
    assert session.tokens == whole + SAYS


def test_a_stop_string_cancels_and_is_no_part_of_the_answer(opened: Callable[[str], Runtime]) -> None:
    session = opened("slow").session()
    letters = session.runtime.tokenizer.decode(SAYS)
    answer = "".join(session.stream([5], stops=(letters[2:],)))
    assert answer == letters[:2]
    assert (session.answer.text, session.answer.tokens, session.answer.ended) == (answer, tuple(SAYS), "stop")


def test_a_reader_that_leaves_has_a_partial_answer(opened: Callable[[str], Runtime]) -> None:
    session = opened("slow").session()
    stream = session.stream([5])
    first = next(stream)
    stream.close()
    assert session.answer == Answer(first, (SAYS[0],), "cancelled")
    known = list(session.tokens)
    next(session.stream([6]))
    assert [r["tokens"] for r in sent(session, "truncate")] == [len(known)]


def test_two_conversations_at_once(opened: Callable[[str], Runtime]) -> None:
    runtime = opened("slow")
    one, two = runtime.session(), runtime.session()
    stream = one.stream("hello")
    next(stream)
    next(two.stream("hi"))
    with pytest.raises(InputError, match="another request began"):
        list(stream)
    assert (one.messages, one.tokens) == ([], [])


def test_a_refused_turn_was_never_said(opened: Callable[[str], Runtime]) -> None:
    session = opened("declines").session()
    with pytest.raises(InputError, match="not that"):
        session.generate("hello")
    assert (session.messages, session.tokens) == ([], [])


def test_a_death_in_the_middle_keeps_what_was_heard(opened: Callable[[str], Runtime]) -> None:
    session = opened("dies").session()
    heard: list[str] = []
    with pytest.raises(BackendError, match="exit code 7: the last words"):
        heard.extend(session.stream("hello"))
    assert session.answer.tokens == (SAYS[0],)
    assert session.answer.ended == "cancelled"


def test_bytes_that_are_no_text_are_refused(opened: Callable[[str], Runtime]) -> None:
    session = opened("well").session()
    for raw in (False, True):
        with pytest.raises(InputError, match="not valid UTF-8"):
            list(session.stream("a\udcff", raw=raw))
    assert session.generate("fine").ended == "length"
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


@pytest.mark.parametrize("words", [None, "{", "[]", "{}"])
def test_a_snapshot_without_its_words(
    opened: Callable[[str], Runtime], tmp_path: Path, words: str | None
) -> None:
    if words is not None:
        (tmp_path / "a.snap.json").write_text(words)
    with pytest.raises(InputError, match=r"a\.snap\.json, a snapshot's words, cannot be read"):
        opened("well").session().restore(tmp_path / "a.snap")


def test_the_table_lies_beside_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name of the present folder is empty."""
    monkeypatch.chdir(tmp_path)
    beside = tmp_path.with_name(tmp_path.name + ".tune.json")
    assert [table_of(Path(p)) for p in (".", str(tmp_path), f"{tmp_path}/")] == [beside] * 3

"""Conversations with pictures: kept, cut, interrupted, replayed, and what does not fit is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.errors import InputError
from edgespec.profiles import load
from edgespec.replay import replay
from edgespec.runtime.session import Answer, Runtime, Session, Settings
from edgespec.trace import read_trace
from tests.helpers import tiny_vlm

TOKENS = 24
PLAIN = Settings(max_new_tokens=TOKENS, drafter="none")
TEXT = "well hello there, well hello here, what is well and what is here"


def test_a_conversation_with_pictures_is_kept_and_cut(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    runtime, _ = seeing("llava", draft="layers")
    session, short = runtime.session(), Settings(max_new_tokens=8)
    first = session.generate(TEXT, short, images=[pictures[0]])
    session.snapshot(tmp_path / "kept")
    second = session.generate("go on", short)
    other = runtime.session()
    other.restore(tmp_path / "kept")
    assert other.generate("go on", short).tokens == second.tokens
    start = session.tokens.index(tiny_vlm.IMAGE)
    with pytest.raises(InputError, match=f"{start + 3} tokens end inside a picture"):
        session.truncate(start + 3)
    session.truncate(start)
    session.messages.clear()
    assert session.generate(TEXT, short, images=[pictures[0]]).tokens == first.tokens
    damaged = bytearray((tmp_path / "kept").read_bytes())
    damaged[60] ^= 1
    (tmp_path / "kept").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        other.restore(tmp_path / "kept")


@pytest.mark.parametrize("sees", [0, 2])
def test_old_pictures_are_kept_no_longer_than_the_session_asks(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], tmp_path: Path, sees: int
) -> None:
    runtime, _ = seeing("llava", sees=sees, draft_budget=48, block=16)
    short = Settings(max_new_tokens=8, drafter="draft", stop_rule="fixed")
    whole, session, other = runtime.session(), runtime.session(picture_bytes=0), runtime.session()

    def say(at: Session, text: str, *images: Path) -> Answer:
        return at.generate(text, short, raw=True, images=images)

    for at in (whole, session):
        first = say(at, f"<image>{TEXT}", pictures[0])
        for image in (pictures[1], pictures[0]):
            say(at, f"<image>{TEXT}", image)
    bytes_of = {s["session"]: s["bytes"] for s in runtime.process.ask("sessions")["sessions"]}
    assert session.tokens == whole.tokens and bytes_of[session.name] < bytes_of[whole.name]
    session.snapshot(tmp_path / "kept")
    other.restore(tmp_path / "kept")
    second = [i for i, token in enumerate(session.tokens) if token == tiny_vlm.IMAGE][31] + 2
    want = say(whole, TEXT)
    for at in (other, session):  # what their caches hold they need not absorb again
        answer = say(at, TEXT)
        assert answer.tokens == want.tokens and answer.stats["draft_calls"] == want.stats["draft_calls"] > 0
        with pytest.raises(InputError, match=f"among the first {second} tokens .* kept no longer"):
            at.truncate(second)
        assert at.tokens == whole.tokens
        at.truncate(0)
        assert say(at, f"<image>{TEXT}", pictures[0]).tokens == first.tokens


def test_prompts_and_pictures_that_do_not_fit_are_refused(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path]
) -> None:
    runtime, _ = seeing("llava", draft="layers")
    session = runtime.session()
    for prompt, images, raw, said in (
        ("see <image> and <image>", [pictures[0]], False, "2 marks for an image"),
        ("see <image> and <image>", [pictures[0]], True, "2 marks for an image"),
        ("see <image>", [], False, "shows an image .<image>. and none is given"),
        ("see <image>", [], True, "shows an image .<image>. and none is given"),
    ):
        with pytest.raises(InputError, match=said):
            session.generate(prompt, PLAIN, raw=raw, images=images)
        assert not session.messages and not session.tokens
    with pytest.raises(InputError, match="places for 0 rows of pictures, and 16 wait"):
        session.generate([40, 41], PLAIN, images=[pictures[0]])
    shown = [("read", pictures[0].read_bytes())]  # and a picture among ids is the one among words
    ids = session.generate([40, *[tiny_vlm.IMAGE] * 16, 41], PLAIN, images=shown).tokens
    words = runtime.tokenizer.decode([40]), runtime.tokenizer.decode([41])
    other = runtime.session()
    assert ids == other.generate("<image>".join(words), PLAIN, raw=True, images=[pictures[0]]).tokens
    session.truncate(0)
    ask = runtime.process.ask
    good = base64.b64encode(np.zeros((3, 28, 28), np.float32).tobytes()).decode()
    bad = base64.b64encode(np.full((3, 28, 28), np.nan, np.float32).tobytes()).decode()
    short = base64.b64encode(np.zeros((3, 28, 27), np.float32).tobytes()).decode()
    for pixels, said in (
        (bad, "not finite"),
        (short, "no picture of 3 x 28 x 28"),
        ("@@@@", "base64"),
        ("", "base64"),
    ):
        with pytest.raises(InputError, match=said):
            ask("look", session=session.name, pixels=pixels)
    assert ask("look", session=session.name, pixels=good)["rows"] == 16
    with pytest.raises(InputError, match="places for 0 rows of pictures, and 16 wait"):
        ask("generate", session=session.name, tokens=[40, 41])
    for tokens, more, said in (
        ([10**6], {}, "outside the vocabulary"),
        ([40], {"temperature": -1}, "temperature"),
        ([40, *[tiny_vlm.IMAGE] * 9, 41, *[tiny_vlm.IMAGE] * 7], {}, "9 rows stand together"),
    ):
        ask("look", session=session.name, pixels=good)
        with pytest.raises(InputError, match=said):
            ask("generate", session=session.name, tokens=tokens, **more)
        with pytest.raises(InputError, match="and 0 wait"):  # they were for those words alone
            ask("generate", session=session.name, tokens=[40, *[tiny_vlm.IMAGE] * 16])
    with pytest.raises(InputError, match="places for 3 rows of pictures, and 0 wait"):
        ask("generate", session=session.name, tokens=[40, *[tiny_vlm.IMAGE] * 3])
    assert session.generate(TEXT, PLAIN, images=[pictures[0]]).tokens


def test_a_bundle_without_eyes_says_so(opened: Callable[..., Runtime], pictures: tuple[Path, Path]) -> None:
    session = opened().session()
    with pytest.raises(InputError, match="reads no images"):
        session.generate("hello", images=pictures)
    with pytest.raises(InputError, match="reads no images"):
        opened().process.ask("look", session=session.name, pixels="AAAA")


def test_an_interrupted_picture_does_not_stand_in_for_the_next(
    seeing: Callable[..., tuple[Runtime, Path]],
    pictures: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    runtime, _ = seeing("llava", draft="layers")
    short = Settings(max_new_tokens=6)
    want = [runtime.session().generate(TEXT, short, images=[p]).tokens for p in pictures]
    session = runtime.session()
    for _ in session.stream(TEXT, short, images=[pictures[0]]):
        break
    assert session.generate(TEXT, short, images=[pictures[1]]).tokens == want[1] != want[0]
    session, asked = runtime.session(), runtime.process.ask

    def interrupted(op: str, **fields: Any) -> dict[str, Any]:
        if op == "look":
            raise KeyboardInterrupt
        return asked(op, **fields)

    monkeypatch.setattr(runtime.process, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate(TEXT, short, images=[pictures[0]])
    monkeypatch.undo()
    assert session.generate(TEXT, short, images=[pictures[1]]).tokens == want[1]
    gone = tmp_path / "gone.png"
    gone.write_bytes(pictures[0].read_bytes())
    session = runtime.session()
    assert session.generate(TEXT, short, images=[gone]).tokens == want[0]
    gone.unlink()  # the message holds it
    assert session.generate("go on", short).stats["tokens_prompt"] < 60
    session.snapshot(tmp_path / "kept")
    other = runtime.session()
    other.restore(tmp_path / "kept")
    assert other.generate("and so", short).tokens == session.generate("and so", short).tokens


@pytest.mark.parametrize("sees", [0, 2])
def test_a_trace_with_pictures_replays(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], sees: int, tmp_path: Path
) -> None:
    """Call by call the cache of a draft is as full as it was, commits included."""
    runtime, _ = seeing("llava", sees=sees, draft_budget=48, block=16)
    session, how = runtime.session(), Settings(max_new_tokens=24, drafter="draft", stop_rule="fixed")
    with (tmp_path / "trace").open("w") as trace:
        session.generate(TEXT, how, images=pictures, trace=trace)
        session.generate("go on", how, images=[pictures[1]], trace=trace)
        session.generate("go on", how, trace=trace)
    run = replay(read_trace(tmp_path / "trace"), load("snapdragon-8-elite"), runtime.bundle)
    parts = {(part.model, part.kind): part for part in run.parts}
    assert parts["vision", "vision"].calls == 3 and parts["draft", "commit"].calls > 1

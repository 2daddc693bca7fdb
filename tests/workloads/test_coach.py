"""When to speak: the made-up clips, the score, the clock, and the sources of frames. No model."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from edgespec.errors import InputError
from edgespec.workloads.stream.coach import Constant, Step, watch
from edgespec.workloads.stream.exercise import CORRECTION, PRAISE, START, Clip
from edgespec.workloads.stream.figure import SHANK, THIGH, Pose, jack, lunge, squat
from edgespec.workloads.stream.frames import Frame, frames
from edgespec.workloads.stream.score import matches, score

NOTHING = io.BytesIO()
BOMB = b"\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;"  # 65,535 pixels a side, and no data


def length(a: Any, b: Any) -> float:
    return math.hypot(a[0] - b[0], a[1] - b[1])


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_limbs_keep_their_lengths(depth: float) -> None:
    poses: list[tuple[Pose, int]] = [(squat(depth, 1.0), 0), (lunge(depth), 0), (lunge(depth, 1.0, 1.0), 1)]
    for pose, leg in poses:
        foot, knee, hip = pose.limbs[leg]
        assert length(foot, knee) == pytest.approx(SHANK) and length(knee, hip) == pytest.approx(
            THIGH, abs=0.01
        )
    star = jack(depth)
    assert {round(length(*limb), 6) for limb in star.limbs[1::2]} == {SHANK + THIGH}


def test_a_mistake_shows() -> None:
    assert squat(1.0).limbs[0][2][1] < squat(0.5).limbs[0][2][1]  # the hip of a deeper squat is lower
    assert jack(1.0, arms=0.5).limbs[2][1][1] < jack(1.0).limbs[2][1][1]
    assert lunge(1.0, short=1.0).limbs[1][0][0] < lunge(1.0).limbs[1][0][0]
    for right, wrong in ((squat(1.0), squat(1.0, 1.0)), (lunge(1.0), lunge(1.0, 1.0))):
        assert wrong.head[0] > right.head[0]


def test_a_clip_is_its_seed() -> None:
    clip, again, other = Clip(3, 60), Clip(3, 60), Clip(4, 60)
    assert clip.reps == again.reps and clip.feedback == again.feedback and clip.reps != other.reps
    assert clip.frame(7.3).tobytes() == again.frame(7.3).tobytes() != other.frame(7.3).tobytes()
    assert clip.frame(7.3, 48).size == (48, 48)


def test_what_is_said_has_its_cause() -> None:
    """Every start, mistake and end of a mistake is told once, where it can be judged; nothing else is."""
    for seed in range(40):
        clip, said = Clip(seed, 90), []
        for before, rep in pairwise([None, *clip.reps]):
            assert rep is not None
            if before is None or before.exercise != rep.exercise:
                said.append((rep.told_s, START[rep.exercise]))
                assert not rep.mistake
            elif before.mistake != rep.mistake:
                text = (
                    CORRECTION[rep.exercise, rep.mistake]
                    if rep.mistake
                    else PRAISE[rep.exercise, before.mistake]
                )
                said.append((rep.told_s, text))
        assert [(f.time_s, f.text) for f in clip.feedback] == said
        for rep in clip.reps:
            assert clip.at(rep.told_s)[0] == rep and 0.5 < clip.at(rep.told_s)[1] < 0.9
            assert clip.at(rep.start + rep.length / 2)[1] == pytest.approx(1)


def test_matches_are_in_order_and_one_to_one() -> None:
    say = lambda *times: [(t, "x") for t in times]  # noqa: E731
    assert matches(say(1, 5), say(1.2, 2, 6.4)) == [(0, 0), (1, 2)]
    assert matches(say(1), say(2.5)) == [(0, 0)] and not matches(say(1), say(2.6))
    assert matches(say(1, 2), say(2.4)) == [(0, 0)]  # the first that is free, not the nearest
    assert matches(say(2, 3), say(1, 1.1, 3.2)) == [(0, 0), (1, 2)]


def test_the_score_is_pooled() -> None:
    right = [(2.0, "Keep your back straight."), (9.0, "Go deeper in your squats.")]
    found = score(
        [(right, [(2.5, "Keep your back straight."), (5.0, "Nice."), (9.5, "Go deeper.")]), (right, [])]
    )
    assert (found.wanted, found.said, found.matched) == (4, 3, 2)
    assert (
        found.precision == pytest.approx(2 / 3) and found.recall == 0.5 and found.f1 == pytest.approx(4 / 7)
    )
    assert found.delay_s == 0.5 and found.rouge_l is not None and found.meteor is not None
    assert found.rouge_l == pytest.approx((1 + 2 * (2 / 5) / (1 + 2 / 5)) / 2)
    same = score([(right, right)])
    assert (same.f1, same.rouge_l) == (1, 1) and same.meteor == pytest.approx(1, abs=0.01)
    silent = score([(right, [])])
    assert (silent.f1, silent.rouge_l, silent.delay_s) == (0, None, None)


class Scripted:
    """A coach that says what it is told to at some frames."""

    def __init__(self, words: dict[str, int]) -> None:
        self.words, self.shown, self.begun = (
            words,
            list[tuple[str, bool | None]](),
            Step("", 0, 0, 0.0, 0.0, ""),
        )

    def see(self, frame: Frame, speak: bool | None = None) -> Step:
        self.shown.append((frame.name, speak))
        tokens = self.words.get(frame.name, 0)
        return Step("word " * tokens, tokens, tokens, 0.0, 0.0, "")


def ticks(count: int, rate: float) -> Iterable[Frame]:
    return (Frame(i / rate, str(i), lambda: b"") for i in range(count))


def test_frames_pass_unseen_while_it_speaks() -> None:
    coach: Any = Scripted({"2": 6, "8": 1})
    seen = [moment for moment, _ in watch(ticks(12, 4.0), coach, Constant(6.0))]
    assert [m.seen for m in seen] == [True] * 3 + [False] * 3 + [
        True
    ] * 6  # one second of words from 0.5 s on
    assert (seen[2].began_s, seen[2].ended_s) == (pytest.approx(0.5 + 1 / 6), 1.5)
    assert [m.frame for m in seen if m.text] == ["2", "8"]
    faster = [m for m, _ in watch(ticks(12, 4.0), Scripted({"2": 6}), Constant(60.0))]  # type: ignore[arg-type]
    assert all(m.seen for m in faster)


def test_turn_taking_asks_every_so_often() -> None:
    coach: Any = Scripted({})
    list(watch(ticks(20, 4.0), coach, Constant(12.0), every_s=1.5))
    assert [int(name) / 4 for name, speak in coach.shown if speak] == [1.5, 3.0, 4.5]
    assert all(speak is not None for _, speak in coach.shown)


def filled(folder: Path, count: int) -> Path:
    for i in range(count):
        Image.new("RGB", (30 + i, 20), (i, i, i)).save(folder / f"{i:02}.png")
    return folder


def colour(frame: Frame) -> int:
    return Image.open(io.BytesIO(frame.content())).convert("RGB").getpixel((5, 5))[0]


def test_a_folder_is_on_the_clock(tmp_path: Path) -> None:
    found = list(frames(str(filled(tmp_path, 5)), 2.0, NOTHING, 1.0))
    assert [f.time_s for f in found] == [0, 0.5, 1, 1.5, 2] and [colour(f) for f in found] == [0, 1, 2, 3, 4]


def test_an_animated_image_is_thinned(tmp_path: Path) -> None:
    shown = [Image.new("RGB", (16, 16), (8 * i,) * 3) for i in range(20)]
    shown[0].save(tmp_path / "a.gif", save_all=True, append_images=shown[1:], duration=50)
    found = list(frames(str(tmp_path / "a.gif"), 10.0, NOTHING, 1.0))
    assert [round(f.time_s, 2) for f in found] == [round(i / 10, 2) for i in range(10)]
    assert [colour(f) for f in found] == [pytest.approx(16 * i, abs=4) for i in range(10)]


def video(seconds: float, rate: int = 20) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("mjpeg", rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        for i in range(int(seconds * rate)):
            picture = Image.new("RGB", (32, 32), (int(200 * i / seconds / rate),) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return out.getvalue()


def test_a_video_is_thinned(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").write_bytes(video(2.0))
    found = list(frames(str(tmp_path / "a.mkv"), 4.0, NOTHING, 1.0))
    assert [round(f.time_s, 2) for f in found] == [i / 4 for i in range(8)]
    assert [colour(f) for f in found] == [pytest.approx(25 * i, abs=12) for i in range(8)]


def test_a_stream_is_read_as_it_comes() -> None:
    """Too fast a source is thinned to the rate: its frames have the times at which they came."""
    found = list(frames("-", 1000.0, io.BytesIO(video(3.0)), 5.0))
    assert found and colour(found[0]) < 12 and all(a.time_s < b.time_s for a, b in pairwise(found))
    assert len({int(f.time_s * 1000 + 1e-6) for f in found}) == len(found)
    slow = list(frames("-", 0.5, io.BytesIO(video(3.0)), 5.0))
    assert len(slow) < len(found)


def test_a_stalled_stream_is_given_up() -> None:
    class Stalled(io.RawIOBase):
        def __init__(self) -> None:
            self.left, self.over = io.BytesIO(video(1.0)[:4000]), threading.Event()

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            if data := self.left.read(size):
                return data
            self.over.wait(20)
            return b""

    source: Any = Stalled()
    with pytest.raises(InputError, match=r"no frame for 0.2 seconds"):
        list(frames("-", 1000.0, source, 0.2))
    source.over.set()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.mp4", b"no video", "a.mp4 is no video that can be read"),
        ("a.mp4", b"", "a.mp4 is no video that can be read"),
        ("a.gif", b"GIF89a but not really", "a.gif cannot be read"),
        ("a.gif", b"GIF89a" + BOMB, "a.gif cannot be read .*decompression bomb"),
        ("empty", None, "empty holds no frames"),
        ("nothing", ..., "nothing is neither a folder of frames nor a video"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content is not ...:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        list(frames(str(path), 4.0, NOTHING, 1.0))
    assert caught.value.hint
    with pytest.raises(InputError, match="the stream is no video"):
        list(frames("-", 4.0, io.BytesIO(b"no video"), 1.0))


def test_a_frozen_step() -> None:
    step = Step("a", 4, 2, 0.25, 1.0, "")
    assert Constant(8.0)(step) == (0.125, 0.5) and Constant(8.0)(replace(step, tokens=0)) == (0.0, 0.0)

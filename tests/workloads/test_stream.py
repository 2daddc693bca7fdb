"""`edgespec stream` on a tiny model that was taught to watch: what it says and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import export
from edgespec.exporters.images import Sight
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from edgespec.workloads.stream.coach import PROMPT, Coach, Constant, watch
from edgespec.workloads.stream.frames import Frame
from tests.helpers import tiny_coach, tiny_vlm

BRIGHT = (3, 8, 9, 13, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_coach.folder(tmp_path_factory.mktemp("coach") / "model")


@pytest.fixture(scope="module")
def bundle(source: Path) -> str:
    """Its cache holds two seconds of frames: it evicts all the time."""
    binary(print)
    given: dict[str, Any] = {
        "budget": 64,
        "block": 16,
        "widths": (2, 4),
        "weights": "fp32",
        "draft": "layers",
    }
    given |= {"policy": "sinks", "sinks": 40, "recent": 8, "positions": "compact", "draft_budget": 64}
    config = ExportConfig(str(source), str(source.parent / "coach.bundle"), **given)
    return str(export(config, Progress(quiet=True), Engine).path)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of frames of many sizes."""
    folder = tmp_path_factory.mktemp("frames")
    for i in range(24):
        (folder / f"{i:03}.png").write_bytes(tiny_coach.frame(i in BRIGHT, i, (30 + 7 * (i % 5), 40)))
    return folder


def streamed(capsys: pytest.CaptureFixture[str], bundle: str, shown: Path, *more: str) -> dict[str, Any]:
    argv = ["stream", bundle, "--frames", str(shown), "--threads", "1", "-q", "--json", *more]
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_it_speaks_when_there_is_something_to_say(
    bundle: str, shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth.jsonl"
    truth.write_text("".join(json.dumps({"time": i / 4, "text": "well"}) + "\n" for i in BRIGHT) + "\n")
    out = tmp_path / "out"
    found = streamed(capsys, bundle, shown, "--pace", "40", "--truth", str(truth), "-o", str(out))
    spoken = {m["frame"]: m["text"] for m in found["moments"] if m["text"]}
    assert spoken == {f"{i:03}.png": tiny_coach.WORD for i in BRIGHT}
    assert (found["frames"], found["blind"], found["feedback"]) == (24, 0, 5)
    assert (
        found["score"]["f1"] == 1 and found["score"]["rouge_l"] == 1 and 0 < found["score"]["delay_s"] < 0.1
    )
    assert [p["profile"] for p in found["predicted"]] == [
        "snapdragon-8-elite",
        "dimensity-9400",
        "apple-a18-pro",
    ]
    assert all(p["tokens_per_s"] > p["plain_tokens_per_s"] > 0 for p in found["predicted"])
    assert json.loads((out / "result.json").read_text()) == found
    lines = [json.loads(line) for line in (out / "moments.jsonl").read_text().splitlines()]
    assert lines == found["moments"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "T-F-score 1.000" in page and "wanted" in page


def test_a_slow_pace_makes_it_blind(bundle: str, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 4 tokens/s the four tokens of a feedback last four frames: 9 goes by while it speaks of 8."""
    found = streamed(capsys, bundle, shown, "--pace", "4")
    assert {m["frame"] for m in found["moments"] if m["text"]} == {f"{i:03}.png" for i in BRIGHT if i != 9}
    assert (found["tokens"], found["feedback"], found["blind"]) == (16, 4, 12)
    assert found["tokens_per_s"] == pytest.approx(4)


def test_a_devices_pace(bundle: str, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, again = (streamed(capsys, bundle, shown, "--pace", "snapdragon-8-elite") for _ in range(2))
    assert once == again and once["feedback"] == len(BRIGHT) and once["tokens_per_s"] > 100
    assert all(0 < m["ended_s"] - m["time_s"] < 0.25 for m in once["moments"] if m["seen"])


def test_turns_instead(bundle: str, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = streamed(capsys, bundle, shown, "--pace", "40", "--every", "2")
    assert [m["time_s"] for m in found["moments"] if m["tokens"]] == [2, 4]


def test_drafts_change_no_word_of_an_endless_stream(bundle: str) -> None:
    """Past the trained 512 positions, with the cache evicting all the time, in memory that does not grow."""
    told: dict[str, list[tuple[str, str]]] = {}
    limit = 64 << 10
    with Runtime.open(bundle, threads=1) as runtime:
        (entry,) = runtime.bundle.manifest.vision
        bytes_row = 4 * runtime.bundle.manifest.models[0].spec.hidden
        runtime.sight = Sight(runtime.bundle.path / entry.processor, entry)
        for drafter in ("none", "ngram", "draft"):
            session = runtime.session(picture_bytes=limit)
            (caches,) = (s["bytes"] for s in runtime.process.ask("sessions")["sessions"])
            coach = Coach(session, PROMPT, Settings(max_new_tokens=24, drafter=drafter))
            frames = (
                Frame(i / 4, str(i), lambda i=i: tiny_coach.frame(i % 7 in (2, 5), i)) for i in range(110)
            )
            seen = [moment for moment, _ in watch(frames, coach, Constant(100.0))]
            told[drafter] = [(m.frame, m.text) for m in seen if m.text]
            assert len(session.tokens) > 512 and len(told[drafter]) > 10
            (held,) = (s["bytes"] for s in runtime.process.ask("sessions")["sessions"])
            assert 0 < held - caches <= limit < session.tokens.count(entry.token) * bytes_row
            session.close()
    assert told["none"] == told["ngram"] == told["draft"]


def test_bad_input(
    bundle: str, source: Path, shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, picture = tmp_path / "truth.jsonl", tmp_path / "broken"
    truth.write_text('{"time": 1, "text": "a"}\n{"time": "soon"}\n')
    picture.mkdir()
    (picture / "000.png").write_bytes(tiny_coach.frame(False))
    (picture / "001.png").write_bytes(b"no image")
    frames = ("--frames", str(shown))
    for argv, said in (
        (("--frames", "nowhere"), "frames 'nowhere' does not exist"),
        ((*frames, "--rate", "0"), "rate 0.0 is not"),
        ((*frames, "--pace", "0"), "pace 0 is no speed"),
        ((*frames, "--pace", "fast"), "no profile is called 'fast'"),
        (("--frames", "-", "--pace", "12"), "has a clock of its own"),
        ((*frames, "--truth", str(truth)), "line 2 is no feedback"),
        ((*frames, "--every", "-1"), "every -1.0 is not"),
        (("--frames", str(picture), "-o", str(tmp_path / "kept")), "001.png is no image that can be read"),
    ):
        assert main(["stream", bundle, *argv, "--threads", "1", "-q"]) == 2
        heard = capsys.readouterr().err
        assert said in heard and "hint:" in heard and "Traceback" not in heard
    kept = (tmp_path / "kept" / "moments.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in kept] == ["000.png"]  # what was seen before is not lost


def test_models_that_cannot_watch(source: Path, tmp_path: Path) -> None:
    plain = tiny_vlm.folder(tmp_path / "plain", "idefics3")
    unending = tmp_path / "unending"
    unending.mkdir()
    for file in source.iterdir():
        (unending / file.name).write_bytes(file.read_bytes())
    ends = json.loads((unending / "generation_config.json").read_text())
    ends["eos_token_id"] = ends["eos_token_id"][:1]
    (unending / "generation_config.json").write_text(json.dumps(ends))
    for folder, said in ((plain, "no action token <next>"), (unending, "<next> does not end an answer")):
        config = ExportConfig(
            str(folder), str(folder) + ".bundle", weights="fp32", budget=64, block=16, widths=(2,)
        )
        path = export(config, Progress(quiet=True), Engine).path
        with Runtime.open(path, threads=1) as runtime, pytest.raises(InputError, match=said):
            Coach(runtime.session(), PROMPT, Settings())

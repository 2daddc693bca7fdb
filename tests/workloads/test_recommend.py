"""`edgespec recommend` whole, on made-up fans and a tiny model: its files, a killed run, others' folders."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgespec.cli import main
from edgespec.config import PHONES, ExportConfig
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.workloads.recommend import artists as lists
from edgespec.workloads.recommend.clusters import MOST_CLUSTERS
from edgespec.workloads.recommend.pipeline import TOP
from edgespec.workloads.recommend.synthetic import World
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

ROOT = Path(__file__).resolve().parent.parent.parent
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary(print)
    folder = tmp_path_factory.mktemp("recommend")
    source = write_directory(folder / "model", tiny.model("llama"))
    path = folder / "x.bundle"
    export(
        ExportConfig(str(source), str(path), weights="fp32", budget=384, block=64, widths=(2, 4)),
        QUIET,
        Engine,
    )
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 made-up fans with 24 posts each."""
    folder = tmp_path_factory.mktemp("fans")
    World(0, 60).write(folder, 60 * 24)
    return folder


def recommend(made: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    files = [str(made / "posts.jsonl"), "--artists", str(made / "artists.txt"), "--bundle", str(bundle)]
    return ["recommend", *files, "-o", str(out), "--threads", "1", "--clusters", "3", *more]


@pytest.fixture(scope="module")
def run(made: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main(recommend(made, bundle, folder, "-q")) == 0
    return folder


def test_a_whole_run(made: Path, bundle: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in run.iterdir()} == {
        "run.json", "fans.jsonl", "speed.json", "table.txt", "report.html", "result.json",
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(recommend(made, bundle, run, "--json")) == 0  # again: it is read, not made
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "holds this run already" in told.err
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert (found["schema"], found["posts"], found["fans"], len(found["clusters"])) == (
        "edgespec.recommend/1",
        1440,
        60,
        3,
    )
    names = set(lists.read(made / "artists.txt").names)
    for cluster in found["clusters"]:
        assert cluster["fans"] and len(cluster["typical"]) == 5 and cluster["words"]
        assert {one["artist"] for one in cluster["recommended"]} <= names
        assert (cluster["name_by"], cluster["text_by"]) == (
            "plain",
            "plain",
        )  # a random model's babble is refused
        assert cluster["refused"] and cluster["recommended"][0]["artist"] in cluster["text"]
    fans = [json.loads(line) for line in (run / "fans.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(fans) == 60 and all(not set(f["follows"]) & set(f["recommended"]) for f in fans)
    assert {len(fan["recommended"]) for fan in fans} == {TOP}
    measured = found["speed"]
    assert measured["texts_different"] == [] and measured["figures"]["prompts"] == 6
    assert {one["profile"] for one in measured["predicted"]} == set(PHONES)
    assert all(one["tokens_per_s"] > 0 and one["plain_tokens_per_s"] > 0 for one in measured["predicted"])


def test_killed_while_it_words_it_goes_on(made: Path, bundle: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "edgespec", *recommend(made, bundle, out, "-q")]
    process = subprocess.Popen(words)
    while not (out / "work" / "worded.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    assert main(words[3:]) == 0
    for name in ("result.json", "fans.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("change", ["clusters", "posts", "foreign"])
def test_anothers_folder_is_left_alone(
    made: Path, bundle: Path, run: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run
    if change == "foreign":
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    posts = made / "posts.jsonl"
    if change == "posts":
        posts = tmp_path / "posts.jsonl"
        posts.write_text('{"user": "a", "text": "x"}')
    argv = recommend(made, bundle, out, "-q")
    argv[1] = str(posts)
    argv[argv.index("3")] = "4" if change == "clusters" else "3"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(argv) == 2
    said = {
        "clusters": "another clusters: 3, not 4",
        "posts": "another posts_sha256",
        "foreign": "something else",
    }
    assert said[change] in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_readmes_commands_run(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, with a tiny bundle and fewer posts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^    ((?:scripts/fan_posts|edgespec recommend|scripts/recommend_accuracy) .*?)(?:  +#.*)?$",
        text,
        re.M,
    )
    assert [line.split()[0] for line in found] == [
        "scripts/fan_posts",
        "edgespec",
        "scripts/recommend_accuracy",
    ]
    monkeypatch.chdir(tmp_path)
    os.makedirs("out")
    shrunk = {"--posts": "960", "--seeds": "2", "--bundle": str(bundle)}
    for line in found:
        words = shlex.split(line)
        if words[0].endswith("accuracy"):
            words += ["--fans", "40", "--json"]
        words = [shrunk.get(words[i - 1], word) if i else word for i, word in enumerate(words)]
        program = (
            [sys.executable, str(ROOT / words[0])]
            if words[0] != "edgespec"
            else [sys.executable, "-m", "edgespec"]
        )
        done = subprocess.run([*program, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    figures = json.loads(done.stdout)["figures"]
    assert figures["rand_index"]["error"] >= 0 and len(figures["hits"]["samples"]) == 2
    assert max(figures["hits"]["samples"]) <= 1 and MOST_CLUSTERS >= figures["clusters"]["most"] >= 1

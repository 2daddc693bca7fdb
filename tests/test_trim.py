"""`edgespec trim` from prompts to a bundle, on a tiny model: the file it writes is what the export takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgespec import trim_report
from edgespec.bundle import open_bundle
from edgespec.cli import main
from edgespec.trim_result import TrimResult, TrimRow
from edgespec.vocabulary import SCHEMA
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

EXPORT = ["--weights", "fp32", "--budget", "32", "--block", "8", "--widths", "2", "--sinks", "2"]
EXPORT += ["--recent", "4", "--draft-budget", "16", "-q"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("trim") / "llama", tiny.model("llama"))


def prompts(path: Path, words: str, count: int) -> Path:
    path.write_text("".join(f"{words} {i}\n" for i in range(count)), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_from_prompts_to_a_bundle(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [prompts(tmp_path / "en.txt", "hello world", 12), prompts(tmp_path / "ko.txt", "안녕", 6)]
    out, page = tmp_path / "v.json", tmp_path / "p.html"
    command = ["trim", str(source), "--draft", "layers", "--prompts", *map(str, files), "--weights-of", "2,1"]
    command += ["--context-rows", "8", "-o", str(out), "--html", str(page)]
    code, text, _ = run(capsys, *command, "--json", "-q")
    assert code == 0
    told, made = json.loads(text), json.loads(out.read_text())
    assert (told["schema"], made["schema"]) == ("edgespec.trim/1", SCHEMA)
    assert told["corpora"] == {"en.txt": 2, "ko.txt": 1} and told["measured_with"].startswith("the proposals")
    top = max(told["rows"], key=lambda r: (r["mbsu"] * (r["context_rows"] == 8), -r["size"]))
    assert told["size"] == top["size"] == len(made["token_ids"]) == len(set(made["token_ids"]))
    assert set(range(259)) <= set(made["token_ids"])  # control tokens and bytes, seen or not
    # The draft is the target itself: with every row it is always right where the target was greedy.
    whole = [r for r in told["rows"] if r["size"] == 288]
    assert len(whole) == 2 and all(r["coverage"] == 1 for r in whole)
    assert whole[0]["acceptance"] > 0.95
    assert "<svg" in page.read_text() and f"size {told['size']}" in page.read_text()
    # Again: nothing is written anew, and the same comes out.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "v.json.samples").rglob("*.npz")}
    assert before and run(capsys, *command, "--json", "-q")[1] == text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "v.json.samples").rglob("*.npz")} == before

    wanted = ["trim", str(source), "--samples", str(tmp_path / "v.json.samples" / "1-en"), "--size", "270"]
    code, text, _ = run(capsys, *wanted, "-o", str(out), "-q")
    assert code == 0 and "acceptance by coverage" in text and "size 270: given" in text
    bundle = tmp_path / "b"
    command = ["export", str(source), "--draft", "layers", "--draft-vocab", str(out), "-o", str(bundle)]
    assert run(capsys, *command, *EXPORT)[0] == 0
    draft = open_bundle(bundle).model("draft")
    ids = np.fromfile(bundle / draft.head_ids, "<i4")
    assert ids.tolist() == sorted(json.loads(out.read_text())["token_ids"]) and len(ids) == 270


def test_a_vocabulary_of_another_tokenizer_is_refused_by_the_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.json"
    path.write_text(
        json.dumps({"schema": SCHEMA, "tokenizer_sha256": "0" * 64, "token_ids": [1], "made": {}})
    )
    command = [
        "export",
        str(source),
        "--draft",
        "layers",
        "--draft-vocab",
        str(path),
        "-o",
        str(tmp_path / "b"),
    ]
    code, _, err = run(capsys, *command, *EXPORT)
    assert code == 2 and not (tmp_path / "b").exists()
    assert (
        "error: v.json is of another tokenizer than the target's\nhint:  make it again: edgespec trim" in err
    )


def test_what_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prompts(tmp_path / "few.txt", "hello", 3)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "batch-00000.npz").write_bytes(b"PK\x03\x04half")
    out = ["-o", str(tmp_path / "v.json"), "-q"]
    for argv, message in (
        ([], "there is nothing to count"),
        (["--prompts", str(tmp_path / "none.txt")], "is not a file"),
        (["--prompts", str(tmp_path / "empty.txt")], "holds no prompt"),
        (["--prompts", str(file)], "few.txt has 3 answers; 5 are needed to hold one out"),
        (
            ["--prompts", str(file), "--size", "3"],
            "size 3 is not 259 (the tokens that are always kept) to 288",
        ),
        (["--prompts", str(file), "--size", "many"], "size 'many' is no number of rows"),
        (
            ["--prompts", str(file), "--weights-of", "1,2"],
            "weights_of 1,2 are not a number for each of 1 corpora, one above 0",
        ),
        (["--prompts", str(file), "--html", str(tmp_path / "no" / "p.html")], "can be no file"),
        (["--samples", str(tmp_path / "none")], "holds no samples"),
        (["--samples", str(tmp_path / "bad")], "is no file of samples"),
    ):
        code, text, err = run(capsys, "trim", str(source), *argv, *out)
        assert (code, text) == (2, "") and message in err, (argv, err)
        assert not (tmp_path / "v.json").exists()


def rows(context: int) -> tuple[TrimRow, ...]:
    return tuple(
        TrimRow(size, context, 0.5, 0.4, 1 + size / 1e4, 2, 0.1, 1 + size / 2e4 - (size > 512))
        for size in (256, 512, 1024)
    )


def test_the_report(tmp_path: Path) -> None:
    result = TrimResult(
        "t", "coverage", {"a": 2, "b": 1}, 1200, 300, 258, 512, "the largest MBSU", (*rows(0), *rows(64))
    )
    text = trim_report.to_table(result)
    assert "answers of t to a x 2, b x 1: 1,200 tokens counted, 300 held out" in text
    assert "with context rows: MBSU 1.026 at 512 rows (c 0.1000, gamma 2), +1903.1% on the whole head" in text
    trim_report.write_html(result, tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text().count("<polyline") == 4
    pytest.importorskip("matplotlib")
    trim_report.write_png(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def texts(path: Path, questions: str, answers: str, count: int) -> Path:
    rows = [f"{questions} {i},{answers} {i % 7},0\n" for i in range(count)]
    path.write_text("".join(["Q,A,label\n", *rows]), encoding="utf-8")
    return path


def test_a_corpus_of_weight_0_is_judged_and_not_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        texts(tmp_path / "en.csv", "hello", "well", 20),
        texts(tmp_path / "ko.csv", "안녕", "그래요", 20),
    ]
    made = {}
    for weights in ("1,0", "0,1"):
        out, page = tmp_path / f"{weights}.json", tmp_path / "p.html"
        command = [
            "trim",
            str(source),
            "--draft",
            "layers",
            "--texts",
            *map(str, files),
            "--weights-of",
            weights,
        ]
        code, text, err = run(capsys, *command, "--size", "262", "-o", str(out), "--html", str(page), "-q")
        assert code == 0, err
        assert f"texts en.csv x {weights[0]}, ko.csv x {weights[2]}" in text
        assert f"ko.csv x {weights[2]}" in page.read_text()
        made[weights] = json.loads(out.read_text())["token_ids"]
    hello = {i for i in range(259, 264)}  # the tokens beyond bytes that this tokenizer has
    assert len(hello & set(made["1,0"])) == 3 and made["1,0"] != made["0,1"]
    for argv, message in (
        (["--weights-of", "0,0"], "weights_of 0,0 are not a number for each of 2 corpora, one above 0"),
        (["--samples", str(tmp_path)], "texts are given with prompts or samples"),
    ):
        code, _, err = run(
            capsys, "trim", str(source), "--texts", *map(str, files), *argv, "-o", str(out), "-q"
        )
        assert code == 2 and message in err

"""Reports as files: a round trip, and everything that is refused with its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgespec.bench_report import read, write
from edgespec.errors import InputError
from tests.helpers.reports import report


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    whole = report(4, 2, noise=0.1)
    write(whole, path)
    assert read(path) == whole
    data = json.loads(path.read_text())
    assert data["schema"] == "edgespec.report/4"
    assert len(data["samples"]) == 4 * 2 * 2
    # A line for each sample and each trace: a changed one is one line of a diff.
    assert sum(line.startswith('  {"prompt"') for line in path.read_text().splitlines()) == 16 + 4
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(report(3, noise=0.1), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        write(report(), path)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def nan(path: Path) -> None:
    write(report(), path)
    path.write_text(path.read_text().replace('"time_decode_s": 1.0', '"time_decode_s": NaN', 1))


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda path: None, "report {x} cannot be read: No such file or directory"),
    ("folder", lambda path: path.mkdir(), "report {x} cannot be read: Is a directory"),
    ("empty", lambda path: path.write_text(""), "report {x} is no JSON: Expecting value: line 1 column 1"),
    ("bytes", lambda path: path.write_bytes(b"\xff{"), "report {x} is no JSON: 'utf-8' codec can't decode"),
    ("list", lambda path: path.write_text("[]"), "report {x} is of schema None, not 'edgespec.report/4'"),
    (
        "schema",
        changed(lambda d: d.update(schema="edgespec.report/5")),
        "report {x} is of schema 'edgespec.report/5', not 'edgespec.report/4'",
    ),
    ("nan", nan, "report {x} is no JSON: NaN is no number"),
    (
        "infinite",
        changed(lambda d: d["samples"][0].update(load=1e999)),
        "report {x} is no JSON: Infinity is no",
    ),
    ("no samples", changed(lambda d: d.update(samples=[])), "report {x} holds no sample"),
    ("no traces", changed(lambda d: d.update(traces=[])), "report {x} holds an empty trace of any prompt"),
    (
        "empty trace",
        changed(lambda d: d["traces"][1].update(events=[])),
        "report {x} holds an empty trace of math/1",
    ),
    (
        "negative",
        changed(lambda d: d["samples"][2].update(time_decode_s=-1.0)),
        "report {x}: time_decode_s of prompt math/1 is -1.0",
    ),
    ("unknown", changed(lambda d: d.update(extra=1)), "{x}: report: unknown field 'extra'"),
    ("lacking", changed(lambda d: d.pop("bundle")), "{x}: report: field 'bundle' is missing"),
    (
        "type",
        changed(lambda d: d["samples"][0].update(tokens_new="21")),
        "{x}: report.samples[0].tokens_new: is a text, not int",
    ),
]


@pytest.mark.parametrize(("make", "said"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_no_report_is_refused(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    path = tmp_path / "x.json"
    make(path)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.message.startswith(said.replace("{x}", str(path)))
    assert caught.value.hint == f"make it again: edgespec bench BUNDLE -o {path}"


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write(report(), tmp_path / "x")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(
            replace(report(), environment=replace(report().environment, load_start=float("nan"))),
            tmp_path / "y",
        )
    assert [p.name for p in tmp_path.iterdir()] == ["x"]

"""Trainings side by side: equal steps only, what a folder says of itself, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgespec.cli import main
from edgespec.curves import equal_steps, read, to_table
from edgespec.errors import InputError


def trained(folder: Path, loss: str, steps: Sequence[int]) -> Path:
    (folder / "training").mkdir(parents=True)
    line = {"tokens": 7, "loss": 2.5, "block_efficiency": 1.5, "seconds": 1.0}
    lines = [json.dumps({"step": step, **line, "block_efficiency": 1 + step / 100}) + "\n" for step in steps]
    (folder / "training" / "curve.jsonl").write_text("".join(lines))
    (folder / "training" / "state.json").write_text(json.dumps({"training": {"loss": loss}}))
    return folder


def test_drafts_are_compared_at_equal_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [trained(tmp_path / "a", "kl", (10, 20, 30)), trained(tmp_path / "b", "tvd++", (20, 30, 40))]
    curves = [read(folder) for folder in folders]
    assert [c.loss for c in curves] == ["kl", "tvd++"] and equal_steps(curves) == [20, 30]
    table = to_table(curves)
    assert "b: tvd++" in table and len(table.splitlines()) == 3 and table.splitlines()[2].endswith("1.300")
    assert main(["draft", "curve", *map(str, folders), "--png", str(tmp_path / "c.png"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["equal_steps"] == [20, 30] and len(said["drafts"][1]["points"]) == 3
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no step is one"):
        equal_steps([curves[0], read(trained(tmp_path / "c", "lk", (5,)))])


def test_a_shipped_draft_has_its_curve_beside_its_facts(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", "kl", (1,))
    (folder / "training" / "curve.jsonl").rename(folder / "curve.jsonl")
    (folder / "training" / "state.json").rename(folder / "draft.json")
    assert read(folder).loss == "kl" and read(folder).points[0].block_efficiency == 1.01


NAN = '{"step": 1, "tokens": 2, "loss": NaN, "block_efficiency": 1}\n'
WORDS = NAN.replace("NaN", '"low"')


@pytest.mark.parametrize("text", ["{", '{"step": 1}\n', "[]\n", NAN, WORDS])
def test_a_broken_curve_is_refused(tmp_path: Path, text: str) -> None:
    folder = trained(tmp_path / "a", "kl", ())
    (folder / "training" / "curve.jsonl").write_text(text)
    with pytest.raises(InputError, match="is no training's curve"):
        read(folder)

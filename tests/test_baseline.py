"""Our own gate: the demo's graphs and speculation are those of profiles/baselines, or the build fails.

Meant? Then `scripts/update_baseline`, and say in the commit what changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgespec.baseline import without_times
from edgespec.bench_report import read, write
from edgespec.cli import main
from edgespec.gate import UNKNOWN, Rules, compare
from edgespec.gate_facts import predicted
from tests.helpers import baselines
from tests.helpers.reports import report as made_up


@pytest.mark.parametrize("device", baselines.EXPORT)
def test_a_byte_more_on_a_baseline_fails(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, new = baselines.path(device), tmp_path / "new.json"
    base = read(path)
    assert main(["compare", str(path), str(path)]) == 0
    target, *rest = base.counted
    wider = [
        replace(s, figures={**s.figures, "bytes_weights": s.figures["bytes_weights"] + 1})
        if (s.kind, s.width) == ("verify", 4) else s
        for s in target.steps
    ]  # fmt: skip
    write(replace(base, counted=(replace(target, steps=tuple(wider)), *rest)), new)
    capsys.readouterr()
    assert main(["compare", str(path), str(new)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("failed: ")


def test_baselines_are_small_and_tell_nothing_of_a_machine() -> None:
    for device in baselines.EXPORT:
        path = baselines.path(device)
        assert path.stat().st_size < 250_000  # 13 prompts, drafted by our costs and by those of 4 devices
        base = read(path)
        assert without_times(base) == base
        assert (base.environment.cpu, base.run) == ("", "")


def test_without_times_keeps_what_is_judged() -> None:
    whole = made_up(3, noise=0.1)
    bare = without_times(whole)
    assert {s.time_decode_s for s in bare.samples} == {0.0}
    assert all(call[4] == 0.0 for t in bare.traces for e in t.events for call in e["calls"])
    assert bare.counted == whole.counted and bare.predicted == whole.predicted
    verdict = compare(bare, whole, predicted(bare.predicted, whole.predicted), Rules())
    assert verdict.passed and {r.reason for r in verdict.of(UNKNOWN) if r.pairs == 0} == {
        "no pair of samples"
    }
    assert [s.verify_calls for s in bare.samples] == [s.verify_calls for s in whole.samples]


@pytest.mark.parametrize("device", baselines.EXPORT)
def test_the_demo_moves_the_bytes_of_the_baseline(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cpu bundle also runs: its block efficiency and texts are fresh; the npu's are the baseline's."""
    bundle, fresh, path = tmp_path / "demo.bundle", tmp_path / "fresh.json", baselines.path(device)
    assert main([*baselines.export(device, bundle), "-q"]) == 0
    if device == "cpu":
        assert main([*baselines.bench(bundle, fresh), "-q"]) == 0
    else:
        write(baselines.over(read(path), bundle), fresh)
    capsys.readouterr()
    code = main(["compare", str(path), str(fresh)])
    out = capsys.readouterr().out
    assert code == 0, f"{out}\nmeant? scripts/update_baseline"

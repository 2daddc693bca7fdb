"""`edgespec eval` on a tiny model through the real engine: the reference, what eviction costs, resuming."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgespec.bundle import Bundle
from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.config_evaluation import EvalConfig
from edgespec.errors import InputError
from edgespec.evaluation import Engines, absorbed, asked, before_eviction, evaluate, scores
from edgespec.evaluation_plan import Cell, plan
from edgespec.evaluation_result import EvalResult
from edgespec.exporters import commit, export
from edgespec.exporters.commit import write_policy
from edgespec.material import open_material
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.text import render
from edgespec.tasks import TASKS
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

QUIET = Progress(quiet=True)
LENGTH, BLOCK = 512, 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of fp32, so that Transformers is the oracle; with two buckets, of which the larger one is needed."""
    folder = tmp_path_factory.mktemp("evaluation")
    source = write_directory(folder / "model", tiny.model("llama"))
    config = ExportConfig(
        str(source), str(folder / "x.bundle"), weights="fp32", budget=LENGTH, block=BLOCK, buckets=(128,),
        widths=(2, 8), sinks=2, recent=8,
    )  # fmt: skip
    return export(config, QUIET, Engine)


@pytest.fixture(scope="module")
def watching(bundle: Bundle) -> Bundle:
    """The same model with its queries stored."""
    source, folder = bundle.path.parent / "model", bundle.path.parent / "h2o.bundle"
    config = ExportConfig(
        str(source), str(folder), weights="fp32", budget=LENGTH, block=BLOCK, widths=(2, 8), sinks=2,
        recent=8, policy="h2o",
    )  # fmt: skip
    return export(config, QUIET, Engine)


@pytest.fixture(autouse=True)
def commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each commit graph is traced once, however many runs need it."""

    def once(kind: str, spec: Any, cache: Any, file: str, *more: Any, **named: Any) -> Any:
        model, graph = _policy_graph(kind, spec, cache, "", *more, **named)
        return model, dataclasses.replace(graph, file=file)

    monkeypatch.setattr(commit, "policy_graph", once)


_policy_graph = functools.cache(commit.policy_graph)


def config(bundle: Bundle, folder: Path, **more: Any) -> EvalConfig:
    given: dict[str, Any] = {"tasks": ("text", "needle"), "seeds": 2, "lengths": (LENGTH,), **more}
    return EvalConfig(str(bundle.path), str(folder), threads=1, **given)


def run(bundle: Bundle, folder: Path, engine: Callable[..., Any] = Engine, **more: Any) -> EvalResult:
    return evaluate(bundle, config(bundle, folder, **more).check(), engine, write_policy, render, QUIET)


def engines(bundle: Bundle, folder: Path, **rows: int) -> Engines:
    """Engines whose budgets in % are of any number of rows."""
    entry = bundle.model("target")
    decided = plan(entry, config(bundle, folder))
    if rows:
        kept = {(LENGTH, int(name.removeprefix("at"))): count for name, count in rows.items()}
        decided = dataclasses.replace(decided, rows=kept)
    return Engines(bundle.path, entry, decided, Engine, write_policy, folder, 1)


def test_the_reference_has_the_perplexity_of_transformers(bundle: Bundle, tmp_path: Path) -> None:
    sample = TASKS["text"](open_material(bundle, None, render), LENGTH, BLOCK, 0)
    ours = asked(engines(bundle, tmp_path).of(Cell("text", LENGTH, 0, "none", 100)), sample)
    ids = torch.tensor([[*sample.context, *sample.questions[0].ids]])
    with torch.no_grad():
        logits = tiny.model("llama")(ids).logits[0]
    tail = len(sample.questions[0].ids)
    np.testing.assert_allclose(ours[0], logits[-tail:-1].numpy(), rtol=0, atol=1e-4)
    wanted = torch.nn.functional.cross_entropy(logits[-tail:-1].double(), ids[0, -tail + 1 :])
    (score,) = scores(sample, ours, ours)
    assert score.nll == pytest.approx(float(wanted), abs=1e-5)
    assert (score.kl, score.right) == (0.0, False)


@pytest.mark.parametrize("policy", ["keydiff", "sinks"])
def test_a_budget_that_holds_everything_changes_no_bit(bundle: Bundle, tmp_path: Path, policy: str) -> None:
    of = engines(bundle, tmp_path, at99=LENGTH).of
    for task in ("text", "needle"):
        sample = TASKS[task](open_material(bundle, None, render), LENGTH, BLOCK, 0)
        reference = asked(of(Cell(task, LENGTH, 0, "none", 100)), sample)
        logits = asked(of(Cell(task, LENGTH, 0, policy, 99)), sample)
        assert all(np.array_equal(a, b) for a, b in zip(reference, logits, strict=True))
        assert [s.kl for s in scores(sample, logits, reference)] == [0.0] * len(sample.questions)


def test_questions_are_asked_of_the_same_cache(bundle: Bundle, tmp_path: Path) -> None:
    """In any order, and with evictions while a question is absorbed."""
    sample = TASKS["needle"](open_material(bundle, None, render), LENGTH, BLOCK, 0)
    long = tuple(dataclasses.replace(q, ids=q.ids * 3) for q in sample.questions)
    assert min(len(q.ids) for q in long) > BLOCK
    turned = dataclasses.replace(sample, questions=long[::-1])
    of, cell = engines(bundle, tmp_path).of, Cell("needle", LENGTH, 0, "keydiff", 25)
    first, second = asked(of(cell), dataclasses.replace(sample, questions=long)), asked(of(cell), turned)
    assert all(np.array_equal(a, b) for a, b in zip(first, second[::-1], strict=True))


def test_a_smaller_budget_costs_more(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, tmp_path / "x", tasks=("text",), budgets=(25, 50))
    for policy in ("keydiff", "sinks"):
        kl = [r.kl.mean for r in result.rows if r.policy == policy]
        assert kl[0] > 1.5 * kl[1] > 1e-2
    (whole,) = [r for r in result.rows if r.policy == "none"]
    assert (whole.kl.mean, whole.cost.mean, whole.rows, whole.accuracy) == (0, 0, LENGTH, None)
    assert [r.rows for r in result.rows if r.policy == "sinks"] == [128, 256]


def test_a_needle_is_found_at_no_depth_by_a_random_model(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, tmp_path / "x", tasks=("needle",), budgets=(50,))
    assert {r.informative for r in result.rows} == {False}
    assert [d.questions for d in result.rows[0].depths] == [2] * 5
    (advice,) = result.advice
    assert advice.policy == "" and "cannot do any of the tasks" in advice.reason
    assert result.losses() == []


@pytest.mark.parametrize("task", ["text", "needle"])
def test_what_precedes_the_first_eviction_is_absorbed_once(
    watching: Bundle, tmp_path: Path, task: str
) -> None:
    """From the un-evicted model's snapshot a cell gets the bits that it gets from the beginning."""
    bundle, all_of = watching, engines(watching, tmp_path)
    sample = TASKS[task](open_material(bundle, None, render), LENGTH, BLOCK, 0)
    names = ("keydiff", "snapkv", "caote(h2o)", "fastcaote(h2o)")
    cells = [Cell(task, LENGTH, 0, policy, budget) for policy in names for budget in (25, 75)]
    stops = [before_eviction(all_of, cell, sample) for cell in cells]
    assert stops[:2] == ([128, 320] if task == "text" else [128, 384])
    whole = all_of.of(Cell(task, LENGTH, 0, "none", 100))
    shared = absorbed(whole, sample, "none", sorted(set(stops)))
    for budget in (25, 75):  # what carries a score starts from its base's
        base = all_of.of(Cell(task, LENGTH, 0, "h2o", budget))
        shared |= absorbed(base, sample, "h2o", [stops[budget == 75]])
    for cell, stop in zip(cells, stops, strict=True):
        engine = all_of.of(cell)
        engine.restore(shared["h2o" if "h2o" in cell.policy else "none", stop])
        pairs = zip(asked(engine, sample), asked(all_of.of(cell), sample), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_compact_bundles_policies_run_as_if_exported_with_them(watching: Bundle, tmp_path: Path) -> None:
    """Their graphs turn keys by the angles of the bundle's own commit graph. Positions do not matter before
    the first eviction; after it they do.
    """
    source = watching.path.parent / "model"
    made: dict[str, Bundle] = {}
    for policy in ("h2o", "keydiff"):
        how = {"weights": "fp32", "budget": LENGTH, "block": BLOCK, "widths": (2, 8), "sinks": 2, "recent": 8}
        given = ExportConfig(
            str(source),
            str(tmp_path / policy),
            policy=policy,
            positions="compact",
            **how,  # type: ignore[arg-type]
        )
        made[policy] = export(given, QUIET, Engine)
    sample = TASKS["text"](open_material(watching, None, render), LENGTH, BLOCK, 0)
    cell, whole = Cell("text", LENGTH, 0, "keydiff", 25), Cell("text", LENGTH, 0, "none", 100)
    (own,) = asked(engines(made["keydiff"], tmp_path).of(cell), sample)
    (others,) = asked(engines(made["h2o"], tmp_path).of(cell), sample)
    (absolute,) = asked(engines(watching, tmp_path).of(cell), sample)
    assert np.array_equal(own, others)
    assert np.abs(own - absolute).max() > 0.01
    reference = [asked(engines(b, tmp_path).of(whole), sample)[0] for b in (watching, made["h2o"])]
    np.testing.assert_array_equal(*reference)


class Stops(Engine):
    """An engine that ends the run, as Ctrl-C does, after so many cells."""

    left = 0

    def over(self, entry: Any) -> Engine:
        if Stops.left == 0:
            raise KeyboardInterrupt
        Stops.left -= 1
        other = Stops(self.folder, entry, self.threads)
        other.sessions = self.sessions
        return other


def eval_command(bundle: Bundle, folder: Path, *more: str) -> int:
    words = [
        "eval",
        str(bundle.path),
        "-o",
        str(folder),
        "--tasks",
        "text,needle",
        "--seeds",
        "2",
        "--lengths",
    ]
    return main([*words, str(LENGTH), "--budgets", "25,50", "--threads", "1", "-q", *more])


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_bytes(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert eval_command(bundle, whole) == 0
    lines = (whole / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 5
    Stops.left = 7
    with pytest.raises(KeyboardInterrupt):
        run(bundle, parts, Stops, budgets=(25, 50))
    log = parts / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1 + 7
    with open(log, "a") as file:
        file.write(lines[9][:50])  # a killed run's last line
    Stops.left = 1000
    run(bundle, parts, Stops, budgets=(25, 50))
    assert 1000 - Stops.left == 2 * 2 * 5 - 7 + 1  # the reference's logits are needed once more
    assert eval_command(bundle, parts) == 0
    names = {"result.json", "report.html", "heatmap-tasks-25.png", "heatmap-needle-50.png"}
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    untimed = [{k: v for k, v in json.loads(line).items() if k != "time_s"} for line in lines]
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "time_s"} for line in again] == untimed
    out, err = capsys.readouterr()
    assert "512 tokens, budget 25 %: 128 rows survive" in out and err == ""


def test_the_outputs_say_the_same(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_command(bundle, tmp_path / "x", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "x" / "result.json").read_text())
    assert said["schema"] == "edgespec.eval/1"
    assert {r["policy"] for r in said["rows"]} >= {"none", "keydiff", "sinks"}
    page = (tmp_path / "x" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and 'src="http' not in page


def test_other_settings_in_the_same_folder_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    run(bundle, folder, tasks=("needle",), budgets=(50,))
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"log.jsonl was made with another seeds: 2, not 1") as caught:
        run(bundle, folder, tasks=("needle",), budgets=(50,), seeds=1)
    assert caught.value.hint == "choose another folder with -o, or remove this one"
    with pytest.raises(InputError, match="was made with another budgets"):
        run(bundle, folder, tasks=("needle",), budgets=(25,))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 9)
    with pytest.raises(InputError, match="was made with another text"):
        run(bundle, folder, tasks=("needle",), budgets=(50,), text=str(text))
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "text"}', '{"scores": [{"depth": 1}]}'])
def test_a_damaged_log_is_refused(bundle: Bundle, tmp_path: Path, line: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"schema": "edgespec.eval-log/1", "settings": {}}\n' + line + "\n")
    with pytest.raises(InputError, match=r"log.jsonl is damaged"):
        run(bundle, folder, tasks=("needle",), budgets=(50,))


def test_what_does_not_fit_is_left_out_or_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="questions: length 512 is too short for the task"):
        run(bundle, tmp_path / "x", tasks=("questions",))
    result = run(bundle, tmp_path / "y", tasks=(), seeds=1, budgets=(50,), policies=("sinks",))
    assert "questions: length 512 is too short for the task" in result.left_out
    assert "text" in {r.task for r in result.rows}


def test_without_matplotlib_the_rest_is_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    words = ["eval", str(bundle.path), "-o", str(tmp_path / "x"), "--tasks", "text", "--seeds", "1"]
    assert main([*words, "--budgets", "50", "--policies", "sinks"]) == 0
    out, err = capsys.readouterr()
    assert "no heat maps: matplotlib.figure is not installed; pip install 'edgespec[plots]'" in err
    assert "budget 50 %" in out and (tmp_path / "x" / "report.html").exists()

"""Means, errors, paired differences, losers and the advice, of scores made up by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest

from edgespec.evaluation_log import Score
from edgespec.evaluation_plan import Cell, Plan
from edgespec.evaluation_report import grids, to_table
from edgespec.evaluation_result import EvalResult, mean, rivals, summarise
from tests.helpers.bundles import model_entry

POLICIES = ("sinks", "keydiff", "tova", "caote(tova)", "lru")


def plan(tasks: tuple[str, ...] = ("text", "needle"), seeds: int = 2) -> Plan:
    return Plan(POLICIES, tasks, (1024,), {(1024, 25): 256}, seeds, 4, 32, ("policy x",))


def result(
    cost: Callable[[Cell], float], what: Plan | None = None, right: Callable[[Cell], bool] = lambda cell: True
) -> EvalResult:
    """The result where every cell's -log p and KL are its cost."""
    what = what or plan()
    done = {}
    for task in what.tasks:
        for seed in range(what.seeds):
            for cell in what.cells(task, 1024, seed):
                value = cost(cell)
                depths = (None,) if task == "text" else (0.1, 0.9)
                done[cell] = tuple(Score(depth, right(cell), value, value) for depth in depths)
    return summarise("x.bundle", model_entry("target"), what, {"seeds": what.seeds}, done)


COSTS = {"none": 0.0, "sinks": 3.0, "keydiff": 1.0, "tova": 2.0, "caote(tova)": 2.5, "lru": 1.5}


def test_means_and_errors() -> None:
    assert mean([1.0, 2.0, 6.0]) == mean([1.0, 2.0, 6.0])
    found = mean([1.0, 2.0, 6.0])
    assert (found.mean, found.contexts) == (3.0, 3)
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert mean([4.0]).error is None


def test_differences_are_paired_by_context() -> None:
    """Contexts differ by far more than policies do; paired, the difference is exact."""
    found = result(lambda cell: COSTS[cell.policy] + 100 * cell.seed)
    row = next(r for r in found.rows if (r.policy, r.task) == ("keydiff", "needle"))
    assert (row.cost.mean, row.cost.error) == (1.0, 0.0)
    assert (row.nll.mean, row.nll.error) == (51.0, 50.0)
    worse = next(c for c in found.comparisons if (c.policy, c.than, c.task) == ("sinks", "lru", "text"))
    assert (worse.worse.mean, worse.worse.error, worse.losses) == (1.5, 0.0, ["1.500 ± 0.000 nats"])


def test_rivals_are_the_reference_protection_only_the_window_and_the_base() -> None:
    assert rivals("caote(tova)", POLICIES) == ["none", "lru", "sinks", "tova"]
    assert rivals("caote-joint(tova)", ("tova", "sinks")) == ["none", "sinks", "tova"]
    assert rivals("lru", POLICIES) == ["none", "sinks"]
    assert rivals("keydiff", ("keydiff",)) == ["none"]


def test_every_loss_is_said_per_base_and_task() -> None:
    lines = result(lambda cell: COSTS[cell.policy]).losses()
    assert (
        "25 % of 1,024: caote(tova) loses to tova on text by 0.500 ± 0.000 nats, needle by 0.500 ± 0.000 nats"
        in lines
    )
    assert any(
        line.startswith("25 % of 1,024: tova loses to lru (protection only) on text by") for line in lines
    )
    assert not any("keydiff loses" in line or "lru loses" in line for line in lines)


def test_a_difference_within_its_error_is_no_loss() -> None:
    found = result(
        lambda cell: COSTS[cell.policy] + (cell.policy == "keydiff") * (2.0 if cell.seed else -1.0)
    )
    (found,) = [c for c in found.comparisons if (c.policy, c.than, c.task) == ("keydiff", "lru", "needle")]
    assert found.worse.mean == 0.0 and not found.losses


def test_the_advice_is_the_best_on_most_tasks_and_its_reason() -> None:
    (advice,) = result(lambda cell: COSTS[cell.policy]).advice
    assert (advice.budget, advice.policy) == (25, "keydiff")
    assert advice.reason == (
        "best or within one standard error of the best on 2 of 2 tasks and lengths "
        "(needle at 1,024, text at 1,024); it needs no stored queries"
    )
    (advice,) = result(
        lambda cell: COSTS[cell.policy] - 5 * (cell.policy == "lru" and cell.task == "text")
    ).advice
    assert "as many as" in advice.reason and "not on " in advice.reason


def test_fewer_right_answers_are_a_loss_and_cost_the_advice() -> None:
    """keydiff is nearest in nats everywhere, and gets no needle right."""
    wrong = lambda cell: not (cell.policy == "keydiff" and cell.task == "needle")  # noqa: E731
    found = result(lambda cell: COSTS[cell.policy], right=wrong)
    line = "25 % of 1,024: keydiff loses to lru (protection only) on needle by 1.000 ± 0.000 of the answers"
    assert line in found.losses()
    assert "1 of 2 tasks and lengths (text at 1,024); not on needle at 1,024" in found.advice[0].reason


def test_ties_go_to_the_policy_without_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgespec.evaluation_result.queries", lambda name, cache: 8 * (name == "keydiff"))
    (advice,) = result(lambda cell: 1.0 if cell.policy in ("keydiff", "lru") else 2.0).advice
    assert advice.policy == "lru" and "as many as keydiff; it needs no" in advice.reason
    (advice,) = result(lambda cell: COSTS[cell.policy]).advice
    assert advice.policy == "keydiff" and advice.reason.endswith("it stores 8 queries")


def test_what_the_model_cannot_do_is_shown_and_not_counted() -> None:
    found = result(lambda cell: COSTS[cell.policy], right=lambda cell: False)
    assert {r.task: r.informative for r in found.rows} == {"text": True, "needle": False}
    assert "1 of 1 tasks" in found.advice[0].reason
    assert not any("needle" in line for line in found.losses())
    ((_, lines),) = grids(found)
    assert lines[0] == ["policy", "text", "needle *"]


def test_the_table() -> None:
    found = result(lambda cell: COSTS[cell.policy])
    ((title, lines),) = grids(found)
    assert title == "1,024 tokens, budget 25 %: 256 rows survive"
    assert [line[0] for line in lines[1:]] == [
        "none (un-evicted)", "sinks", "keydiff", "tova", "caote(tova)", "lru (protection only)",
    ]  # fmt: skip
    assert lines[1][1:] == ["1.00", "100%  0.000 ± 0.000"]
    assert lines[3][1:] == [f"{math.e:.2f}  1.000 ± 0.000", "100%  +1.000 ± 0.000"]
    text = to_table(found)
    assert text.endswith(found.advice[0].reason + "\n") and "caote(tova) loses to tova" in text
    assert all(len(line) < 200 for line in text.splitlines()[:8])


def test_one_context_has_no_error() -> None:
    found = result(lambda cell: COSTS[cell.policy], dataclasses.replace(plan(), seeds=1))
    ((_, lines),) = grids(found)
    assert lines[3][1:] == [f"{math.e:.2f}  1.000", "100%  +1.000"]
    assert found.advice[0].policy == "keydiff"
    json.dumps(found.to_json(), allow_nan=False)

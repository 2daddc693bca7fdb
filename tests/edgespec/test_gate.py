"""The gate's rules on numbers: exact figures, paired ones, what is refused; how often it cries wolf."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from edgespec.bench_report import PLAIN, SPECULATIVE, Report
from edgespec.errors import InputError
from edgespec.gate import (
    IMPROVEMENT,
    REGRESSION,
    UNCHANGED,
    UNKNOWN,
    Row,
    Rules,
    Verdict,
    by_process,
    compare,
    exact,
    judged,
    paired,
)
from edgespec.gate_facts import Exact, differences, predicted
from tests.helpers.reports import counted, prediction, report, sample

RULES = Rules()


def row(verdict: Verdict, metric: str) -> Row:
    return next(r for r in verdict.rows if r.metric == metric)


def judge(base: Report, new: Report, **rules: float) -> Verdict:
    return compare(base, new, predicted(base.predicted, new.predicted), Rules(**rules))


def test_the_same_report_is_unchanged() -> None:
    verdict = judge(report(9), report(9))
    assert verdict.passed and verdict.of(IMPROVEMENT) == verdict.of(UNKNOWN) == ()
    assert len(verdict.of(UNCHANGED)) == len(verdict.rows)
    assert verdict.notes == ()


@pytest.mark.parametrize(
    ("base", "new", "better", "verdict"),
    [
        (100, 101, "less", REGRESSION),
        (100, 99, "less", IMPROVEMENT),
        (100, 99.999999, "more", REGRESSION),
        (100, 101, "more", IMPROVEMENT),
        (100, 100, "more", UNCHANGED),
        (0, 0, "less", UNCHANGED),
        (0, 1, "less", REGRESSION),
        (None, 1, "less", UNKNOWN),
        (1, None, "less", UNKNOWN),
    ],
)
def test_exact_figures_have_no_tolerance(base: Any, new: Any, better: str, verdict: str) -> None:
    assert exact(Exact("x", "counted", "bytes", better, base, new)).verdict == verdict


def test_a_byte_more_in_one_graph_is_a_regression_and_stands_first() -> None:
    new = replace(report(9), counted=(counted("target", 1001), counted("draft")))
    verdict = judge(report(9), new)
    assert not verdict.passed
    first = verdict.rows[0]
    assert (first.metric, first.base, first.new) == ("target decode 1, budget 16: weights a call", 1000, 1001)
    assert {r.metric.split(",")[0] for r in verdict.of(REGRESSION)} == {
        "target decode 1", "target prefill 4", "target verify 2",
    }  # fmt: skip


def test_a_slower_replay_on_one_device_is_a_regression() -> None:
    base = report(9)
    new = replace(base, predicted=(prediction("phone-a", 29.99), prediction("phone-b", 20.0)))
    verdict = judge(base, new)
    assert [r.metric for r in verdict.of(REGRESSION)] == [
        "phone-a: speculative decoding",
        "phone-a: plain decoding",
    ]
    assert verdict.rows[0].change == pytest.approx(29.99 / 30 - 1)


def test_a_text_that_speculation_changed_is_a_regression() -> None:
    base = report(9)
    odd = [
        replace(s, text_sha256="other") if s.way == SPECULATIVE and s.prompt == "qa/2" else s
        for s in base.samples
    ]
    verdict = judge(base, replace(base, samples=tuple(odd)))
    assert [r.metric for r in verdict.of(REGRESSION)] == [
        "prompts whose speculative text differs from the plain one"
    ]


@pytest.mark.parametrize(
    ("low", "high", "better", "pairs", "verdict", "reason"),
    [
        (0.031, 0.06, "less", 20, REGRESSION, "worse by more than 3 %: +3.1% to +6.0% (99%, 20 pairs)"),
        (-0.06, -0.031, "more", 20, REGRESSION, "worse by more than 3 %: -6.0% to -3.1% (99%, 20 pairs)"),
        (-0.06, -0.031, "less", 20, IMPROVEMENT, "better by more than 3 %: -6.0% to -3.1% (99%, 20 pairs)"),
        (0.031, 0.06, "more", 20, IMPROVEMENT, "better by more than 3 %: +3.1% to +6.0% (99%, 20 pairs)"),
        (-0.02, 0.03, "less", 20, UNCHANGED, "within 3 %: -2.0% to +3.0% (99%, 20 pairs)"),
        (-0.1, 0.2, "less", 7, UNKNOWN, "7 pairs, fewer than 8"),
        (0.0, 0.0, "less", 1, UNCHANGED, "the same in 1 pairs"),
    ],
)
def test_the_interval_decides(
    low: float, high: float, better: str, pairs: int, verdict: str, reason: str
) -> None:
    assert judged((low + high) / 2, low, high, better, 0.03, pairs) == (verdict, reason)


def test_an_undecided_figure_says_how_many_pairs_would_tell() -> None:
    verdict, reason = judged(0.05, 0.01, 0.09, "less", 0.03, 20)
    assert verdict == UNKNOWN
    # 4 % of half-width must shrink to the 2 % between the estimate and the limit: four times the pairs.
    assert reason == "undecided at 3 %: +1.0% to +9.0% (99%, 20 pairs); about 80 pairs would tell"


@pytest.mark.parametrize("seed", range(5))
def test_a_true_slow_down_of_5_percent_is_found_with_enough_pairs(seed: int) -> None:
    """The suite's 65 prompts in three rounds, by 27 processes; pairs that scatter by 4 %."""
    base, new = report(65, 3, seed, 0.03), report(65, 3, 99 + seed, 0.03, slower=1.05)
    found = row(judge(base, new), "plain decoding, s/token")
    assert (found.verdict, found.pairs) == (REGRESSION, 27)
    assert found.low is not None and found.high is not None and 0.03 < found.low < 0.05 < found.high


@pytest.mark.parametrize(("prompts", "rounds", "processes"), [(65, 1, 9), (65, 3, 27)])
def test_the_luck_of_processes_is_no_regression(prompts: int, rounds: int, processes: int) -> None:
    """One round of 65 prompts once called a bundle 8 % slower than itself: its prompts shared a process."""
    found = []
    for seed in range(60):
        base, new = (report(prompts, rounds, 2 * seed + i, 0.02, luck=0.06) for i in (0, 1))
        pairs = by_process(base, new, (PLAIN,), lambda sample: sample.time_decode_s, 0)
        found.append(paired("x", "s", "less", pairs, 0.03, True))
    lows = [r.low for r in found if r.low is not None]
    assert {r.pairs for r in found} == {processes}
    assert [r.verdict for r in found].count(REGRESSION) <= 1
    assert sum(low > 0 for low in lows) <= 2


def test_one_process_of_each_is_not_enough() -> None:
    verdict = judge(report(8), report(8, slower=1.2))
    assert verdict.passed
    found = row(verdict, "plain decoding, s/token")
    assert (found.verdict, found.reason) == (UNKNOWN, "1 pairs, fewer than 8")


@pytest.mark.parametrize(
    ("pairs", "noise", "runs"), [(8, 0.02, 150), (8, 0.5, 150), (13, 0.1, 100), (65, 0.1, 30)]
)
def test_equal_contenders_are_no_regression(pairs: int, noise: float, runs: int) -> None:
    """Same distribution: an interval of 99 % is above nothing in 0.5 % of runs, and above 3 % more rarely."""
    chance = random.Random(f"{pairs} {noise}")
    found = []
    for _ in range(runs):
        both = [(chance.lognormvariate(0, noise), chance.lognormvariate(0, noise)) for _ in range(pairs)]
        found.append(paired("x", "s", "less", both, 0.03, True))
    lows = [r.low for r in found if r.low is not None]
    assert [r.verdict for r in found].count(REGRESSION) <= 1
    assert sum(low > 0 for low in lows) <= 3


def test_runs_that_took_no_turns_are_shown_and_not_judged() -> None:
    verdict = judge(report(9), report(9, slower=2.0, run="another"))
    slow = row(verdict, "speculative decoding, s/token")
    assert (slow.verdict, slow.change) == (UNKNOWN, 1.0)
    assert slow.reason == "not measured in turns: edgespec bench NEW --against BASE does"
    assert verdict.passed


def test_block_efficiency_is_judged_wherever_it_was_measured() -> None:
    base, new = report(9), report(9, run="another")
    fewer = tuple(replace(s, verify_calls=12) if s.way == SPECULATIVE else s for s in new.samples)
    verdict = judge(base, replace(new, samples=fewer))
    be = row(verdict, "block efficiency, fresh")
    assert (be.base, be.verdict) == (2.0, REGRESSION)
    assert be.new == pytest.approx(20 / 12) and be.change == pytest.approx(10 / 12 - 1)
    assert judge(base, replace(new, samples=fewer), be_tolerance=0.2).passed


def test_answers_too_short_to_time_are_no_pairs() -> None:
    samples = tuple(sample("qa/1", PLAIN, 0, 0, 0.1, tokens_new=3) for _ in range(2))
    short = replace(report(9), samples=samples)
    found = row(judge(short, short), "plain decoding, s/token")
    assert (found.verdict, found.reason, found.pairs) == (UNKNOWN, "no pair of samples", 0)


def test_reports_of_other_bundles_are_refused() -> None:
    base = report(9)
    target, draft = base.bundle.models
    deeper = replace(target, spec=replace(target.spec, layers=3))
    other = replace(base, bundle=replace(base.bundle, models=(deeper, draft)))
    with pytest.raises(InputError) as caught:
        judge(base, other)
    assert caught.value.message == (
        "the reports are of different bundles or prompts: "
        "target.spec.layers is 2 in the base and 3 in the new one"
    )
    assert caught.value.hint == (
        "compare reports of the same model, cache and prompts, or make a new base: edgespec bench"
    )


def test_every_difference_is_named() -> None:
    base = report(9)
    target, _ = base.bundle.models
    smaller = replace(target, cache=replace(target.cache, budget=8))
    new = replace(
        base,
        bundle=replace(base.bundle, device="npu", models=(smaller,)),
        settings=replace(base.settings, prompts=2, prompts_sha256="e" * 64),
        counted=(counted("target"),),
    )
    assert differences(base, new) == [
        "device is cpu in the base and npu in the new one",
        "models is target and draft in the base and target in the new one",
        "target.cache.budget is 16 in the base and 8 in the new one",
        "prompts is 9 in the base and 2 in the new one",
        "prompts_sha256 is dddddddddddd... in the base and eeeeeeeeeeee... in the new one",
        "graph draft is there in the base and missing in the new one",
        "graph draft draft 2, budget 16 is there in the base and missing in the new one",
        "graph draft commit, budget 16 is there in the base and missing in the new one",
    ]


def test_what_may_differ_is_noted() -> None:
    base = report(9)
    settings = replace(base.settings, drafter="ngram", costs="tuned")
    other = replace(base.environment, cpu="B cpu", packages={"edgespec": "0.2.0"})
    new = replace(base, settings=settings, environment=other)
    assert judge(base, new).notes == (
        "drafter: auto in the base, ngram in the new one",
        "costs: default in the base, tuned in the new one",
        "cpu: A cpu in the base, B cpu in the new one",
        "edgespec: 0.1.0 in the base, 0.2.0 in the new one",
    )
    bare = replace(base, environment=replace(base.environment, cpu="", packages={}))
    assert len(judge(bare, new).notes) == 2

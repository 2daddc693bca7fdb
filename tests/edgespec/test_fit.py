"""The fit finds what made the figures, says what they do not tell, and published rows are read right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgespec.errors import InputError
from edgespec.fit import PRIORS, fit, solve
from edgespec.latency import call_time
from edgespec.profiles import load
from edgespec.published import Row, call_of, predict, rows, shape, speculative_rows
from edgespec.validation import compare, goal, implied
from tests.helpers.latency import figure

ELITE = load("snapdragon-8-elite")


def made_up(models: tuple[str, ...]) -> tuple[Row, ...]:
    """Rows of a device that is not like the priors, without any error."""
    truth = ELITE.with_figure("bandwidth_weights_bytes_per_s", figure(4e10))
    truth = truth.with_figure("bandwidth_kv_bytes_per_s", figure(2.5e10))
    truth = truth.with_figure("bandwidth_activations_bytes_per_s", figure(3e9))
    truth = truth.with_figure("dispatch_s", figure(2e-3))
    made = []
    for row in rows():
        if row.device == ELITE.name and row.source == "ai-hub" and row.model in models:
            made.append(replace(row, time_s=predict(row, truth), held_out=""))
    return tuple(made)


def test_a_fit_finds_what_made_the_rows() -> None:
    every = tuple(dict.fromkeys(row.model for row in rows()))
    found = fit(ELITE, made_up(every))
    said = {f.name: f for f in found.figures}
    assert said["bandwidth_weights_bytes_per_s"].value == pytest.approx(4e10, rel=0.03)
    assert said["bandwidth_kv_bytes_per_s"].value == pytest.approx(2.5e10, rel=0.2)  # drawn to its prior
    assert said["bandwidth_activations_bytes_per_s"].value == pytest.approx(3e9, rel=0.05)
    assert found.median_error < 0.02 and found.median_left_out is not None and found.median_left_out < 0.03
    assert said["bandwidth_kv_bytes_per_s"].identified and not said["dispatch_s"].identified
    assert found.profile.bandwidth_kv_bytes_per_s.basis == "fit"
    assert found.profile.dispatch_s.basis == "estimate"


def test_one_model_does_not_tell_the_caches_share() -> None:
    found = fit(ELITE, made_up(("llama-3_2-3b",)))
    said = {f.name: f for f in found.figures}
    assert said["bandwidth_weights_bytes_per_s"].identified
    assert not said["bandwidth_kv_bytes_per_s"].identified
    assert found.median_left_out is None  # nothing is left without it


def test_without_samples_of_a_figure_it_stays_at_its_prior() -> None:
    row = made_up(("llama-3_2-1b",))[0]
    made, figures = solve(ELITE, [(call_of(row, ELITE), row.time_s)], PRIORS["npu"], "x", "2026-01-01", "fit")
    widened = next(f for f in figures if f.name == "bandwidth_widened_bytes_per_s")
    assert widened.value == pytest.approx(widened.prior) and widened.deviation == pytest.approx(0.5)
    assert call_time(call_of(row, made), made).total_s == pytest.approx(row.time_s, rel=0.03)


def test_rows_held_out_are_never_fitted() -> None:
    every = tuple(dict.fromkeys(row.model for row in rows()))
    good = made_up(every)
    wrong = replace(good[0], time_s=good[0].time_s * 10, held_out="a test")
    assert fit(ELITE, (*good, wrong)).figures == fit(ELITE, good).figures


def test_a_device_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="no row of tensor-g5 is published") as caught:
        fit(load("tensor-g5"), rows())
    assert "snapdragon-8-elite" in caught.value.hint


def test_shipped_profiles_are_what_the_fit_gives() -> None:
    """A change of the rows or of the model must be followed by `profile fit -o` of every device."""
    for device in dict.fromkeys(row.device for row in rows()):
        profile = load(device)
        for one in fit(profile, rows()).figures:
            assert profile.value(one.name) == pytest.approx(one.value, rel=1e-3), (device, one.name)


def test_published_sizes_by_hand() -> None:
    llama = shape("llama-3_2-1b")
    row = next(
        r for r in rows() if r.model == "llama-3_2-1b" and r.device == ELITE.name and r.kind == "decode"
    )
    linears = 16 * (2048 * 3072 + 2048 * 2048 + 3 * 2048 * 8192)
    outputs = 16 * (3072 + 2048 + 2 * 8192 + 2048)
    work = call_of(row, ELITE)
    norms, embedding = 4 * 33 * 2048, 2 * 2048
    head = 128256 * 2048 + 2 * 128256
    assert work.bytes_weights == linears // 2 + 2 * outputs + head + norms + embedding
    assert work.bytes_kv == 2 * 16 * 8 * 64 * 4096
    assert llama.tied and row.time_s == 1 / 64.14 and row.previous_s == 1 / 53.64


def test_the_goals_hold_and_no_row_is_left_out() -> None:
    found = compare()
    assert len(found) == len(rows())
    middle, most, n = goal(found, "decode")
    assert n == 11 and middle <= 0.10 and most <= 0.25
    held = [c for c in found if not c.fitted]
    assert {c.row.source for c in held} == {"ai-hub", "powerserve"} and all(c.left_out is None for c in held)


def test_what_published_speculation_implies() -> None:
    assert [row.device for row in speculative_rows()] == ["snapdragon-8-gen-3", "snapdragon-8-elite"]
    for row in speculative_rows():
        by_drafts = list(implied(row).values())
        assert by_drafts == sorted(by_drafts)
        assert 1 < by_drafts[0] < by_drafts[-1] < row.draft_width

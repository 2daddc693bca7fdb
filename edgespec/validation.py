"""Predictions beside what is published or measured: every row and its error, and what speculation
implies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgespec.fit import fit
from edgespec.latency import call_time, sample_time
from edgespec.measure import Timed, record, time_calls
from edgespec.profiles import Profile, load
from edgespec.published import PASS, Row, SpeculativeRow, predict, rows, shape
from edgespec.replay import replay_work
from edgespec.shape import precision
from edgespec.work import ModelWork, of_shape

FAMILY = ("snapdragon-8-elite", "snapdragon-8-elite-gen-5")
DEPTHS = (3, 4, 6, 8, 11)  # draft calls of a round; the publication gives the width only


@dataclass(frozen=True)
class Compared:
    """A row's figure as published and as predicted, in the publication's unit: tokens/s of a decode, ms of a
    prefill. `left_out`: predicted by a fit without the model's rows; None where the row was held out anyway.
    `moved`: by how much the figure changed since the release before.
    """

    row: Row
    published: float
    predicted: float
    left_out: float | None
    moved: float | None

    @property
    def error(self) -> float:
        """Relative, of the shipped profile's prediction."""
        return self.predicted / self.published - 1

    @property
    def fitted(self) -> bool:
        """Did the row take part in the fit of its profile?"""
        return not self.row.held_out


def compare() -> tuple[Compared, ...]:
    """Every published row against the shipped profile of its device."""
    found = []
    for device in dict.fromkeys(row.device for row in rows()):
        profile = load(device)
        without = {miss.row: miss.left_out_s for miss in fit(profile, rows()).misses}
        for row in rows():
            if row.device == device:
                other = without.get(row)
                moved = None if row.previous_s is None else row.previous_s / row.time_s - 1
                figures = (_unit(row, row.time_s), _unit(row, predict(row, profile)))
                found.append(Compared(row, *figures, other and _unit(row, other), moved))
    return tuple(found)


def goal(found: Sequence[Compared], kind: str) -> tuple[float, float, int]:
    """Median and largest error of the w4a16 rows of the 8 Elite family of a kind, and how many there are."""
    errors = [
        abs(c.error)
        for c in found
        if c.row.device in FAMILY and c.row.precision == "w4a16" and c.row.kind == kind
    ]
    return median(errors), max(errors), len(errors)


def _unit(row: Row, seconds: float) -> float:
    return 1 / seconds if row.kind == "decode" else seconds * 1e3


def implied(row: SpeculativeRow) -> dict[int, float]:
    """The block efficiency that a published speed needs, by the draft calls that a round is taken to make.

    BE = tokens/s times a round: those draft calls and a verify call of the published width. The target's
    calls are scaled so that plain decoding takes what is published for it.
    """
    profile = load(row.device)
    stored, budget = precision(row.precision, profile.kind), row.context - PASS
    steps = (("decode", 1), ("verify", row.draft_width))
    target = of_shape(shape(row.model), stored, steps, budget, PASS)
    draft = of_shape(shape(row.draft), stored, (("draft", 1),), budget, PASS, "draft")
    plain = _seconds(target, "decode", 1, row.context, profile)
    scale = 1 / row.tokens_per_s / plain
    verify = _seconds(target, "verify", row.draft_width, row.context, profile) * scale
    drafted = _seconds(draft, "draft", 1, row.context, profile)
    return {n: row.speculative_tokens_per_s * (n * drafted + verify) for n in DEPTHS}


def _seconds(model: ModelWork, kind: str, width: int, context: int, profile: Profile) -> float:
    work = model.call(kind, width, model.budget, context, profile.bytes_float.value)
    return (call_time(work, profile) + sample_time(width, model, profile, 0.0)).total_s


@dataclass(frozen=True)
class Here:
    """A figure of this machine: measured (n times) and predicted, in `unit`."""

    name: str
    unit: str
    measured: float
    least: float
    most: float
    times: int
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def here(
    runtime: Any, settings: Any, models: dict[str, ModelWork], profile: Profile, prompt: list[int], runs: int
) -> tuple[Here, ...]:
    """Calls measured anew beside their predictions, and the speed of prompt lookup beside its replay."""
    timed, _ = time_calls(runtime, settings, models, profile, runs)
    found = [_here(one, profile) for one in timed]
    measured, predicted = [], []
    for width in sorted(models["target"].widths("verify")):
        how = {"drafter": "ngram", "stop_rule": "fixed", "draft_tokens": width - 1}
        for _ in range(max(1, runs // 5)):
            trace, _ = record(runtime, settings, prompt, 64, **how)
            run = replay_work(trace, profile, models)
            spent = sum(c.time_s for turn in trace.turns for r in turn.rounds for c in r.calls)
            spent += profile.host_s.value * run.rounds
            measured.append((run.tokens_new - 1) / spent)
            predicted.append(run.tokens_per_s)
        figures = (median(measured), min(measured), max(measured), len(measured), median(predicted))
        found.append(Here(f"speculation, up to {width} rows", "tok/s", *figures))
        measured, predicted = [], []
    return tuple(found)


def _here(one: Timed, profile: Profile) -> Here:
    ms = sorted(t * 1e3 for t in one.times_s)
    name = f"{one.model} {one.kind} {one.width}, {one.work.bytes_kv / 1e6:.1f} MB of cache"
    predicted = call_time(one.work, profile).total_s * 1e3
    return Here(name, "ms", one.quiet_s * 1e3, ms[0], ms[-1], len(ms), predicted)


def draw(found: Sequence[Compared], path: Path) -> None:
    """Write the rows as a picture: predicted over published time, hollow where a row was never fitted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        own = [c for c in found if c.row.kind == kind]
        ends = [min(c.row.time_s for c in own) * 0.8e3, max(c.row.time_s for c in own) * 1.25e3]
        panel.plot(ends, ends, color="black", linewidth=0.8)
        for share in (0.75, 1.25):
            panel.plot(ends, [share * end for end in ends], color="grey", linewidth=0.6, linestyle="--")
        for device in dict.fromkeys(c.row.device for c in own):
            for fitted in (True, False):
                rows_ = [c for c in own if c.row.device == device and c.fitted == fitted]
                if not rows_:
                    continue
                published = [c.row.time_s * 1e3 for c in rows_]
                said = [c.row.time_s * 1e3 * _time_ratio(c) for c in rows_]
                color = f"C{list(dict.fromkeys(c.row.device for c in found)).index(device)}"
                label = device + ("" if fitted else " (never fitted)")
                panel.scatter(
                    published, said, edgecolors=color, facecolors=color if fitted else "none", label=label
                )
        panel.set(xscale="log", yscale="log", xlabel="published ms", ylabel="predicted ms", title=kind)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _time_ratio(one: Compared) -> float:
    return one.published / one.predicted if one.row.kind == "decode" else one.predicted / one.published

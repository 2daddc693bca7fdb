"""A device's bandwidths and call cost from published figures: which numbers the figures can tell apart.

A published row is one call, t = dispatch + W/BW_w + KV/BW_kv + A/BW_a. What the rows identify:
- BW_w: every decode row; most of its bytes are weights.
- BW_kv: only rows whose caches differ in size against their weights (Phi-3.5 and Baichuan2 keep 32 key-value
  heads: 0.8 and 1.1 GB in 4,096 slots against 0.07..0.27 GB). Three Llama rows do not tell it.
- BW_a: prefill rows; what passes between 128 rows' operators explains them, and arithmetic does not:
  Llama 3.1 8B and Baichuan2 do the same operations a pass, 143 against 208 ms. Arithmetic's rates stay lower
  bounds.
- dispatch: small models only. The host's share is not told from it.
- Bits a weight are not identified at all: scales and block overhead act as a slower BW_w. So w4 counts 4 bits
  and a float16 scale an output, the head 8 bits, a cached number 8 bits; fitted figures belong to that count.
On a processor (`kind` cpu) prefills are bound by arithmetic, and the rates take the place of BW_kv and BW_a.

Where rows do not identify a number it stays at its prior, a share of the memory's peak, and is reported as
such: maximum a posteriori in the logarithms (so all are positive), with errors of NOISE in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from statistics import median
from typing import Any

import numpy as np

from edgespec.errors import InputError
from edgespec.latency import call_time
from edgespec.profiles import Figure, Profile
from edgespec.published import Row, call_of, predict, source
from edgespec.work import Work

NOISE = 0.1  # relative, of a row: releases move by 0.08 to 0.2
IDENTIFIED = 0.5  # of the prior's width, below which a figure counts as fitted
STEPS, STEP = 200, 1e-4
UNTOLD = "a share of the peak or of a like device; what was seen does not tell it"
# Share of another figure (or seconds), and how far the logarithm may be off.
Priors = dict[str, tuple[str, float, float]]
PRIORS: dict[str, Priors] = {
    "npu": {
        "bandwidth_weights_bytes_per_s": ("bandwidth_peak_bytes_per_s", 0.75, 0.4),
        "bandwidth_widened_bytes_per_s": ("bandwidth_weights_bytes_per_s", 0.4, 0.5),
        "bandwidth_kv_bytes_per_s": ("bandwidth_weights_bytes_per_s", 1 / 3, 0.5),
        "bandwidth_activations_bytes_per_s": ("bandwidth_peak_bytes_per_s", 1 / 16, 0.6),
        "dispatch_s": ("", 1e-3, 0.6),
    },
    "cpu": {
        "bandwidth_weights_bytes_per_s": ("bandwidth_peak_bytes_per_s", 0.6, 0.4),
        "ops_int8_per_s": ("", 3e11, 1.0),
        "ops_float_per_s": ("", 1e11, 1.0),
    },
}


@dataclass(frozen=True)
class Fitted:
    """A figure's value and its standard deviation (relative), before and after seeing the rows."""

    name: str
    value: float
    prior: float
    deviation_prior: float
    deviation: float

    @property
    def identified(self) -> bool:
        """Did the rows tell it?"""
        return self.deviation < IDENTIFIED * self.deviation_prior


@dataclass(frozen=True)
class Miss:
    """A row with the seconds predicted by the fit, and by a fit without the row (None where none is left)."""

    row: Row
    predicted_s: float
    left_out_s: float | None

    @property
    def error(self) -> float:
        """Relative, of the time."""
        return self.predicted_s / self.row.time_s - 1

    @property
    def error_left_out(self) -> float | None:
        """Relative, of the time, where the row took no part in the fit."""
        return None if self.left_out_s is None else self.left_out_s / self.row.time_s - 1


@dataclass(frozen=True)
class Fit:
    """The profile with fitted figures, the figures, and every row's miss."""

    profile: Profile
    figures: tuple[Fitted, ...]
    misses: tuple[Miss, ...]

    @property
    def median_error(self) -> float:
        """Of the rows in the fit, as it is."""
        return median(abs(m.error) for m in self.misses)

    @property
    def median_left_out(self) -> float | None:
        """Of the rows, each predicted without it."""
        errors = [abs(m.error_left_out) for m in self.misses if m.error_left_out is not None]
        return median(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        """The profile, the fitted figures and every row's miss as JSON data."""
        return {
            "profile": self.profile.to_json(),
            "figures": [asdict(f) | {"identified": f.identified} for f in self.figures],
            "rows": [asdict(m) | {"error": m.error, "error_left_out": m.error_left_out} for m in self.misses],
            "median_error": self.median_error,
            "median_left_out": self.median_left_out,
        }


def fit(profile: Profile, rows: Sequence[Row]) -> Fit:
    """The profile's device fitted to its published rows that are not held out."""
    own = [row for row in rows if row.device == profile.name and not row.held_out]
    if not own:
        devices = sorted({row.device for row in rows if not row.held_out})
        raise InputError(f"no row of {profile.name} is published", f"use one of: {', '.join(devices)}")
    made, figures = _fitted(profile, own)
    misses = []
    for row in own:
        others = [other for other in own if other.key != row.key]
        without = predict(row, _fitted(profile, others)[0]) if others else None
        misses.append(Miss(row, predict(row, made), without))
    return Fit(made, figures, tuple(misses))


def _fitted(profile: Profile, rows: Sequence[Row]) -> tuple[Profile, tuple[Fitted, ...]]:
    samples = [(call_of(row, profile), row.time_s - profile.host_s.value) for row in rows]
    texts = {source(row.source) for row in rows}
    text, date = "; ".join(sorted(text for text, _ in texts)), max(date for _, date in texts)
    return solve(profile, samples, PRIORS[profile.kind], text, date, "fit")


def solve(
    profile: Profile, samples: Sequence[tuple[Work, float]], priors: Priors, text: str, date: str, basis: str
) -> tuple[Profile, tuple[Fitted, ...]]:
    """The profile whose figures named in `priors` best explain the seconds of these calls.

    Damped Gauss-Newton on log predicted/seen, with the priors as further rows. `text`, `date` and `basis` go
    with the figures that the samples identify; the others are estimates.
    """
    widths = np.array([width for _, _, width in priors.values()])
    wanted = np.array([log(seconds) for _, seconds in samples])

    def misses(x: np.ndarray) -> np.ndarray:
        trial = _with(profile, priors, x)
        said = np.array([log(call_time(work, trial).total_s) for work, _ in samples])
        return np.concatenate([(said - wanted) / NOISE, x / widths])

    x = np.zeros(len(priors))
    for _ in range(STEPS):
        at = misses(x)
        slopes = np.array([(misses(x + STEP * e) - at) / STEP for e in np.eye(len(x))]).T
        move = np.linalg.lstsq(slopes, -at, rcond=None)[0]
        if np.abs(move).max() < 1e-9:
            break
        x = x + 0.7 * move
    spread = np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    made = _with(profile, priors, x)
    figures = []
    for i, (name, (_, _, width)) in enumerate(priors.items()):
        value = made.value(name)
        assert value is not None
        figures.append(Fitted(name, value, value / exp(x[i]), width, float(spread[i])))
    return _named(made, figures, text, date, basis), tuple(figures)


def _with(profile: Profile, priors: Priors, x: np.ndarray) -> Profile:
    """The profile with each figure at its prior times e^x."""
    for (name, (of, share, _)), shift in zip(priors.items(), x, strict=True):
        base = profile.value(of) if of else 1.0
        assert base is not None
        profile = profile.with_figure(name, Figure(base * share * exp(shift), "", "", "fit"))
    return profile


def _named(profile: Profile, figures: Sequence[Fitted], text: str, date: str, basis: str) -> Profile:
    """The fitted figures with their source; one that no sample tells is an estimate."""
    for figure in figures:
        told = (text, date, basis) if figure.identified else (UNTOLD, date, "estimate")
        profile = profile.with_figure(figure.name, Figure(figure.value, *told))
    return profile

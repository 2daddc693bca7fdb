"""A tiny device and tiny models whose times come out as round numbers."""

from __future__ import annotations

from typing import Any

from edgespec.profiles import Figure, Profile
from edgespec.shape import PRECISIONS, Shape
from edgespec.work import ModelWork, of_shape

SHAPE = Shape("llama", 2, 64, 4, 2, 16, 96, 288, True)
BUDGET, BLOCK = 16, 8


def figure(value: float) -> Figure:
    return Figure(value, "made up", "2026-01-01", "estimate")


def device(**changes: float | None) -> Profile:
    """A device where a weight's byte takes a nanosecond, a cached one two, an activation's four."""
    values: dict[str, Any] = {
        "bandwidth_peak_bytes_per_s": 2e9,
        "bandwidth_weights_bytes_per_s": 1e9,
        "bandwidth_widened_bytes_per_s": 0.25e9,
        "bandwidth_kv_bytes_per_s": 0.5e9,
        "bandwidth_activations_bytes_per_s": 0.25e9,
        "bandwidth_host_bytes_per_s": 1e9,
        "dispatch_s": 1e-3,
        "host_s": 1e-4,
        "efficiency": 0.5,
        "bytes_float": 2,
        "ops_int8_per_s": 1e15,
        "ops_int16_per_s": 1e15,
        "ops_float_per_s": 1e15,
        "bytes_on_chip": None,
        "bytes_context": None,
        "bytes_memory": None,
        "energy_j_per_byte": None,
        **changes,
    }
    figures = {name: None if value is None else figure(value) for name, value in values.items()}
    return Profile("toy", "a toy", "npu", "none", "npu", **figures)  # type: ignore[arg-type]


def models(precision: str = "w8a16", draft: bool = True, appends: bool = False) -> dict[str, ModelWork]:
    """A target, and a draft of the same shape."""
    stored = PRECISIONS[precision]
    steps = (("prefill", BLOCK), ("decode", 1), ("verify", 4))
    made = {"target": of_shape(SHAPE, stored, steps, BUDGET, BLOCK, appends=appends)}
    if draft:
        drafts = (("prefill", BLOCK), ("draft", 2))
        made["draft"] = of_shape(SHAPE, stored, drafts, BUDGET, BLOCK, "draft", appends=appends)
    return made

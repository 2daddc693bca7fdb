"""Published figures of models on devices (profiles/published.toml), and what the latency model says to each.

A figure is turned into the seconds of one call: a decoded token, or a prefill pass of 128 tokens.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from edgespec.latency import call_time
from edgespec.profiles import Profile
from edgespec.shape import Shape, precision
from edgespec.work import ModelWork, Work, of_shape

PASS = 128  # tokens of a published prefill pass
DECODE, PREFILL = ("decode", 1), ("prefill", PASS)


@dataclass(frozen=True)
class Row:
    """One published figure: the seconds of a `decode` or `prefill` call. `held_out`: why it is never
    fitted.
    """

    source: str
    model: str
    precision: str
    device: str
    context: int
    kind: str
    time_s: float
    previous_s: float | None
    held_out: str

    @property
    def key(self) -> tuple[str, ...]:
        """What rows of one publication share: they are left out together."""
        return self.source, self.model, self.precision, self.device


@dataclass(frozen=True)
class SpeculativeRow:
    """A published pair: tokens a second of plain decoding and of speculation with a draft."""

    source: str
    device: str
    model: str
    draft: str
    precision: str
    context: int
    draft_width: int
    tokens_per_s: float
    speculative_tokens_per_s: float


def rows() -> tuple[Row, ...]:
    """Every published figure of plain decoding and of prefill."""
    found: list[Row] = []
    for item in _data()["row"]:
        previous = item.get("previous_tokens_per_s")
        found.append(_row(item, "decode", 1 / item["tokens_per_s"], 1 / previous if previous else None))
        if "ttft_ms" in item:
            found.append(_row(item, "prefill", item["ttft_ms"] / 1e3))
        elif "prefill_tokens_per_s" in item:
            found.append(_row(item, "prefill", PASS / item["prefill_tokens_per_s"]))
    return tuple(found)


def _row(item: dict[str, Any], kind: str, time_s: float, previous_s: float | None = None) -> Row:
    words = {name: item[name] for name in ("source", "model", "precision", "device", "context")}
    return Row(**words, kind=kind, time_s=time_s, previous_s=previous_s, held_out=item.get("held_out", ""))


def speculative_rows() -> tuple[SpeculativeRow, ...]:
    """The rows that give speculation's speed too."""
    names = [item.name for item in SpeculativeRow.__dataclass_fields__.values()]
    return tuple(
        SpeculativeRow(**{name: item[name] for name in names})
        for item in _data()["row"]
        if "speculative_tokens_per_s" in item
    )


def shape(model: str) -> Shape:
    """A published model's sizes."""
    sizes: list[Any] = _data()["model"][model]
    return Shape("llama", *sizes)


def source(name: str) -> tuple[str, str]:
    """The text and the date of a source."""
    found = _data()["source"][name]
    return found["text"], found["date"]


def call_of(row: Row, profile: Profile) -> Work:
    """What a row's call moves and computes on a device."""
    work = _work(row.model, row.precision, row.context, profile.kind)
    kind, width = DECODE if row.kind == "decode" else PREFILL
    return work.call(kind, width, work.budget, row.context, profile.bytes_float.value)


def predict(row: Row, profile: Profile) -> float:
    """The seconds that the model says a row's call takes, the host's share included."""
    return call_time(call_of(row, profile), profile).total_s + profile.host_s.value


@cache
def _work(model: str, stored: str, context: int, kind: str) -> ModelWork:
    return of_shape(shape(model), precision(stored, kind), (DECODE, PREFILL), context - PASS, PASS)


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("edgespec.profiles").joinpath("published.toml").read_text("utf-8"))

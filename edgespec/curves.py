"""The training curves of drafts: read, put side by side at equal steps, and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgespec.errors import InputError
from edgespec.rendering import grid, printed

PLACES = ("training/curve.jsonl", "curve.jsonl")  # of a draft that was trained here, and of a shipped one


@dataclass(frozen=True)
class Point:
    """A measurement: steps and learned tokens so far, the mean loss since the last one, held-out BE."""

    step: int
    tokens: int
    loss: float
    block_efficiency: float


FIELDS = tuple(Point.__dataclass_fields__)


@dataclass(frozen=True)
class Curve:
    """A draft's measurements in order, and the loss that it learned by."""

    name: str
    loss: str
    points: tuple[Point, ...]

    def at(self, step: int) -> Point:
        """The measurement after so many steps."""
        return next(p for p in self.points if p.step == step)


def read(folder: Path) -> Curve:
    """The curve of a draft's folder, of a training that is still going on too; InputError for none."""
    path = next((folder / place for place in PLACES if (folder / place).is_file()), None)
    if path is None:
        raise InputError(f"{folder} holds no {PLACES[0]}", "name a folder that edgespec draft train made")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        points = tuple(Point(**{name: number(line[name]) for name in FIELDS}) for line in lines)
        return Curve(folder.name, loss_of(folder), points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no training's curve ({error!r})", "train the draft again") from None


def number(value: Any) -> Any:
    """A figure of a curve; ValueError for what is none, such as text or NaN."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def loss_of(folder: Path) -> str:
    """What the draft learned by, from its own facts or those of its training."""
    for name in ("training/state.json", "draft.json"):
        if (folder / name).is_file():
            return str(json.loads((folder / name).read_text(encoding="utf-8"))["training"]["loss"])
    return "?"


def equal_steps(curves: Sequence[Curve]) -> list[int]:
    """The steps at which every draft was measured; InputError where there are none."""
    steps = set.intersection(*({p.step for p in curve.points} for curve in curves))
    if not steps:
        raise InputError("no step is one where all drafts were measured", "train them with one --measure")
    return sorted(steps)


def to_table(curves: Sequence[Curve]) -> str:
    """Loss and BE of each draft at equal steps."""
    head = ["step", "tokens", *(f"{c.name}: {word}" for c in curves for word in (c.loss, "BE"))]
    rows = []
    for step in equal_steps(curves):
        points = [curve.at(step) for curve in curves]
        figures = [text for p in points for text in (f"{p.loss:.4f}", f"{p.block_efficiency:.3f}")]
        rows.append([f"{step:,}", f"{points[0].tokens:,}", *figures])
    return printed([grid(head, rows)])


def to_json(curves: Sequence[Curve]) -> dict[str, Any]:
    """Every curve, and the steps at which they can be compared."""
    return {"drafts": [asdict(curve) for curve in curves], "equal_steps": equal_steps(curves)}


def write_png(curves: Sequence[Curve], path: Path) -> None:
    """Loss and BE against the learned tokens; needs the extra `plots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("loss", "loss"), ("block_efficiency", "BE, held out")), strict=True)
    for panel, (name, label) in panels:
        for curve in curves:
            points = [(p.tokens, getattr(p, name)) for p in curve.points]
            panel.plot(*zip(*points, strict=True), marker=".", label=f"{curve.name} ({curve.loss})")
        panel.set_xlabel("learned tokens")
        panel.set_ylabel(label)
        panel.legend()
    try:
        figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another file") from None

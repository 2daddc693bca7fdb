"""What two reports can be compared by: facts that must agree, those worth a note, exact figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from edgespec.bench_figures import texts_different
from edgespec.bench_report import ModelFacts, Prediction, Report
from edgespec.errors import InputError

CACHE = ("contract", "budget", "block", "policy", "sinks", "recent", "buckets", "positions")
LABELS = {
    "bytes_weights": "weights a call",
    "rows": "cache rows",
    "numbers_activations": "activations a call",
    "ops_weights": "operations a call",
}
UNITS = {"bytes": "bytes", "rows": "rows", "numbers": "numbers", "ops": "operations"}
DEVICE = (
    ("tokens_per_s", "speculative decoding", "tokens/s", "more"),
    ("plain_tokens_per_s", "plain decoding", "tokens/s", "more"),
    ("time_first_token_s", "time to first token", "s", "less"),
    ("bytes_memory", "peak memory", "bytes", "less"),
)


@dataclass(frozen=True)
class Exact:
    """A figure without noise in both reports; None where one of them lacks it."""

    metric: str
    kind: str
    unit: str
    better: str
    base: float | None
    new: float | None


def refuse_different(base: Report, new: Report) -> None:
    """InputError for reports that are not of the same model, cache, graphs, device and prompts."""
    if different := differences(base, new):
        raise InputError(
            f"the reports are of different bundles or prompts: {'; '.join(different[:3])}",
            "compare reports of the same model, cache and prompts, or make a new base: edgespec bench",
        )


def differences(base: Report, new: Report) -> list[str]:
    """Every fact in which two reports are not comparable, as `what is X in the base and Y in the new one`."""
    facts: list[tuple[str, object, object]] = [("device", base.bundle.device, new.bundle.device)]
    models = [{m.name: m for m in r.bundle.models} for r in (base, new)]
    facts.append(("models", " and ".join(models[0]), " and ".join(models[1])))
    for name in (n for n in models[0] if n in models[1]):  # in order: the message is the same every time
        facts += _model(models[0][name], models[1][name])
    for name in ("suite", "prompts", "prompts_sha256", "tokens"):
        facts.append((name, getattr(base.settings, name), getattr(new.settings, name)))
    theirs = graphs(new)
    facts += [(f"graph {name}", "there", "missing") for name in graphs(base) if name not in theirs]
    return [
        f"{what} is {short(a)} in the base and {short(b)} in the new one" for what, a, b in facts if a != b
    ]


def _model(base: ModelFacts, new: ModelFacts) -> list[tuple[str, object, object]]:
    spec = [f"spec.{f.name}" for f in fields(base.spec)]
    names = [*spec, *(f"cache.{name}" for name in CACHE), "head_rows"]
    return [(f"{base.name}.{name}", _of(base, name), _of(new, name)) for name in names]


def _of(value: object, path: str) -> object:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def short(value: object) -> str:
    """A value in few letters."""
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def notes(base: Report, new: Report) -> tuple[str, ...]:
    """What differs between the reports, counts in no verdict, and may explain one."""
    pairs: list[tuple[str, object, object]] = []
    for name in ("drafter", "stop_rule", "draft_tokens", "threads", "costs", "rounds"):
        pairs.append((name, getattr(base.settings, name), getattr(new.settings, name)))
    here, there = base.environment, new.environment
    if here.cpu:  # a baseline tells nothing of the machine that made it
        pairs += [(name, getattr(here, name), getattr(there, name)) for name in ("cpu", "governor")]
        for name in dict.fromkeys([*here.packages, *there.packages]):
            pairs.append((name, here.packages.get(name, "none"), there.packages.get(name, "none")))
    theirs = {m.name: m for m in new.bundle.models}
    for m in base.bundle.models:
        pairs.append((f"{m.name} precision", m.precision, theirs[m.name].precision))
        pairs.append((f"{m.name} weights", m.weights_sha256, theirs[m.name].weights_sha256))
    return tuple(
        f"{what}: {short(a)} in the base, {short(b)} in the new one" for what, a, b in pairs if a != b
    )


def counted(base: Report, new: Report) -> list[Exact]:
    """What a call of each graph moves and computes, and what each model keeps in memory."""
    theirs = graphs(new)
    found = []
    for name, figures in graphs(base).items():
        for what, (unit, value) in figures.items():
            other = theirs.get(name, {}).get(what, (unit, None))[1]
            found.append(Exact(f"{name}: {what}", "counted", unit, "less", value, other))
    return found


def graphs(report: Report) -> dict[str, dict[str, tuple[str, float]]]:
    """Each graph's figures by name, with their units; a model's own under its name."""
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for model in report.counted:
        owner = model.facts["name"]
        held = ("bytes_weights", "weights and graphs in memory"), ("bytes_policy", "kept for the policy")
        found[owner] = {what: ("bytes", model.facts[name]) for name, what in held}
        for s in model.steps:
            figures = {name: value for name, value in s.figures.items() if name != "width"}
            found[f"{owner} {s.kind} {s.width}, budget {s.bucket}"] = {
                LABELS.get(name, name): (UNITS.get(name.split("_")[0], ""), value)
                for name, value in figures.items()
            }
        for p in model.policy:
            found[f"{owner} {p.kind}, budget {p.bucket}"] = {"numbers a layer": ("numbers", p.numbers)}
    return found


def predicted(base: Sequence[Prediction], new: Sequence[Prediction]) -> list[Exact]:
    """What the base's traces come to on a device, on the base's graphs and on the new ones."""
    found = []
    for old, now in zip(base, new, strict=True):
        for name, what, unit, better in DEVICE:
            figures = getattr(old, name), getattr(now, name)
            found.append(Exact(f"{old.profile}: {what}", "predicted", unit, better, *figures))
    return found


def texts(base: Report, new: Report) -> Exact:
    """Speculation must leave every text as it is."""
    counts = (len(texts_different(report.samples)) for report in (base, new))
    return Exact(
        "prompts whose speculative text differs from the plain one", "counted", "prompts", "less", *counts
    )

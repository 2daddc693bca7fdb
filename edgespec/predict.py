"""What a report's traces come to on devices: every prompt's trace replayed under each profile. Deterministic.

Takes what a report holds: a base's traces are replayed over a new bundle's graphs without either bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import get_type_hints

from edgespec.bench_report import Counted, CountedPolicy, CountedStep, Prediction, Share, Traced
from edgespec.errors import BundleError, InputError
from edgespec.plain import from_json
from edgespec.profiles import Profile
from edgespec.replay import Replay, replay_work
from edgespec.samples import median
from edgespec.trace import Call, Round, Trace, parse_trace
from edgespec.work import ModelWork, Step

GRAPHS = ("steps", "policy")
Works = Mapping[str, ModelWork]


def counted(work: ModelWork) -> Counted:
    """A model's work as plain data."""
    facts = {name: value for name, value in asdict(work).items() if name not in GRAPHS}
    steps = tuple(CountedStep(*key, asdict(step)) for key, step in sorted(work.steps.items()))
    policy = tuple(CountedPolicy(*key, numbers) for key, numbers in sorted(work.policy.items()))
    return Counted(facts, steps, policy)


def works(models: Iterable[Counted]) -> dict[str, ModelWork]:
    """What `counted` made plain; InputError where a fact is of another type."""
    hints = {name: hint for name, hint in get_type_hints(ModelWork).items() if name not in GRAPHS}
    found = {}
    for model in models:
        try:
            facts = {name: from_json(hint, model.facts.get(name), name) for name, hint in hints.items()}
            steps = {(s.kind, s.width, s.bucket): from_json(Step, s.figures, s.kind) for s in model.steps}
        except BundleError as error:
            raise InputError(f"counted facts of a report: {error.message}", "make the report again") from None
        policy = {(p.kind, p.bucket): p.numbers for p in model.policy}
        found[facts["name"]] = ModelWork(**facts, steps=steps, policy=policy)
    return found


def predict(traces: Sequence[Traced], models: Works, profiles: Sequence[Profile]) -> tuple[Prediction, ...]:
    """Each device's figures, from the traces whose drafts its costs ended, or else from the runtime's own.

    InputError for a trace that cannot be read or replayed over these graphs.
    """
    read = [(t.device, t.category, parsed(t)) for t in traces]
    found = []
    for profile in profiles:
        own = profile.name if any(device == profile.name for device, *_ in read) else ""
        decided = [(category, trace) for device, category, trace in read if device == own]
        found.append(_predict(decided, models, profile))
    return tuple(found)


def parsed(traced: Traced) -> Trace:
    """A prompt's trace, checked."""
    return parse_trace((json.dumps(event) for event in traced.events), f"the trace of {traced.prompt}")


def _predict(traces: Sequence[tuple[str, Trace]], models: Works, profile: Profile) -> Prediction:
    runs = [(category, replay_work(trace, profile, models)) for category, trace in traces]
    one = narrowest(trace for _, trace in traces)
    plain = [replay_work(plainly(trace, one), profile, models) for _, trace in traces]
    replays = [run for _, run in runs]
    joules = [r.energy_j for r in replays if r.energy_j is not None]
    tokens = sum(r.tokens_new for r in replays)
    names = dict.fromkeys(category for category, _ in runs)
    return Prediction(
        profile.name,
        profile.kind,
        speed(replays),
        speed(plain),
        median([r.ttft_s for r in replays]),
        max(r.memory.bytes_peak for r in replays),
        replays[0].memory.fits,
        sum(joules) / tokens if len(joules) == len(replays) and tokens else None,
        max(replays, key=lambda r: r.tokens_drafted).decided_by,
        {name: speed([r for category, r in runs if category == name]) for name in names},
        _shares(replays),
    )


def speed(replays: Sequence[Replay]) -> float:
    """Tokens after each turn's first, those of verify calls, over the seconds that they took."""
    seconds = sum(r.decode_s for r in replays)
    return sum(round(r.block_efficiency * r.rounds) for r in replays) / seconds if seconds else 0.0


def _shares(replays: Sequence[Replay]) -> tuple[Share, ...]:
    times: dict[str, float] = {}
    for part in (part for r in replays for part in r.parts):
        name = f"{part.model} {part.kind}"
        times[name] = times.get(name, 0.0) + part.time_s
    return tuple(Share(name, time) for name, time in sorted(times.items(), key=lambda item: -item[1]))


def narrowest(traces: Iterable[Trace]) -> Call:
    """The target's narrowest decoding call in the traces: what a plain token takes."""
    calls = [c for t in traces for turn in t.turns for r in turn.rounds for c in r.calls]
    ours = [c for c in calls if c.model == "target" and c.kind in ("decode", "verify")]
    if not ours:
        return Call("target", "decode", 1, 1, 0.0)
    return replace(min(ours, key=lambda c: c.width), rows=1, time_s=0.0)


def plainly(trace: Trace, one: Call) -> Trace:
    """The same tokens without any draft, one a call; commits stay after the tokens that they followed."""
    turns = []
    for turn in trace.turns:
        rounds: list[Round] = []
        for r in turn.rounds:
            commits = tuple(c for c in r.calls if c.model == "target" and c.kind not in ("decode", "verify"))
            if not r.calls:
                rounds.append(r)
                continue
            rounds += [Round((token,), 0, 0, "none", "none", (one,)) for token in r.tokens]
            rounds[-1] = replace(rounds[-1], calls=(one, *commits))
        calls = tuple(c for c in turn.calls if c.model == "target")
        turns.append(replace(turn, calls=calls, rounds=tuple(rounds)))
    return replace(trace, turns=tuple(turns), lines=())

"""A recorded conversation on another device: its trace replayed call by call under a profile.

The same trace, profile and bundle give the same figures to the last bit. What was drafted and accepted is
the trace's: a device whose costs differ might draft otherwise, which `decided_by` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgespec.bundle import Bundle
from edgespec.errors import InputError
from edgespec.latency import Times, call_time, copy_time, sample_time
from edgespec.memory import Memory, memory
from edgespec.profiles import Profile
from edgespec.spec import STEPS, VISION
from edgespec.trace import UNKNOWN, Call, Round, Trace, Turn
from edgespec.work import ModelWork, Work, of_bundle

SCHEMA = "edgespec.replay/1"
HOST = "host"
NOTHING = Work(0, 0, 0, 0, 0, "float")


@dataclass(frozen=True)
class Part:
    """All calls of a graph: how many, what they took and moved. `model` host: copies and sampling."""

    model: str
    kind: str
    width: int
    calls: int
    time_s: float
    bytes_weights: float
    bytes_kv: float
    bytes_activations: float
    ops: float


@dataclass(frozen=True)
class Replay:
    """A conversation as a device would have run it. `ttft_s` is the first turn's; `tokens_per_s` counts
    tokens after each turn's first. `resources` splits all time by what it waits for.
    """

    profile: str
    table: str
    decided_by: str
    tokens_prompt: int
    tokens_new: int
    rounds: int
    tokens_drafted: int
    tokens_accepted: int
    block_efficiency: float
    ttft_s: float
    prompt_s: float
    decode_s: float
    tokens_per_s: float
    bytes_moved: float
    energy_j: float | None
    parts: tuple[Part, ...]
    resources: dict[str, float]
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data, and the milliseconds and bytes that reports name."""
        named = {"ttft_ms": self.ttft_s * 1e3, "memory_bytes": self.memory.bytes_peak}
        return {"schema": SCHEMA, **asdict(self), **named}


def replay(trace: Trace, profile: Profile, bundle: Bundle) -> Replay:
    """The trace replayed under the profile, over the bundle it was recorded with."""
    return replay_work(trace, profile, of_bundle(bundle))


def replay_work(trace: Trace, profile: Profile, models: Mapping[str, ModelWork]) -> Replay:
    """The same over models that are counted already."""
    return Running(profile, models, trace.temperature).all(trace).result(trace)


def walk(trace: Trace, profile: Profile, models: Mapping[str, ModelWork]) -> tuple[tuple[Call, Work], ...]:
    """Every call of the trace beside what it moves and computes there."""
    return tuple(Running(profile, models, trace.temperature).all(trace).works)


def _decided_by(trace: Trace, profile: Profile) -> str:
    """By whose call costs drafts were ended: only the cost rule asks for any."""
    if not any(one.drafted for turn in trace.turns for one in turn.rounds):
        return "nobody: nothing was drafted"
    if trace.stop_rule not in ("cost", UNKNOWN):
        return f"the rule {trace.stop_rule}, whatever calls cost"
    return "this profile" if trace.table == f"profile {profile.name}" else f"another table: {trace.table}"


@dataclass
class _Filled:
    """How far a model's cache is filled while a trace is replayed; the first `settled` rows cannot be taken
    back one by one.
    """

    bucket: int
    smallest: int
    count: int = 0
    position: int = 0
    settled: int = 0

    def cut(self, tokens: int) -> None:
        """Hold no more than so many tokens, as the runtime does: take rows back, or absorb all again."""
        away = self.position - max(0, tokens)
        if away > self.count - self.settled:
            self.count = self.position = self.settled = 0
            self.bucket = self.smallest
        elif away > 0:
            self.count, self.position = self.count - away, self.position - away


class Running:
    """A replay under way: clocks, and how far every cache is filled."""

    def __init__(self, profile: Profile, models: Mapping[str, ModelWork], temperature: float = 0.0) -> None:
        self.profile, self.models, self.temperature = profile, models, temperature
        self.float = profile.bytes_float.value
        self.filled = {name: _Filled(m.buckets[0], m.buckets[0]) for name, m in models.items()}
        self.parts: dict[tuple[str, str, int], Part] = {}
        self.total, self.turn_s, self.decode_s, self.prompts = Times(), 0.0, 0.0, list[float]()
        self.history = self.answered = self.unheard = 0  # unheard: of the history, what a draft does not hold
        self.works: list[tuple[Call, Work]] = []

    def all(self, trace: Trace) -> Running:
        """Itself, after every turn of the trace."""
        for turn in trace.turns:
            self.turn(turn)
        return self

    def turn(self, turn: Turn) -> tuple[float, float]:
        """One more turn: the seconds to its first token, and those of the tokens after it."""
        count, decode_s = len(self.prompts), self.decode_s
        self._prompt(turn)
        for number, one in enumerate(turn.rounds):
            self._round(one, first=number == 0 and not one.calls)
        self._end_of_turn()
        return sum(self.prompts[count:]), self.decode_s - decode_s

    def _prompt(self, turn: Turn) -> None:
        """A request's prompt; its first token is chosen in the round without calls that follows."""
        if turn.known is not None:
            back, self.history = turn.known < self.history, turn.known
            for name, at in self.filled.items() if back else ():
                at.cut(self.history - 1 - (turn.unheard[0] if name == "draft" else 0))
        self.history += turn.tokens_prompt
        self.unheard = turn.unheard[1]
        for call in turn.calls:
            self.turn_s += self._call(call, None)

    def _round(self, one: Round, first: bool) -> None:
        """One round; the first of a turn ends the time to the first token."""
        spent = sum(self._call(call, len(one.tokens)) for call in one.calls)
        rows = max((c.width for c in one.calls if c.kind in ("verify", "decode")), default=1)
        time = sample_time(rows, self.models["target"], self.profile, self.temperature)
        spent += self._add((HOST, "sampling", 0), time, NOTHING)
        self.history += len(one.tokens)
        if first:
            self.turn_s += spent
            self._end_of_turn()
        else:
            self.answered += len(one.tokens)
            self.decode_s += spent

    def _end_of_turn(self) -> None:
        """Close the prompt's clock, where it runs."""
        if self.turn_s:
            self.prompts.append(self.turn_s)
            self.turn_s = 0.0

    def result(self, trace: Trace) -> Replay:
        """What the trace came to."""
        rounds = [r for turn in trace.turns for r in turn.rounds]
        verified = [r for r in rounds if r.calls]
        moved = sum(p.bytes_weights + p.bytes_kv + p.bytes_activations for p in self.parts.values())
        joules = self.profile.value("energy_j_per_byte")
        return Replay(
            self.profile.name,
            trace.table,
            _decided_by(trace, self.profile),
            sum(turn.tokens_prompt for turn in trace.turns),
            sum(len(r.tokens) for r in rounds),
            len(verified),
            sum(r.drafted for r in rounds),
            sum(r.accepted for r in rounds),
            self.answered / len(verified) if verified else 0.0,
            self.prompts[0] if self.prompts else 0.0,
            sum(self.prompts),
            self.decode_s,
            self.answered / self.decode_s if self.decode_s else 0.0,
            moved,
            None if joules is None else moved * joules,
            tuple(self.parts[key] for key in sorted(self.parts)),
            self.total.by_resource(),
            memory(self.models, self.profile),
        )

    def _call(self, call: Call, emitted: int | None) -> float:
        """One call of the trace: its time, and how far it fills a cache. `emitted`: a round's tokens,
        which are the rows that a target's call leaves in its cache; None in a prompt, where all stay.
        """
        if call.model not in self.models:
            hint = "replay a trace with the bundle that it was recorded with"
            raise InputError(f"the trace calls a {call.model}, which the bundle lacks", hint)
        model, at = self.models[call.model], self.filled[call.model]
        key = (call.model, call.kind, call.width)
        if call.kind == VISION:
            work = model.call(call.kind, call.width, 0, 0, self.float)
            self.works.append((call, work))
            return self._add(key, call_time(work, self.profile), work)
        if call.kind not in STEPS:
            work = model.policy_call(call.kind, at.bucket, self.float)
            self.works.append((call, work))
            spent = self._add(key, call_time(work, self.profile), work)
            if call.kind == "commit":
                spent += self._commit(model, at)
            if call.kind != "context":  # which only looks head rows up: what a draft drafted may still go
                at.settled = at.count
            return spent
        spent = self._fit(model, at, call.rows)
        work = model.call(call.kind, call.width, at.bucket, at.count, self.float)
        self.works.append((call, work))
        spent += self._add(key, call_time(work, self.profile), work)
        verified = emitted if call.model == "target" else None
        kept = call.rows if verified is None else min(verified, call.rows)
        at.count, at.position = at.count + kept, at.position + kept
        if not model.appends:
            spent += self._copy(kept, model)
        if verified is not None and "draft" in self.filled:
            self.filled["draft"].cut(self.history - self.unheard + verified - 1)
        return spent

    def _commit(self, model: ModelWork, at: _Filled) -> float:
        """The rows that stay move to the front; a commit of a cache that is not full is of another bundle."""
        slots = model.budget + model.block
        if at.count != slots:
            what = f"the trace commits the {model.name}'s cache at {at.count} rows, which is full at {slots}"
            raise InputError(what, "replay a whole trace, with the bundle that it was recorded with")
        at.count = model.budget
        return self._copy(model.budget, model)

    def _fit(self, model: ModelWork, at: _Filled, rows: int) -> float:
        """Move to a larger bucket where the call needs it; the filled rows are re-laid."""
        bucket = max(at.bucket, model.bucket(at.count + rows))
        if bucket == at.bucket:
            return 0.0
        at.bucket = bucket
        return self._copy(at.count, model)

    def _copy(self, rows: int, model: ModelWork) -> float:
        return self._add((HOST, "copies", 0), copy_time(rows, model, self.profile), NOTHING)

    def _add(self, key: tuple[str, str, int], time: Times, work: Work) -> float:
        part = self.parts.get(key) or Part(*key, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.parts[key] = replace(
            part,
            calls=part.calls + 1,
            time_s=part.time_s + time.total_s,
            bytes_weights=part.bytes_weights + work.bytes_weights,
            bytes_kv=part.bytes_kv + work.bytes_kv,
            bytes_activations=part.bytes_activations + work.bytes_activations,
            ops=part.ops + work.ops,
        )
        self.total += time
        return time.total_s

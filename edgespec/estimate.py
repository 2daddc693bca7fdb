"""What a model takes on a device: a token, a prompt and memory, plainly or with speculation. Pure sums.

Speculation at width S: S-1 draft calls, one verify call of S rows, BE tokens emitted; where each drafted
token is accepted with probability p, BE = (1 - p^S)/(1 - p).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgespec.errors import InputError
from edgespec.latency import RESOURCES, Times, call_time, copy_time, sample_time
from edgespec.memory import Memory, memory
from edgespec.profiles import Profile
from edgespec.spec import VISION
from edgespec.work import ModelWork, Work

SCHEMA = "edgespec.estimate/1"


@dataclass(frozen=True)
class Line:
    """One kind of call: how often in a round (or in the prompt), and what all of those take and move."""

    name: str
    calls: float
    time_s: float
    bytes_moved: float


@dataclass(frozen=True)
class Estimate:
    """A model on a device. `bytes_moved` is of one token; `mbsu` = BE/(1 + c·drafts), c = the draft's bytes
    of weights read a call against the target's. `resources` are a round's seconds by what it waits for.
    """

    profile: str
    precision: str
    context: int
    prompt: int
    width: int
    block_efficiency: float
    tokens_per_s: float
    plain_tokens_per_s: float
    ttft_s: float
    bytes_moved: float
    c: float
    mbsu: float
    prompt_lines: tuple[Line, ...]
    round_lines: tuple[Line, ...]
    resources: dict[str, float]
    memory: Memory
    energy_j_per_token: float | None

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data, and the milliseconds and bytes that reports name."""
        named = {"ttft_ms": self.ttft_s * 1e3, "memory_bytes": self.memory.bytes_peak}
        return {**asdict(self), **named}


def block_efficiency(acceptance: float, width: int) -> float:
    """Tokens emitted a verify call where each drafted token is accepted with this probability."""
    return sum(acceptance**i for i in range(width))


def acceptance_of(be: float, width: int) -> float:
    """The probability that gives this block efficiency at this width, by bisection."""
    if not 1 <= be <= width:
        raise InputError(f"a block efficiency of {be:g} cannot be had at width {width}", "use 1 to the width")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if block_efficiency(middle, width) < be else (low, middle)
    return (low + high) / 2


def estimate(
    models: Mapping[str, ModelWork],
    profile: Profile,
    precision: str,
    context: int,
    prompt: int,
    width: int = 1,
    be: float = 1.0,
    images: int = 0,
) -> Estimate:
    """The target, with its draft where `width` is above 1 and there is one; else drafts cost nothing.

    `images`: pictures that the prompt has beside its words; each adds its own rows.
    """
    target, draft = models["target"], models.get("draft") if width > 1 else None
    round_ = _Sum(profile)
    _target_round(round_, target, context, width, be)
    plain = _Sum(profile)
    _target_round(plain, target, context, 1, 1.0)
    if draft:
        _draft_round(round_, draft, context, width, be)
    first = _Sum(profile)
    if eye := models.get(VISION):
        ((_, rows, _),) = eye.steps
        first.call("pictures", images, eye.call(VISION, rows, 0, 0, first.float))
        prompt += images * rows
    _prompt(first, target, prompt)
    first.add("sampling", 1, sample_time(1, target, profile, 0.0))
    c = _read(draft, "draft") / _read(target, "decode", "verify") if draft else 0.0
    joules, moved = profile.value("energy_j_per_byte"), round_.bytes_moved / be
    used = {name: model for name, model in models.items() if draft or name != "draft"}
    return Estimate(
        profile.name, precision, context, prompt, width, be, be / round_.times.total_s,
        1 / plain.times.total_s, first.times.total_s, moved, c, be / (1 + c * (width - 1)),
        tuple(first.named.values()), tuple(round_.named.values()), round_.times.by_resource(),
        memory(used, profile), None if joules is None else joules * moved,
    )  # fmt: skip


class _Sum:
    """Lines as they are added up."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.float = profile, profile.bytes_float.value
        self.named: dict[str, Line] = {}
        self.times, self.bytes_moved = Times(), 0.0

    def call(self, name: str, calls: float, work: Work) -> None:
        self.add(name, calls, call_time(work, self.profile), work.bytes_moved)

    def add(self, name: str, calls: float, time: Times, moved: float = 0.0) -> None:
        scaled = Times(*(getattr(time, f"{n}_s") * calls for n in RESOURCES))
        if scaled.total_s:
            old = self.named.get(name, Line(name, 0, 0.0, 0.0))
            spent, bytes_moved = old.time_s + scaled.total_s, old.bytes_moved + moved * calls
            self.named[name] = Line(name, old.calls + calls, spent, bytes_moved)
        self.times, self.bytes_moved = self.times + scaled, self.bytes_moved + moved * calls


def _target_round(out: _Sum, target: ModelWork, context: int, width: int, be: float) -> None:
    kind, size = _narrowest(target, width)
    _step(out, f"{kind} {size}" if kind == "verify" else kind, 1, target, kind, size, context)
    _bookkeeping(out, target, context, be)
    out.add("sampling", 1, sample_time(size, target, out.profile, 0.0))


def _draft_round(out: _Sum, draft: ModelWork, context: int, width: int, be: float) -> None:
    _step(out, "draft", width - 1, draft, "draft", draft.widths("draft")[-1], context)
    _bookkeeping(out, draft, context, be)


def _step(out: _Sum, name: str, calls: float, model: ModelWork, kind: str, width: int, context: int) -> None:
    filled = _filled(model, context)
    out.call(name, calls, model.call(kind, width, model.bucket(int(filled)), int(filled), out.float))


def _bookkeeping(out: _Sum, model: ModelWork, context: int, tokens: float) -> None:
    """The commits that so many tokens cause, and the copies of their rows."""
    if context > model.budget + model.block:
        share = tokens / model.block
        out.call(f"commit of the {model.name}", share, model.policy_call("commit", model.budget, out.float))
        out.add(f"copies of the {model.name}", share, copy_time(model.budget, model, out.profile))
    if not model.appends:
        out.add(f"copies of the {model.name}", tokens, copy_time(1, model, out.profile))


def _filled(model: ModelWork, context: int) -> float:
    """Rows in the cache: all, or, once it evicts, half-way between two commits."""
    return context if context <= model.budget + model.block else model.budget + model.block / 2


def _narrowest(model: ModelWork, width: int) -> tuple[str, int]:
    """The narrowest target graph that holds so many rows."""
    if width == 1 and model.widths("decode"):
        return "decode", 1
    fitting = [w for w in model.widths("verify") if w >= width]
    if not fitting:
        have = ", ".join(map(str, model.widths("verify")))
        raise InputError(f"no verify graph holds {width} rows (widths: {have})", "use a smaller --width")
    return "verify", fitting[0]


def _prompt(out: _Sum, target: ModelWork, prompt: int) -> None:
    """Prefill calls, block by block, with the commits between them."""
    width, count, left = target.widths("prefill")[-1], 0, prompt
    while left > 0:
        rows = min(width, left, target.budget + target.block - count)
        bucket = target.bucket(count + rows)
        out.call("prefill", 1, target.call("prefill", width, bucket, count, out.float))
        count, left = count + rows, left - rows
        if not target.appends:
            out.add("copies of the target", rows, copy_time(1, target, out.profile))
        if count == target.budget + target.block:
            out.call("commit of the target", 1, target.policy_call("commit", target.budget, out.float))
            out.add("copies of the target", 1, copy_time(target.budget, target, out.profile))
            count = target.budget


def _read(model: ModelWork, *kinds: str) -> float:
    """Bytes of weights that the narrowest call of the first of these kinds reads."""
    found = [step for kind in kinds for key, step in sorted(model.steps.items()) if key[0] == kind]
    return found[0].bytes_weights

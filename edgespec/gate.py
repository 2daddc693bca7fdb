"""The gate's rules: two reports in, a verdict for every figure out. Pure: no files, no clock, seeded chance.

Three kinds of figures, judged differently:
- counted and predicted (bytes of a call; a trace replayed under a profile): they are exact, any worse figure
  is a regression;
- measured: only of reports that were measured in turns, by an interval of the paired ratio. The pairs are
  processes, not prompts: what one process answers shares its luck, and is no independent evidence;
- block efficiency: follows from the tokens accepted, which another processor's arithmetic may change, so
  paired by prompt and judged with a tolerance, wherever it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgespec.bench_figures import SHORTEST, by_key, memory_by_process
from edgespec.bench_report import PLAIN, SPECULATIVE, Report, Sample
from edgespec.gate_facts import Exact, counted, notes, refuse_different, texts
from edgespec.samples import CONFIDENCE, interval, median, midmean

REGRESSION, IMPROVEMENT, UNCHANGED, UNKNOWN = "regression", "improvement", "unchanged", "not enough data"
VERDICTS = (REGRESSION, IMPROVEMENT, UNKNOWN, UNCHANGED)
FEWEST = 8  # pairs from which 99 % means something: even a median's interval needs 1 - 2 / 2^8


@dataclass(frozen=True)
class Rules:
    """How much worse fails: measured figures, and block efficiency; both as a share (0.03 is 3 %)."""

    fail_over: float = 0.03
    be_tolerance: float = 0.05


@dataclass(frozen=True)
class Row:
    """One figure in both reports. `change` is new / base - 1; `low` and `high` its interval if measured.

    `better`: which direction is good, `less` or `more`. `reason` says why the verdict is what it is.
    """

    metric: str
    kind: str
    unit: str
    better: str
    base: float | None
    new: float | None
    change: float | None
    low: float | None
    high: float | None
    pairs: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All rows, those that changed first, and remarks on what differs but does not count."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    rules: Rules

    @property
    def passed(self) -> bool:
        """True where nothing got worse."""
        return not self.of(REGRESSION)

    def of(self, verdict: str) -> tuple[Row, ...]:
        """The rows with a verdict."""
        return tuple(row for row in self.rows if row.verdict == verdict)


def compare(base: Report, new: Report, predicted: Sequence[Exact], rules: Rules) -> Verdict:
    """A verdict for every figure of two comparable reports; InputError says in what they are not.

    `predicted`: what the replays of the base's trace give on both bundles.
    """
    refuse_different(base, new)
    rows = [exact(e) for e in (*counted(base, new), *predicted, texts(base, new))]
    rows += measured(base, new, rules)
    rows.append(block_efficiency(base, new, rules))
    return Verdict(tuple(sorted(rows, key=lambda r: VERDICTS.index(r.verdict))), notes(base, new), rules)


def exact(e: Exact) -> Row:
    """A figure without noise: the same, better or worse."""
    if e.base is None or e.new is None:
        where = "base" if e.base is None else "new report"
        return _row(e, None, UNKNOWN, f"the {where} lacks it")
    change = e.new / e.base - 1 if e.base else (0.0 if e.new == e.base else None)
    if e.new == e.base:
        return _row(e, change, UNCHANGED, "exactly the same")
    worse = (e.new > e.base) == (e.better == "less")
    return _row(e, change, REGRESSION if worse else IMPROVEMENT, f"{e.kind}: exact, no noise")


def _row(e: Exact, change: float | None, verdict: str, reason: str) -> Row:
    return Row(e.metric, e.kind, e.unit, e.better, e.base, e.new, change, None, None, 0, verdict, reason)


def measured(base: Report, new: Report, rules: Rules) -> list[Row]:
    """Speeds, time to the first token and memory, by process; judged only where the runs took turns."""
    together = base.run == new.run
    rows = []
    for way in (PLAIN, SPECULATIVE):
        pairs = by_process(base, new, (way,), lambda s: s.time_decode_s / max(s.tokens_decoded, 1), SHORTEST)
        rows.append(paired(f"{way} decoding, s/token", "s", "less", pairs, rules.fail_over, together))
    pairs = by_process(base, new, (PLAIN, SPECULATIVE), lambda s: s.time_first_token_s, 0)
    rows.append(paired("time to first token", "s", "less", pairs, rules.fail_over, together))
    peaks, theirs = memory_by_process(base), memory_by_process(new)
    both = [(float(peak), float(theirs[n])) for n, peak in peaks.items() if peak and theirs.get(n)]
    rows.append(paired("peak memory of the process", "bytes", "less", both, rules.fail_over, together))
    return rows


def by_process(
    base: Report, new: Report, ways: Sequence[str], figure: Callable[[Sample], float], shortest: int
) -> list[tuple[float, float]]:
    """Base and new figure of each process; their ratio is the middle of its prompts' ratios, in all ways."""
    found: dict[int, list[tuple[float, float]]] = {}
    for way in ways:
        theirs = by_key(new.samples, way)
        for key, s in by_key(base.samples, way).items():
            other = theirs.get(key)
            if other and min(s.tokens_decoded, other.tokens_decoded) >= shortest:
                found.setdefault(s.process, []).append((figure(s), figure(other)))
    whole = ([(a, b) for a, b in pairs if a > 0 and b > 0] for pairs in found.values())
    both = ((median([a for a, _ in pairs]), midmean([b / a for a, b in pairs])) for pairs in whole if pairs)
    return [(a, a * ratio) for a, ratio in both]


def paired(
    metric: str, unit: str, better: str, pairs: list[tuple[float, float]], limit: float, together: bool
) -> Row:
    """A measured figure: the middle of its pairs' ratios, and a verdict by that ratio's interval."""
    if not pairs:
        return Row(
            metric, "measured", unit, better, None, None, None, None, None, 0, UNKNOWN, "no pair of samples"
        )
    ratios = [b / a for a, b in pairs]
    change = midmean(ratios) - 1
    low, high = (value - 1 for value in interval(ratios, midmean))
    verdict, reason = judged(change, low, high, better, limit, len(pairs))
    if not together:
        verdict, reason = UNKNOWN, "not measured in turns: edgespec bench NEW --against BASE does"
    figures = median([a for a, _ in pairs]), median([b for _, b in pairs])
    return Row(metric, "measured", unit, better, *figures, change, low, high, len(pairs), verdict, reason)


def block_efficiency(base: Report, new: Report, rules: Rules) -> Row:
    """Tokens decoded / verify calls over all answers, with the interval over prompts."""
    theirs = by_key(new.samples, SPECULATIVE)
    pairs = [
        (s.tokens_decoded, s.verify_calls, theirs[key].tokens_decoded, theirs[key].verify_calls)
        for key, s in by_key(base.samples, SPECULATIVE).items()
        if key in theirs and key[1] == 0 and min(s.verify_calls, theirs[key].verify_calls) > 0
    ]
    name = "block efficiency, fresh"
    if not pairs:
        return Row(
            name, "measured", "", "more", None, None, None, None, None, 0, UNKNOWN, "no pair of samples"
        )

    def ratio(found: Sequence[tuple[int, int, int, int]]) -> float:
        tokens, calls, new_tokens, new_calls = (sum(p[i] for p in found) for i in range(4))
        return (new_tokens / new_calls) / (tokens / calls) if tokens else math.inf

    change = ratio(pairs) - 1
    low, high = (value - 1 for value in interval(pairs, ratio))
    verdict, reason = judged(change, low, high, "more", rules.be_tolerance, len(pairs))
    old, now = (sum(p[i] for p in pairs) / sum(p[i + 1] for p in pairs) for i in (0, 2))
    return Row(name, "measured", "", "more", old, now, change, low, high, len(pairs), verdict, reason)


def judged(change: float, low: float, high: float, better: str, limit: float, pairs: int) -> tuple[str, str]:
    """The verdict and why: an interval wholly beyond the limit is a change, wholly within it none."""
    worse, best = (low, high) if better == "less" else (-high, -low)
    allowed = f"{limit * 100:g} %"
    text = f"{low:+.1%} to {high:+.1%} ({CONFIDENCE:.0%}, {pairs} pairs)"
    if low == high == 0.0:
        return UNCHANGED, f"the same in {pairs} pairs"
    if pairs < FEWEST:
        return UNKNOWN, f"{pairs} pairs, fewer than {FEWEST}"
    if worse > limit:
        return REGRESSION, f"worse by more than {allowed}: {text}"
    if best < -limit:
        return IMPROVEMENT, f"better by more than {allowed}: {text}"
    if worse >= -limit and best <= limit:
        return UNCHANGED, f"within {allowed}: {text}"
    needed = _needed(change, low, high, limit, pairs)
    return UNKNOWN, f"undecided at {allowed}: {text}; about {needed} pairs would tell"


def _needed(change: float, low: float, high: float, limit: float, pairs: int) -> int:
    """Pairs after which the interval would no longer straddle a limit, at the present estimate."""
    gap = max(min(abs(change - limit), abs(change + limit)), limit / 10, 1e-3)
    return min(math.ceil(pairs * max(1.0, (max(high - change, change - low) / gap) ** 2)), 100_000)

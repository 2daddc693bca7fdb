"""What an evaluation found: means with their errors, paired differences, who loses to whom, advice.

A context of one seed is one observation: its questions share a cache. Differences are paired by context.
Every cost is in nats, and lower is better: for `text` the KL from the un-evicted model, for a task with
answers the answer's mean -log p (a row's is above the un-evicted model's). No figure averages tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from edgespec.evaluation_log import Score
from edgespec.evaluation_plan import PLAIN, REFERENCE, Cell, Plan, queries
from edgespec.spec import ModelEntry

SCHEMA = "edgespec.eval/1"
ABLE = 0.5  # a task is informative where the un-evicted model gets as many answers right
LABELS = {"none": "none (un-evicted)", "lru": "lru (protection only)"}


@dataclass(frozen=True)
class Mean:
    """A mean over contexts and its standard error, None of one context."""

    mean: float
    error: float | None
    contexts: int


@dataclass(frozen=True)
class AtDepth:
    """A policy's answers at one depth: the share of right ones, and the mean -log p in nats."""

    depth: float
    accuracy: float
    nll: float
    questions: int


@dataclass(frozen=True)
class Row:
    """A policy on a task at a length and budget (in %; `rows` is N). `accuracy` is None for text.

    `cost` is paired with the un-evicted model. Not `informative`: the un-evicted model cannot do the task.
    """

    length: int
    budget: int
    rows: int
    policy: str
    task: str
    accuracy: Mean | None
    nll: Mean
    kl: Mean
    cost: Mean
    informative: bool
    depths: tuple[AtDepth, ...]


@dataclass(frozen=True)
class Comparison:
    """By how many nats a policy does worse than another (negative: better), paired by context.

    `fewer` is the share of answers that it gets right less; None for text.
    """

    length: int
    budget: int
    task: str
    policy: str
    than: str
    worse: Mean
    fewer: Mean | None
    informative: bool

    @property
    def losses(self) -> list[str]:
        """By what it is worse, where that is more than the difference's standard error."""
        words = [f"{shown(self.worse)} nats"] if above(self.worse) else []
        if self.fewer and above(self.fewer):
            words.append(f"{shown(self.fewer)} of the answers")
        return words


@dataclass(frozen=True)
class Advice:
    """The policy to take at a budget, and why."""

    budget: int
    policy: str
    reason: str


@dataclass(frozen=True)
class EvalResult:
    """Everything that an evaluation found. `settings` are those that a rerun must repeat."""

    bundle: str
    settings: dict[str, Any]
    left_out: tuple[str, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    advice: tuple[Advice, ...]

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data; no times, so the same settings give the same bytes."""
        return asdict(self)

    def losses(self) -> list[str]:
        """A line for each pair of policies at a length and budget: what the first loses on, and by what."""
        lines: dict[tuple[Any, ...], list[str]] = {}
        for c in self.comparisons:
            if c.losses and c.informative and c.than != REFERENCE:
                key = (c.length, c.budget, c.policy, c.than)
                lines.setdefault(key, []).append(f"{c.task} by {' and '.join(c.losses)}")
        return [
            f"{budget} % of {length:,}: {policy} loses to {LABELS.get(than, than)} on {', '.join(words)}"
            for (length, budget, policy, than), words in lines.items()
        ]


def summarise(
    bundle: str,
    entry: ModelEntry,
    plan: Plan,
    settings: dict[str, Any],
    done: Mapping[Cell, tuple[Score, ...]],
) -> EvalResult:
    """The result of the cells that a plan asked for and a log holds."""
    rows, comparisons = [], []
    for length in plan.lengths:
        for task in plan.tasks:
            if Cell(task, length, 0, REFERENCE, 100) in done:
                series = Series(plan, task, length, done)
                rows += series.rows()
                comparisons += series.comparisons()
    rows.sort(key=lambda r: (r.length, r.budget != 100, r.budget))
    comparisons.sort(key=lambda c: (c.length, c.budget))
    needs = {name: queries(name, entry.cache) for name in plan.policies}
    budgets = sorted({budget for _, budget in plan.rows})
    advice = [advise(plan, needs, budget, done, rows) for budget in budgets]
    return EvalResult(bundle, settings, plan.left_out, tuple(rows), tuple(comparisons), tuple(advice))


class Series:
    """The scores of one task at one length, by policy, budget and context."""

    def __init__(self, plan: Plan, task: str, length: int, done: Mapping[Cell, tuple[Score, ...]]) -> None:
        self.plan, self.task, self.length, self.done = plan, task, length, done
        right = [s.right for scores in self.of(REFERENCE, 100) for s in scores]
        self.informative = task == "text" or fmean(right) >= ABLE

    def of(self, policy: str, budget: int) -> list[tuple[Score, ...]]:
        """Each context's scores."""
        return [
            self.done[Cell(self.task, self.length, seed, policy, budget)] for seed in range(self.plan.seeds)
        ]

    def costs(self, policy: str, budget: int) -> list[float]:
        """Each context's cost in nats: KL for text, -log p of the answers else."""
        part = "kl" if self.task == "text" else "nll"
        return [fmean(getattr(s, part) for s in scores) for scores in self.of(policy, budget)]

    def worse(self, policy: str, than: str, budget: int) -> Mean:
        """By how many nats a policy does worse than another one, paired."""
        theirs = self.costs(than, 100 if than == REFERENCE else budget)
        return mean([a - b for a, b in zip(self.costs(policy, budget), theirs, strict=True)])

    def right(self, policy: str, budget: int) -> list[float]:
        """Each context's share of right answers."""
        return [fmean(s.right for s in scores) for scores in self.of(policy, budget)]

    def fewer(self, policy: str, than: str, budget: int) -> Mean | None:
        """How much smaller a policy's share of right answers is than another one's, paired; None for text."""
        if self.task == "text":
            return None
        theirs = self.right(than, 100 if than == REFERENCE else budget)
        return mean([b - a for a, b in zip(self.right(policy, budget), theirs, strict=True)])

    def good(self, policy: str, budget: int) -> bool:
        """Within one standard error of the best policy in nats, and of the best one in right answers."""
        policies = self.plan.policies
        nearest = min(policies, key=lambda name: fmean(self.costs(name, budget)))
        surest = max(policies, key=lambda name: fmean(self.right(name, budget)))
        fewer = self.fewer(policy, surest, budget)
        return not above(self.worse(policy, nearest, budget)) and not (fewer and above(fewer))

    def rows(self) -> list[Row]:
        """The un-evicted model's row, then every policy's at every budget."""
        found = [self.row(REFERENCE, 100, self.length)]
        for budget in self.plan.budgets(self.length):
            kept = self.plan.rows[self.length, budget]
            found += [self.row(name, budget, kept) for name in self.plan.policies]
        return found

    def row(self, policy: str, budget: int, kept: int) -> Row:
        """One row of the table."""
        contexts = self.of(policy, budget)
        mean_of = lambda part: mean([fmean(getattr(s, part) for s in scores) for scores in contexts])  # noqa: E731
        return Row(
            self.length,
            budget,
            kept,
            policy,
            self.task,
            None if self.task == "text" else mean_of("right"),
            mean_of("nll"),
            mean_of("kl"),
            self.worse(policy, REFERENCE, budget),
            self.informative,
            by_depth([s for scores in contexts for s in scores]),
        )

    def comparisons(self) -> list[Comparison]:
        """Every policy against the un-evicted model, against what protects only, and against its base."""
        found = []
        for budget in self.plan.budgets(self.length):
            for name in self.plan.policies:
                for than in rivals(name, self.plan.policies):
                    pair = self.worse(name, than, budget), self.fewer(name, than, budget)
                    found.append(
                        Comparison(self.length, budget, self.task, name, than, *pair, self.informative)
                    )
        return found


def rivals(policy: str, policies: Sequence[str]) -> list[str]:
    """What a policy is compared with: `none`, `lru` and `sinks`, and the base in its brackets."""
    base = re.search(r"\((.+)\)", policy)
    names = dict.fromkeys([*PLAIN, *([base[1]] if base else [])])
    return [REFERENCE, *(n for n in names if n in policies and n != policy)]


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value for each context, and its standard error."""
    count = len(values)
    error = stdev(values) / math.sqrt(count) if count > 1 else None
    return Mean(fmean(values), error, count)


def above(value: Mean) -> bool:
    """Greater than 0 by more than its standard error."""
    return value.mean > (value.error or 0.0)


def by_depth(scores: Sequence[Score]) -> tuple[AtDepth, ...]:
    """The scores of each depth, where questions have one."""
    found = []
    for depth in sorted({s.depth for s in scores if s.depth is not None}):
        here = [s for s in scores if s.depth == depth]
        found.append(AtDepth(depth, fmean(s.right for s in here), fmean(s.nll for s in here), len(here)))
    return tuple(found)


def advise(
    plan: Plan,
    needs: Mapping[str, int],
    budget: int,
    done: Mapping[Cell, tuple[Score, ...]],
    rows: Sequence[Row],
) -> Advice:
    """The policy that is best, or within one standard error of the best, on most informative tasks.

    In nats and in right answers: the one must not hide the other. Every task at every length counts once.
    Ties go to a policy that needs no queries, then to the one that is best itself more often.
    """
    judged = {(r.task, r.length) for r in rows if r.budget == budget and r.informative}
    good: dict[str, list[str]] = {name: [] for name in plan.policies}
    first = dict.fromkeys(plan.policies, 0)
    for task, length in sorted(judged):
        series = Series(plan, task, length, done)
        best = min(plan.policies, key=lambda name: fmean(series.costs(name, budget)))
        first[best] += 1
        for name in plan.policies:
            if series.good(name, budget):
                good[name].append(f"{task} at {length:,}")
    if not judged:
        return Advice(budget, "", "the un-evicted model cannot do any of the tasks: use a better model")
    chosen = max(plan.policies, key=lambda name: (len(good[name]), needs[name] == 0, first[name]))
    if not good[chosen]:
        return Advice(budget, "", "no policy is near the best in nats and in right answers on any task")
    words = f"best or within one standard error of the best on {len(good[chosen])} of {len(judged)}"
    ties = [name for name in plan.policies if len(good[name]) == len(good[chosen]) and name != chosen]
    words += f" tasks and lengths ({', '.join(good[chosen])})"
    words += f"; as many as {', '.join(ties)}" if ties else ""
    missed = [f"{task} at {length:,}" for task, length in sorted(judged)]
    missed = [name for name in missed if name not in good[chosen]]
    words += f"; not on {', '.join(missed)}" if missed else ""
    words += "; it needs no stored queries" if not needs[chosen] else f"; it stores {needs[chosen]} queries"
    return Advice(budget, chosen, words)


def shown(value: Mean) -> str:
    """A mean with its error, as text."""
    return f"{value.mean:.3f}" + ("" if value.error is None else f" ± {value.error:.3f}")

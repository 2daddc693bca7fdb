"""What speculation may not change the text over: the whole grid, and an array that covers its pairs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from edgespec.config import ExportConfig
from edgespec.runtime.session import Settings

BLOCK = 64
POLICIES, BUDGETS, WEIGHTS = ("keydiff", "sinks", "none"), (256, 1024), ("int8", "int4")
WIDTHS, RULES, DRAFTERS = (2, 4, 8), ("cost", "adaedl", "confidence", "fixed"), ("draft", "ngram", "both")


@dataclass(frozen=True)
class Cell:
    """One way to decode: the bundle (policy, budget, weights), the widest call, the rule and who drafts."""

    policy: str
    budget: int
    weights: str
    width: int
    rule: str
    drafter: str

    @property
    def bundle(self) -> tuple[str, int, str]:
        return self.policy, self.budget, self.weights

    @property
    def values(self) -> tuple[Any, ...]:
        return (*self.bundle, self.width, self.rule, self.drafter)

    def __str__(self) -> str:
        return "-".join(map(str, self.values))

    def settings(self, tokens: int) -> Settings:
        return Settings(tokens, drafter=self.drafter, stop_rule=self.rule, draft_tokens=self.width - 1)


def export_config(bundle: tuple[str, int, str], output: str) -> ExportConfig:
    """How a cell's bundle of the demo is exported, with a draft whose own small cache evicts soon."""
    policy, budget, weights = bundle
    return ExportConfig(
        "demo", output, draft="demo", weights=weights, budget=budget, block=BLOCK, policy=policy,
        widths=WIDTHS, draft_budget=64,
    )  # fmt: skip


def whole() -> list[Cell]:
    """Every cell."""
    return [
        Cell(*values) for values in itertools.product(POLICIES, BUDGETS, WEIGHTS, WIDTHS, RULES, DRAFTERS)
    ]


def pairwise() -> list[Cell]:
    """Few cells, over six bundles, in which every two values of two axes meet (a greedy covering array)."""
    turned = itertools.cycle(WEIGHTS)  # so that each meets every policy and budget
    bundles = [(policy, budget, next(turned)) for budget in BUDGETS for policy in POLICIES]
    candidates = [cell for cell in whole() if cell.bundle in bundles]
    left = set().union(*map(pairs, candidates))
    chosen: list[Cell] = []
    while left:
        best = max(candidates, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return sorted(chosen, key=lambda cell: bundles.index(cell.bundle))


def pairs(cell: Cell) -> set[tuple[Any, ...]]:
    """The pairs of values that a cell brings together."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(cell.values), 2)}

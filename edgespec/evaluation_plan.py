"""Decides an evaluation before anything runs: which policies, lengths and budgets a bundle's slots allow.

What was asked for by name and cannot be is an InputError; of the defaults it is left out, and said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from edgespec import policy
from edgespec.config import WINDOW
from edgespec.config_evaluation import EvalConfig
from edgespec.errors import InputError
from edgespec.spec import CacheSpec, ModelEntry
from edgespec.task_words import NAMES as TASKS

LENGTHS, BUDGETS = (1024, 2048), (25, 50, 75)
REFERENCE = "none"  # the policy of the un-evicted model
PLAIN = ("lru", "sinks")  # what every policy has to beat: protection only, and a window


@dataclass(frozen=True)
class Cell:
    """One measurement: a task's context of a length and seed under a policy; `budget` is in % of the length.

    The un-evicted model's is policy `none`, budget 100.
    """

    task: str
    length: int
    seed: int
    policy: str
    budget: int


@dataclass(frozen=True)
class Plan:
    """What will be measured. `rows` is N for each (length, budget in %); `left_out` says what will not be."""

    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: dict[tuple[int, int], int]
    seeds: int
    sinks: int
    recent: int
    left_out: tuple[str, ...]

    def budgets(self, length: int) -> list[int]:
        """The budgets of a length, in %."""
        return [percent for at, percent in self.rows if at == length]

    def cells(self, task: str, length: int, seed: int) -> list[Cell]:
        """The cells of one context, the un-evicted model's first."""
        found = [Cell(task, length, seed, REFERENCE, 100)]
        found += [
            Cell(task, length, seed, name, percent)
            for percent in self.budgets(length)
            for name in self.policies
        ]
        return found

    def cache(self, entry: ModelEntry, cell: Cell) -> CacheSpec:
        """The bundle's cache under a cell's policy and budget; buffers are those of the bucket that fits."""
        bucket = bucket_of(entry.cache, cell.length)
        shape = replace(entry.cache, buckets=(bucket,), sinks=self.sinks, recent=self.recent)
        if cell.policy == REFERENCE:
            return replace(shape, policy=REFERENCE, budget=bucket)
        kept, seen = self.rows[cell.length, cell.budget], queries(cell.policy, entry.cache)
        return replace(shape, policy=cell.policy, budget=kept, queries=seen)

    def settings(self) -> dict[str, Any]:
        """Everything that changes a result, as JSON data."""
        rows = [[length, percent, kept] for (length, percent), kept in self.rows.items()]
        own = {name: value for name, value in asdict(self).items() if name not in ("rows", "left_out")}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()} | {"budgets": rows}


def plan(entry: ModelEntry, config: EvalConfig) -> Plan:
    """The plan of a checked config over a target."""
    cache = entry.cache
    if cache.positions == "compact" and cache.policy == "none":
        raise InputError(
            "commits at compact positions turn keys by angles of the bundle's own commit graph, and this one "
            "has none",
            "export it with --policy keydiff, or without --positions",
        )
    notes: list[str] = []
    policies = policies_of(cache, config.policies, notes)
    lengths = lengths_of(entry, config.lengths)
    sinks = cache.sinks if config.sinks is None else config.sinks
    recent = cache.recent if config.recent is None else config.recent
    rows: dict[tuple[int, int], int] = {}
    for length in lengths:
        for percent in config.budgets or BUDGETS:
            kept = int(length * percent / 100 / cache.block + 0.5) * cache.block
            if why := fault_of(length, percent, kept, cache.block, sinks + recent):
                if config.budgets:
                    raise why
                notes.append(why.message)
            else:
                rows[length, percent] = kept
    lengths = tuple(length for length in lengths if any(at == length for at, _ in rows))
    if not rows:
        raise InputError(
            f"no budget can be evaluated: {notes[-1]}", "export with a smaller --block or a larger --budget"
        )
    tasks = config.tasks or TASKS
    return Plan(policies, tasks, lengths, rows, config.seeds, sinks, recent, tuple(notes))


def policies_of(cache: CacheSpec, named: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    """The policies to run, in the order of edgespec.policy.NAMES, with those that every other has to beat.

    What the bundle cannot run is noted, or an InputError where it was named.
    """
    found = []
    wanted = {*named, *PLAIN} if named else {*policy.NAMES}
    for name in (n for n in policy.NAMES if n != REFERENCE and n in wanted):
        needed = queries(name, cache)
        if needed <= cache.queries:
            found.append(name)
            continue
        why = f"policy {name} needs {needed} stored queries of each block, and the bundle has {cache.queries}"
        hint = "export the bundle with --policy h2o, which stores all"
        if name in named:
            raise InputError(why, f"{hint}, or leave it out of --policies")
        notes.append(f"{why}; {hint}")
    return tuple(found)


def queries(name: str, cache: CacheSpec) -> int:
    """Query rows of each block that a policy needs; snapkv's window is the bundle's own, or the default."""
    own = policy.base_of(cache.policy) == "snapkv"
    return policy.queries(name, cache.block, cache.queries if own else min(WINDOW, cache.block))


def lengths_of(entry: ModelEntry, named: tuple[int, ...]) -> tuple[int, ...]:
    """The context lengths to run: those named, the defaults that fit, or else the longest that fits."""
    cache = entry.cache
    most = min(cache.slots, entry.spec.positions) // cache.block * cache.block
    for length in named:
        if length % cache.block:
            tidy = max(cache.block, round(length / cache.block) * cache.block)
            raise InputError(
                f"length {length} is not a multiple of the bundle's block {cache.block}",
                f"use --lengths {tidy}",
            )
        if length > most:
            raise InputError(
                f"length {length} is more than the {most} tokens that the bundle holds without eviction",
                f"use --lengths {most}, or export with --budget {length - cache.block} or more",
            )
    fitting = tuple(n for n in LENGTHS if n <= most and n % cache.block == 0)
    return named or fitting or (most,)


def fault_of(length: int, percent: int, kept: int, block: int, protected: int) -> InputError | None:
    """Why a budget cannot be evaluated at a length, or None."""
    name = f"budget {percent} % of length {length}"
    if kept < block:
        return InputError(
            f"{name} is less than half a block of {block} rows", "use larger --lengths or --budgets"
        )
    if kept + block >= length:
        return InputError(
            f"{name} leaves nothing to evict: {kept} rows + a block of {block} hold it all",
            "use larger --lengths, smaller --budgets, or a bundle exported with a smaller --block",
        )
    if protected > kept:
        return InputError(
            f"sinks + recent protect {protected} rows, more than the {kept} that {name} keeps",
            "protect fewer rows with --sinks and --recent, or use larger --budgets or --lengths",
        )
    return None


def bucket_of(cache: CacheSpec, length: int) -> int:
    """The smallest bucket whose slots hold a context without eviction."""
    return next(bucket for bucket in cache.buckets if bucket + cache.block >= length)

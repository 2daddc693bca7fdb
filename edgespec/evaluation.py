"""Runs an evaluation: the bundle's own step graphs under every policy, against the un-evicted model.

A step graph is a pure function over slots, and a policy's graphs are small and have no weights: the same step
graphs serve every policy, with its own written on the fly. Knows no torch and no ONNX Runtime: the engine and
the policies' graphs come from the caller.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgespec.bundle import Bundle
from edgespec.bundle_files import MANIFEST, digest
from edgespec.config_evaluation import EvalConfig
from edgespec.errors import BundleError, InputError
from edgespec.evaluation_log import Log, Score
from edgespec.evaluation_plan import REFERENCE, Cell, Plan, plan
from edgespec.evaluation_result import EvalResult, summarise
from edgespec.material import Material, open_material
from edgespec.policy import base_of, carries
from edgespec.spec import STEPS, CacheSpec, GraphSpec, ModelEntry, ModelSpec
from edgespec.tasks import TASKS, Question, Sample

WritePolicy = Callable[[Path, ModelSpec, CacheSpec, Path | None], tuple[GraphSpec, ...]]
Samples = dict[tuple[str, int, int], Sample]


def evaluate(
    bundle: Bundle,
    config: EvalConfig,
    engine: Callable[[Path, ModelEntry, int], Any],
    write_policy: WritePolicy,
    render: Callable[..., str],
    progress: Any,
) -> EvalResult:
    """Evaluate an opened bundle's target and give the result; every finished cell is in the folder's log.

    `engine` runs a model's graphs, `write_policy` writes its policy's, `render` fills a chat template.
    """
    entry = bundle.model("target")
    decided = plan(entry, config)
    material = open_material(bundle, config.text, render)
    decided, samples = prepare(decided, material, entry.cache.block, bool(config.tasks))
    for note in decided.left_out:
        progress.note(f"left out: {note}")
    origin = {
        "bundle": digest(bundle.path / MANIFEST).sha256,
        "text": material.sha256,
        "edgespec": version("edgespec"),
    }
    settings = origin | decided.settings()
    log = Log(Path(config.output), settings)
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(bundle.path, entry, decided, engine, write_policy, Path(folder), config.threads)
        for length in decided.lengths:
            for task in decided.tasks:
                with progress.stage(f"{task}, {length:,} tokens") as advance:
                    run_task(engines, log, samples, task, length, advance)
    return summarise(bundle.path.name, entry, decided, settings, log.done)


def prepare(decided: Plan, material: Material, block: int, named: bool) -> tuple[Plan, Samples]:
    """Every context, made before the first slow step; of the default tasks, those that fit a length."""
    samples: Samples = {}
    notes = list(decided.left_out)
    for length in decided.lengths:
        for task in decided.tasks:
            try:
                made = {
                    (task, length, seed): TASKS[task](material, length, block, seed)
                    for seed in range(decided.seeds)
                }
            except (InputError, BundleError) as error:  # a chat template may refuse, or break
                if named:
                    raise InputError(f"{task}: {error.message}", error.hint) from None
                notes.append(f"{task}: {error.message}")
            else:
                samples |= made
    tasks = tuple(t for t in decided.tasks if any(task == t for task, _, _ in samples))
    if not tasks:
        raise InputError(
            f"no task fits: {notes[-1]}", "use larger --lengths, or export with a larger --budget"
        )
    return replace(decided, tasks=tasks, left_out=tuple(notes)), samples


class Engines:
    """Engines over one set of opened graphs: the un-evicted one, and one for any cell."""

    def __init__(
        self,
        path: Path,
        entry: ModelEntry,
        decided: Plan,
        engine: Callable[[Path, ModelEntry, int], Any],
        write_policy: WritePolicy,
        folder: Path,
        threads: int,
    ) -> None:
        self.entry, self.plan, self.write_policy, self.folder = entry, decided, write_policy, folder
        self.steps = tuple(g for g in entry.graphs if g.kind in STEPS)
        self.base = engine(path, replace(entry, graphs=self.steps), threads)
        own = [path / g.file for g in entry.graphs if g.kind == "commit"]
        if entry.cache.positions == "compact" and any(g.method for g in entry.graphs):
            raise BundleError(
                f"{path} turns keys in an ExecuTorch program, which does not say by which angles",
                "evaluate an ONNX bundle of the same checkpoint",
            )
        self.turning = own[0] if own and entry.cache.positions == "compact" else None
        self.policies: dict[CacheSpec, tuple[GraphSpec, ...]] = {}

    def of(self, cell: Cell) -> Any:
        """An engine with empty caches under a cell's policy and budget."""
        cache = self.plan.cache(self.entry, cell)
        graphs = self.steps
        if cache.policy != REFERENCE:
            if cache not in self.policies:
                prefix = self.folder / str(len(self.policies))
                self.policies[cache] = self.write_policy(prefix, self.entry.spec, cache, self.turning)
            graphs = (*graphs, *self.policies[cache])
        return self.base.over(replace(self.entry, cache=cache, graphs=graphs))


def run_task(engines: Engines, log: Log, samples: Samples, task: str, length: int, advance: Any) -> None:
    """Every cell of a task at a length that the log lacks, one context at a time."""
    of = {(t, n, seed): s for (t, n, seed), s in samples.items() if (t, n) == (task, length)}
    done, total = 0, sum(len(engines.plan.cells(*key)) for key in of)
    for key, sample in of.items():
        cells = engines.plan.cells(*key)
        pending = [cell for cell in cells if cell not in log.done]
        done += len(cells) - len(pending)
        shared: dict[tuple[str, int], Any] = {}
        reference: list[np.ndarray] = []
        for cell in dict.fromkeys([*cells[:1], *pending] if pending else []):  # the un-evicted model first
            engine, start = engines.of(cell), time.monotonic()
            stops = {c: before_eviction(engines, c, sample) for c in pending if c.policy != REFERENCE}
            if cell.policy == REFERENCE:
                shared |= absorbed(engine, sample, REFERENCE, sorted(set(stops.values())))
            elif stops[cell]:
                origin = base_of(cell.policy) if carries(cell.policy) else REFERENCE
                if (origin, stops[cell]) not in shared:
                    shared |= absorbed(engine, sample, origin, [stops[cell]])
                engine.restore(shared[origin, stops[cell]])
            logits = asked(engine, sample)
            reference = reference or logits
            if cell in pending:
                log.add(cell, scores(sample, logits, reference), time.monotonic() - start)
                done += 1
                advance(done, total)


def before_eviction(engines: Engines, cell: Cell, sample: Sample) -> int:
    """Tokens of a context, in whole blocks, that a cell's cache holds just as the un-evicted one does."""
    block = engines.entry.cache.block
    return min(engines.plan.rows[cell.length, cell.budget], (len(sample.context) - 1) // block * block)


def absorbed(engine: Any, sample: Sample, origin: str, stops: Sequence[int]) -> dict[tuple[str, int], Any]:
    """Snapshots after each of so many tokens of a context, ascending: what every policy starts from.

    A policy that carries a score starts from its own base's, the others from the un-evicted model's.
    """
    found = {}
    for stop in filter(None, stops):
        engine.prefill(sample.context[engine.position : stop])
        found[origin, stop] = engine.snapshot()
    return found


def asked(engine: Any, sample: Sample) -> list[np.ndarray]:
    """The rest of a context absorbed, evicting, and each of its questions asked of that same cache.

    Logits [A,V] of the rows that predict each question's A scored tokens.
    """
    engine.prefill(sample.context[engine.position :])
    if len(sample.questions) == 1:
        return [rows(engine, sample.questions[0])]
    whole, found = engine.snapshot(), []
    for question in sample.questions:
        engine.restore(whole)
        found.append(rows(engine, question))
    return found


def rows(engine: Any, question: Question) -> np.ndarray:
    """Logits [A,V] that predict a question's scored tokens, its own tokens fed through the widest graph."""
    kind = "verify" if engine.widths("verify") else "decode"
    width = engine.widths(kind)[-1]
    fed, wanted, found = question.ids[:-1], {place - 1 for place in question.scored}, []
    done = 0
    while done < len(fed):
        count = min(width, len(fed) - done, engine.free)
        logits = engine.call(kind, fed[done : done + count], width)["logits"][0]
        found += [logits[i].copy() for i in range(count) if done + i in wanted]
        engine.accept(count)
        done += count
    return np.stack(found)


def scores(
    sample: Sample, logits: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> tuple[Score, ...]:
    """Each question's score. KL(p‖q) = Σ p (log p - log q), p the un-evicted model's, in nats."""
    found = []
    for question, ours, theirs in zip(sample.questions, logits, reference, strict=True):
        answer = [question.ids[place] for place in question.scored]
        nll, kl, right = [], [], []
        for row, whole, token in zip(ours, theirs, answer, strict=True):
            q, p = log_softmax(row), log_softmax(whole)
            nll.append(-q[token])
            kl.append(np.sum(np.exp(p) * (p - q)))
            right.append(int(row.argmax()) == token)
        found.append(Score(question.depth, all(right), float(np.mean(nll)), float(np.mean(kl))))
    return tuple(found)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [V] in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())

"""Puts a model into ExecuTorch programs: which methods it gets, and the manifest's entry that says so.

NAME.pte holds the methods that read weights, which lie in NAME.ptd, each once; NAME-policy.pte those of its
policy, which read none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edgespec.exporters.assemble import CONTEXT_WIDTH, Job, Source, entry_of, traced, turn_of
from edgespec.exporters.commit import Turn, policy_kinds, policy_module
from edgespec.exporters.executorch_call import Call, LookUp, example
from edgespec.exporters.executorch_file import write
from edgespec.exporters.lower_executorch import Lowering, Stored
from edgespec.exporters.xnnpack import Constants
from edgespec.spec import CacheSpec, GraphSpec, ModelEntry, ModelSpec, context_tensors

Made = list[tuple[nn.Module, GraphSpec]]


def export_program(
    job: Job, folder: Path, progress: Any, target: Source | None = None
) -> tuple[ModelEntry, Source]:
    """Write a model's programs and weights into the folder."""
    source = traced(job, folder, progress, target)
    with progress.stage(f"{job.name}: graphs") as advance:
        made = step_methods(job, source, advance)
        if job.context_rows and target is not None:
            tensors = context_tensors(min(CONTEXT_WIDTH, job.cache.widest), job.spec.hidden)
            graph = GraphSpec("", "context", tensors[0][0].shape[-1], job.cache.budget, *tensors)
            made.append((LookUp(target.head_array(), target.job.precision["head"]), graph))
        turn = turn_of(source.program, job)
    with progress.stage(f"{job.name}: programs") as advance:
        total = len(made) + len(policy_kinds(job.cache))
        done = iter(range(1, total + 1))
        tick = lambda: advance(next(done), total)  # noqa: E731
        graphs = program(job.name, made, folder, tick)
        graphs += policy_program(job.name, job.spec, job.cache, folder, turn, tick)
    return entry_of(job, f"{job.name}.ptd", graphs, folder), source


def program(name: str, made: Made, folder: Path, tick: Callable[[], None] = lambda: None) -> list[GraphSpec]:
    """Write modules as the methods of NAME.pte; what the manifest says of them."""
    graphs = [
        replace(graph, file=f"{name}.pte", method=f"{graph.kind}_{graph.width}_{graph.bucket}")
        for _, graph in made
    ]
    methods = {g.method: (module, example(g.inputs)) for (module, _), g in zip(made, graphs, strict=True)}
    write(methods, folder, name, tick)
    return graphs


def policy_program(
    name: str,
    spec: ModelSpec,
    cache: CacheSpec,
    folder: Path,
    turn: Turn | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[GraphSpec]:
    """The same of a policy, in NAME-policy.pte; nothing where it does not evict."""
    made: Made = [
        policy_module(kind, spec, cache, "", bucket, turn if kind == "commit" else None)
        for kind, bucket in policy_kinds(cache)
    ]
    return program(f"{name}-policy", made, folder, tick) if made else []


def step_methods(job: Job, source: Source, advance: Any) -> Made:
    """The step graphs; the last brings the arrays that all of them read."""
    constants = Constants(job.name)
    form = lambda role, name: job.form(role, source.canonical(name))  # noqa: E731
    stored = Stored(source.array, source.head_array, source.storage().head, form, source.grid, constants)
    made: Made = []
    for done, (kind, width, bucket) in enumerate(job.steps, 1):
        what = job.target(kind, width, bucket)
        last = done == len(job.steps)
        call = Call(Lowering(source.program, job.spec, stored, what), brings=last)
        made.append((call, GraphSpec("", kind, width, bucket, *what.tensors(job.spec))))
        advance(done, len(job.steps))
    return made

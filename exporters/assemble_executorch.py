"""Puts a model into one ExecuTorch program: which methods it gets, and the manifest's entry that says so.

All methods of a model are in NAME.pte and share the arrays of NAME.ptd, in which each is stored once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edgespec.exporters.assemble import CONTEXT_WIDTH, Job, Source, entry_of, traced, turn_of
from edgespec.exporters.commit import policy_kinds, policy_module
from edgespec.exporters.executorch_file import write
from edgespec.exporters.lower_executorch import Call, LookUp, Lowering, Stored, example
from edgespec.exporters.xnnpack import Constants
from edgespec.spec import GraphSpec, ModelEntry, context_tensors


def export_program(
    job: Job, folder: Path, progress: Any, target: Source | None = None
) -> tuple[ModelEntry, Source]:
    """Write a model's program and weights into the folder."""
    source = traced(job, folder, progress, target)
    made: list[tuple[nn.Module, GraphSpec]] = []
    with progress.stage(f"{job.name}: graphs") as advance:
        made += step_methods(job, source, advance)
        turn = turn_of(source.program, job)
        for kind, bucket in policy_kinds(job.cache):
            own = turn if kind == "commit" else None
            made.append(policy_module(kind, job.spec, job.cache, "", bucket, own))
        if job.context_rows and target is not None:
            tensors = context_tensors(min(CONTEXT_WIDTH, job.cache.widest), job.spec.hidden)
            width = tensors[0][0].shape[-1]
            graph = GraphSpec("", "context", width, job.cache.budget, *tensors)
            made.append((LookUp(target.head_array()), graph))
    graphs = [
        replace(graph, file=f"{job.name}.pte", method=f"{graph.kind}_{graph.width}_{graph.bucket}")
        for _, graph in made
    ]
    methods = {
        graph.method: (module, example(graph.inputs)) for (module, _), graph in zip(made, graphs, strict=True)
    }
    with progress.stage(f"{job.name}: program") as advance:
        done = iter(range(1, len(methods) + 1))
        write(methods, folder, job.name, lambda: advance(next(done), len(methods)))
    return entry_of(job, f"{job.name}.ptd", graphs, folder), source


def step_methods(job: Job, source: Source, advance: Any) -> list[tuple[nn.Module, GraphSpec]]:
    """The step graphs; the last brings the arrays that all of them read."""
    constants = Constants(job.name)
    stored = Stored(source.array, source.head_array, source.storage().head, constants)
    made: list[tuple[nn.Module, GraphSpec]] = []
    for done, (kind, width, bucket) in enumerate(job.steps, 1):
        what = job.target(kind, width, bucket)
        last = done == len(job.steps)
        call = Call(Lowering(source.program, job.spec, stored, what), brings=last)
        made.append((call, GraphSpec("", kind, width, bucket, *what.tensors(job.spec))))
        advance(done, len(job.steps))
    return made

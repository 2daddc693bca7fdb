"""The commit: which N of a layer's M rows survive, as a small weight-free graph and as the same code run
eagerly.

Layers with a sliding window need no graph: they keep the newest N, whatever the policy.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgespec.exporters.scores import SCORES
from edgespec.spec import CacheSpec, GraphSpec, ModelSpec, TensorSpec

PROTECTED = 3e4  # above every score, and finite in fp16


def ranked(keys: Tensor, cache: CacheSpec) -> Tensor:
    """Every row's score [KV,M], the protected ones' above all; keys [KV,M,d]."""
    slots = keys.shape[1]
    place = torch.arange(slots)
    protected = (place < cache.sinks) | (place >= slots - cache.recent)
    return torch.where(protected, PROTECTED, SCORES[cache.policy](keys))


def keep(keys: Tensor, cache: CacheSpec) -> Tensor:
    """Ascending indices of the rows that survive: the first `sinks`, the last `recent`, then the best scores.

    keys [KV,M,d], rows in order of position -> [KV,N] int32. Each key-value head keeps its own set (design,
    section 4).
    """
    chosen = (
        ranked(keys, cache).topk(cache.budget, -1, sorted=False).indices.float()
    )  # float: some NPUs sort nothing else; exact below 2^24
    return chosen.topk(cache.budget, -1, largest=False).values.int()


class Commit(nn.Module):
    """One layer's commit over a buffer whose first M rows are filled."""

    def __init__(self, cache: CacheSpec) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """keys, values [1,KV,rows,d] -> keep [KV,N].

        Under the `rows` contract also the kept rows [1,KV,N,d].
        """
        filled = keys[0, :, : self.cache.slots]
        kept = keep(filled, self.cache)
        if self.cache.contract == "append":
            return (kept,)
        index = kept.long().unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        return kept, filled.gather(1, index)[None], values[0, :, : self.cache.slots].gather(1, index)[None]


def commit_graph(spec: ModelSpec, cache: CacheSpec, file: str) -> tuple[ir.Model, GraphSpec]:
    """The commit graph over the largest bucket's buffers; every full-attention layer runs it on its own.

    The budget may be smaller than that bucket: the graph reads the first M = N + B rows.
    """
    shape = (1, spec.kv_heads, cache.rows(cache.buckets[-1]), spec.head_dim)
    append = cache.contract == "append"
    names = ["keep"] if append else ["keep", "kept_keys", "kept_values"]
    inputs = ["keys"] if append else ["keys", "values"]
    module = Commit(cache)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for name in ("onnxscript", "torch.onnx"):  # or every graph comes with lines about torchvision
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example, example.clone()),
            dynamo=True,
            opset_version=23,
            verbose=False,
            input_names=["keys", "values"],
            output_names=names,
        )
    model = program.model
    if append:
        model.graph.inputs.pop(1)
    for noted in (
        model,
        model.graph,
        *model.graph,
        *model.graph.inputs,
        *(v for n in model.graph for v in n.outputs),
    ):
        noted.metadata_props.clear()  # the exporter's notes: stack traces, with this machine's paths
    kept = (1, spec.kv_heads, cache.budget, spec.head_dim)
    outputs = [TensorSpec("keep", "int32", (spec.kv_heads, cache.budget))]
    outputs += [TensorSpec(name, "float32", kept) for name in names[1:]]
    return model, GraphSpec(
        file,
        "commit",
        cache.block,
        cache.budget,
        tuple(TensorSpec(n, "float32", shape) for n in inputs),
        tuple(outputs),
    )


def write_commit(spec: ModelSpec, cache: CacheSpec, path: Path) -> GraphSpec:
    """Write the commit graph of a cache that no bundle was exported with; its file is the whole path."""
    model, graph = commit_graph(spec, cache, str(path))
    ir.save(model, path)
    return graph

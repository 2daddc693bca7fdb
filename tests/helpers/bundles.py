"""A small, valid bundle without any real graph: two models, two buckets, bytes of nothing."""

from __future__ import annotations

from pathlib import Path

from edgespec.bundle import SCHEMA, Bundle, creating, open_bundle
from edgespec.spec import (
    CacheSpec,
    GraphSpec,
    Manifest,
    ModelEntry,
    ModelSpec,
    TokenizerEntry,
    policy_inputs,
    policy_outputs,
    step_inputs,
    step_outputs,
)

BUDGET, BLOCK, BUCKET = 16, 4, 8


def model_spec(layers: int = 2) -> ModelSpec:
    return ModelSpec("llama", layers, 32, 4, 2, 8, 100, 64, True, (0,) * layers)


def cache_spec(contract: str = "append", buckets: tuple[int, ...] = (BUCKET, BUDGET)) -> CacheSpec:
    return CacheSpec(contract, buckets[-1], BLOCK, "keydiff", 1, 2, buckets, BLOCK)


def step_graph(
    model: ModelSpec, cache: CacheSpec, kind: str, width: int, bucket: int, name: str
) -> GraphSpec:
    inputs = step_inputs(kind, width, model, cache.rows(bucket))
    outputs = step_outputs(kind, width, model, cache, bucket, model.vocab)
    return GraphSpec(f"graphs/{name}_{kind}_{width}_{bucket}.onnx", kind, width, bucket, inputs, outputs)


def commit_graph(model: ModelSpec, cache: CacheSpec, bucket: int, name: str) -> GraphSpec:
    reads = ("keys", "values") if cache.contract == "rows" else ("keys",)
    inputs = policy_inputs("commit", reads, model, cache, bucket)
    outputs = policy_outputs("commit", reads, model, cache)
    return GraphSpec(f"graphs/{name}_commit_{bucket}.onnx", "commit", cache.block, bucket, inputs, outputs)


def model_entry(name: str, contract: str = "append") -> ModelEntry:
    spec = model_spec(2 if name == "target" else 1)
    cache = cache_spec(contract, (BUCKET, BUDGET) if name == "target" else (BUCKET,))
    steps = [("prefill", BLOCK), ("decode", 1), ("verify", 2), ("verify", 4)]
    if name == "draft":
        steps = [("prefill", BLOCK), ("draft", 2)]
    graphs = [step_graph(spec, cache, *step, bucket, name) for bucket in cache.buckets for step in steps]
    graphs.append(commit_graph(spec, cache, cache.budget, name))
    precision = {"linear": "int4", "head": "int4", "embedding": "int8"}
    weights = f"{name}.weights"
    return ModelEntry(
        name, "somewhere", spec, cache, precision, weights, tuple(graphs), 100, "", True, (spec.layers,)
    )


def manifest(device: str = "cpu") -> Manifest:
    contract = "append" if device == "cpu" else "rows"
    models = (model_entry("target", contract), model_entry("draft", contract))
    tokenizer = TokenizerEntry("tokenizer.json", "", (2, 3), 1)
    return Manifest(SCHEMA, device, models, tokenizer, {}, {"edgespec": "0.1.0"})


def fill(folder: Path, what: Manifest) -> None:
    """Write a file for everything that the manifest names; its text is its name."""
    names = [what.tokenizer.tokenizer]
    names += [name for m in what.models for name in (m.weights, *(g.file for g in m.graphs))]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def make(path: Path, device: str = "cpu") -> Bundle:
    with creating(path) as staging:
        what = manifest(device)
        fill(staging.path, what)
        staging.finish(what)
    return open_bundle(path)

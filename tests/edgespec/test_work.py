"""A bundle's graphs and a bare config.json say the same of one model, within 2 %."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from edgespec.bundle import SCHEMA, Bundle
from edgespec.count import count
from edgespec.exporters.spans import spans_of
from edgespec.report import to_table
from edgespec.shape import precision, shape_of
from edgespec.spec import CacheSpec, FileEntry, Manifest, TokenizerEntry
from edgespec.work import ModelWork, of_bundle, of_shape
from tests.helpers.checkpoints import tiny_model
from tests.helpers.tiny import checkpoint, export_tiny

SIZES: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
BUDGET, BLOCK = 96, 32
FORMS = [
    ("cpu", "int8"),
    ("cpu", "int4"),
    ("cpu", "fp32"),
    ("npu", "int4"),
    ("npu", "fp16"),
    ("npu", "w8a16"),
]
CODED = {"w8": "w8a16"}  # what a shape calls a form of the exporter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return checkpoint(tmp_path_factory.mktemp("model"), tiny_model("llama", **SIZES))


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def both(
    request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelWork, ModelWork]:
    """A small model's exported graphs, counted one by one; and the model counted from its config alone."""
    device, form = request.param
    stored, contract = precision(form, device), "append" if device == "cpu" else "rows"
    coded = form == "w8a16"
    cache = CacheSpec(
        contract, BUDGET, BLOCK, "keydiff", 1, 2, (BUDGET,), BLOCK, dtype="int8" if coded else "float32"
    )
    forms = {"linear": stored.linear, "head": stored.head, "embedding": stored.embedding}
    forms = {part: CODED.get(name, name) for part, name in forms.items()}
    texts = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    spans = spans_of(source, texts, lambda done, total: None) if coded else None
    folder = tmp_path_factory.mktemp("graphs")
    entry = export_tiny(source, cache, folder, (4,), precision=forms, spans=spans).entry
    files = {p.name: FileEntry("", p.stat().st_size) for p in folder.iterdir()}
    bundle = Bundle(folder, Manifest(SCHEMA, device, (entry,), TokenizerEntry("", "", ()), files))
    from_graphs = of_bundle(bundle)["target"]
    steps = [(kind, width) for kind, width, _ in from_graphs.steps]
    shape = shape_of({"model_type": "llama", **SIZES}, "config.json")
    return from_graphs, of_shape(shape, stored, steps, BUDGET, BLOCK, appends=device == "cpu")


def test_a_call_is_counted_alike(both: tuple[ModelWork, ModelWork]) -> None:
    graphs, config = both
    assert set(graphs.steps) == set(config.steps) and len(graphs.steps) == 3
    assert graphs.arithmetic == config.arithmetic
    for kind, width, bucket in graphs.steps:
        for filled in (10, BUDGET):
            one, other = (model.call(kind, width, bucket, filled, 2) for model in both)
            for name in ("bytes_moved", "bytes_weights", "bytes_kv", "bytes_activations", "ops"):
                assert getattr(other, name) == pytest.approx(getattr(one, name), rel=0.02), (kind, name)
            assert other.bytes_widened == pytest.approx(one.bytes_widened, rel=0.02)


def test_caches_and_commits_are_counted_alike(both: tuple[ModelWork, ModelWork]) -> None:
    graphs, config = both
    assert graphs.bytes_row(2) == config.bytes_row(2) == 2 * 2 * 2 * 32 * (config.bytes_cached or 2)
    one, other = (model.policy_call("commit", BUDGET, 2) for model in both)
    assert other.bytes_kv == pytest.approx(one.bytes_kv, rel=0.02)
    assert one.dispatches == other.dispatches == 2


def test_a_call_of_a_model_in_parts_is_the_sum_of_its_graphs(source: Any, tmp_path: Path) -> None:
    cache = CacheSpec("rows", BUDGET, BLOCK, "keydiff", 1, 2, (BUDGET,), BLOCK)
    found, tables = [], []
    for counts in ((2,), (1, 1)):
        folder = tmp_path / str(len(counts))
        entry = export_tiny(source, cache, folder, (4,), counts=counts).entry
        files = {p.name: FileEntry("", p.stat().st_size) for p in folder.iterdir()}
        bundle = Bundle(folder, Manifest(SCHEMA, "npu", (entry,), TokenizerEntry("", "", ()), files))
        found.append(of_bundle(bundle)["target"])
        tables.append(to_table(count(bundle)))
    whole, parts = found
    assert whole.policy == parts.policy and set(whole.steps) == set(parts.steps)
    for (kind, width, bucket), step in whole.steps.items():
        other = parts.steps[kind, width, bucket]
        angles = 4 * width * 2 * SIZES["head_dim"]  # each part looks the rows' angles up
        assert other.bytes_weights - step.bytes_weights in range(angles + 2000)
        assert replace(other, bytes_weights=step.bytes_weights, dispatches=1) == step
        assert parts.call(kind, width, bucket, 9, 2).dispatches == 2
    assert " part " not in tables[0] and " part " in tables[1]

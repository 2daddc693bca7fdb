"""Every policy's graphs on ONNX Runtime against the same rule run eagerly, and what they are made of.

What the rule is, test_scores.py and test_commit.py say. An export takes a second or two: one for each policy
and contract.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgespec.exporters.commit import keep, observed, policy_graph, ranked, survivors
from edgespec.exporters.scores import Layer, carrying
from edgespec.policy import CARRYING, NAMES, queries
from edgespec.profiles import operators
from edgespec.spec import CacheSpec, GraphSpec, ModelSpec
from tests.helpers import oracle

torch.set_num_threads(1)

BUDGET, BLOCK, WIDTH, DIM, SINKS, RECENT = 16, 4, 3, 8, 1, 2


def model(heads: int, kv: int, softcap: float = 0.0) -> ModelSpec:
    return ModelSpec("tiny", 2, heads * DIM, heads, kv, DIM, 288, 512, False, (0, 0), softcap)


# As many key-value heads as query heads in each one's group: a wrong pairing of them has the right shapes.
SQUARE = ("append", model(9, 3))
MODELS = [("append", model(6, 3)), ("rows", model(8, 2, softcap=2.0))]
CASES = [(policy, *MODELS[i % 2]) for i, policy in enumerate(p for p in NAMES if p != "none")]
CASES += [(policy, *SQUARE) for policy in ("lru", "snapkv", "h2o", "caote(tova)")]


class Graphs:
    """A policy's commit and observe graphs on ONNX Runtime."""

    def __init__(self, policy: str, contract: str, model: ModelSpec, folder: Path) -> None:
        self.model = model
        width = max(queries(policy, BLOCK, WIDTH), WIDTH)  # more than one for tova too
        self.cache = CacheSpec(contract, BUDGET, BLOCK, policy, SINKS, RECENT, (BUDGET,), BLOCK, width)
        self.specs: dict[str, GraphSpec] = {}
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.operators: set[tuple[str, str]] = set()
        kinds = ("commit", "observe") if policy in CARRYING else ("commit",)  # caote(h2o) observes as h2o
        for kind in kinds:
            graph, self.specs[kind] = policy_graph(kind, self.model, self.cache, f"{kind}.onnx")
            ir.save(graph, folder / f"{kind}.onnx")
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self.sessions[kind] = ort.InferenceSession(
                folder / f"{kind}.onnx", options, providers=["CPUExecutionProvider"]
            )
            nodes = onnx.load(folder / f"{kind}.onnx").graph.node
            self.operators |= {(node.domain, node.op_type) for node in nodes}

    def layer(self, seed: int, end: int) -> Layer:
        """A random layer of which `end` rows are filled, in float32; what lies beyond them is NaN."""
        noise = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=noise)
        heads, kv, slots = self.model.heads, self.model.kv_heads, self.cache.slots
        keys, values = normal(kv, slots, DIM), normal(kv, slots, DIM) + normal(kv, 1, DIM)
        keys[:, end:], values[:, end:] = torch.nan, torch.nan
        carried = normal(heads, slots).abs() * 3
        if self.cache.policy == "lru":  # whole queries, some blocks ago
            carried = (carried * BLOCK).round() / -BLOCK
        carried[:, end - BLOCK :] = 0  # this block is not observed yet
        given = normal(self.cache.queries, heads, DIM)
        return Layer(keys, end, values, given, carried, self.model.softcap)

    def __call__(self, kind: str, layer: Layer) -> dict[str, np.ndarray]:
        given = {"count": np.array([layer.end], np.int32)}
        for part in ("keys", "values"):
            rows = getattr(layer, part)
            shape = (1, self.model.kv_heads, self.cache.rows(BUDGET), DIM)
            given[part] = np.full(shape, np.nan, np.float32)
            given[part][0, :, : self.cache.slots] = rows.numpy()
        for part in ("queries", "carried"):
            given[part] = getattr(layer, part).numpy()
        graph = self.specs[kind]
        made = self.sessions[kind].run(None, {t.name: given[t.name] for t in graph.inputs})
        return {t.name: array for t, array in zip(graph.outputs, made, strict=True)}


@pytest.fixture(scope="module", params=CASES, ids=lambda v: f"{v[0]}-{v[1]}-{v[2].heads}:{v[2].kv_heads}")
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(*request.param, tmp_path_factory.mktemp("graphs"))


def test_the_commit_graph_keeps_what_the_eager_rule_keeps(graphs: Graphs) -> None:
    """Bug: the exporter's optimizer dropped reshapes around a product of flattened rows, and each key-value
    head was ranked by another's query heads, wherever it had as many of them as there are key-value heads.
    """
    cache, decided = graphs.cache, 0
    for seed in range(8):
        given = graphs.layer(seed, cache.slots)
        layer = observed(given, cache)
        chosen = [oracle.survivors(row, BUDGET, SINKS, RECENT) for row in ranked(layer, cache).tolist()]
        if min(gap for _, gap in chosen) < 1e-6:  # nearer than two float32 sums agree
            continue
        decided += 1
        made, places = graphs("commit", given), [places for places, _ in chosen]
        assert made["keep"].tolist() == places == keep(layer, cache).tolist()
        kept = torch.tensor(places)
        for part in ("keys", "values") if cache.contract == "rows" else ():
            rows = getattr(given, part)
            want = torch.stack([rows[head, index] for head, index in enumerate(kept)])
            assert np.array_equal(made[f"kept_{part}"][0], want.numpy())
        if carrying(cache.policy):
            assert layer.carried is not None
            want = survivors(layer.carried, kept, cache)
            np.testing.assert_allclose(made["new_carried"], want.numpy(), rtol=0, atol=1e-5)
    assert decided >= 5


def test_the_observe_graph_carries_what_the_eager_rule_carries(graphs: Graphs) -> None:
    if "observe" not in graphs.specs:
        assert graphs.cache.policy not in CARRYING
        return
    for seed, end in enumerate(range(BLOCK, graphs.cache.slots, BLOCK)):
        given = graphs.layer(seed, end)
        want = observed(replace(given, end=torch.tensor([end])), graphs.cache).carried
        assert want is not None and not want[:, end:].any()
        np.testing.assert_allclose(graphs("observe", given)["new_carried"], want.numpy(), rtol=0, atol=1e-5)


def test_a_policys_graphs_hold_only_operators_that_its_device_takes(graphs: Graphs) -> None:
    assert graphs.operators <= operators("cpu" if graphs.cache.contract == "append" else "npu")

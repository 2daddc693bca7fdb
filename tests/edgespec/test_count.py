"""Bytes and operators counted from a graph file, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgespec.bundle import creating, open_bundle
from edgespec.count import bytes_policy, count
from edgespec.report import to_json, to_table
from tests.helpers.bundles import fill, manifest

onnx = pytest.importorskip("onnx")

VOCAB, HIDDEN = 100, 32


def stored(name: str, kind: int, dims: list[int], file: str) -> onnx.TensorProto:
    """An initializer whose bytes would lie in another file."""
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=1)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", file
    return tensor


def write_graph(path: Path) -> None:
    """A table that is looked up, a matrix that is streamed, and a table that is both."""
    helper, float32, uint8 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["a"]),
        helper.make_node("Gather", ["tied", "tokens"], ["b"]),
        helper.make_node("MatMul", ["a", "matrix"], ["c"]),
        helper.make_node("MatMul", ["b", "tied"], ["d"]),
    ]
    weights = [
        stored("table", uint8, [VOCAB, HIDDEN], "target.weights"),
        stored("matrix", float32, [HIDDEN, 7], "target.weights"),
        stored("tied", float32, [VOCAB, HIDDEN], "target.weights"),
    ]
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)).SerializeToString())


def test_counts(tmp_path: Path) -> None:
    with creating(tmp_path / "x.bundle") as staging:
        what = manifest()
        fill(staging.path, what)
        for model in what.models:
            for graph in model.graphs:
                write_graph(staging.path / graph.file)
        staging.finish(what)
    cost = count(open_bundle(tmp_path / "x.bundle"))
    by_width = {(g.kind, g.width): g for g in cost.graphs if g.model == "target" and g.bucket == 16}
    decode, verify = by_width["decode", 1], by_width["verify", 4]
    streamed = HIDDEN * 7 * 4 + VOCAB * HIDDEN * 4
    assert (decode.nodes, decode.ops) == (4, {"Gather": 2, "MatMul": 2})
    assert decode.bytes_weights == streamed + 1 * HIDDEN
    assert verify.bytes_weights == streamed + 4 * HIDDEN
    assert to_json(cost)["graphs"][0]["ops"] == {"Gather": 2, "MatMul": 2}
    text = to_table(cost)
    assert f"{decode.bytes_weights / 2**20:.2f} MiB" in text
    assert text.splitlines()[-1].startswith("on disk 0.0")


def test_what_a_policy_keeps_beside_rows() -> None:
    """The last queries of a block in every layer and head, and a score of every slot where one is carried."""
    model = manifest().models[0]
    spec = model.spec
    assert bytes_policy(model) == 0
    for policy, queries, carried in (("tova", 1, 0), ("caote(snapkv)", 3, 0), ("h2o", 4, 20), ("lru", 4, 20)):
        cache = replace(model.cache, policy=policy, queries=queries)
        want = 4 * spec.layers * spec.heads * (queries * spec.head_dim + carried)
        assert bytes_policy(replace(model, cache=cache)) == want

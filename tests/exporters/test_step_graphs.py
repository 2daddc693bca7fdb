"""Every family on both cache contracts: the logits are Transformers' own, the operators an NPU's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.runtime.engine import Engine
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.absorb import absorbed_as_wanted
from tests.helpers.oracle import own_logits

CLOSE = 2e-5  # the issue asks for 1e-4
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 288, 48)]
CALLS = [("prefill", 16, 16), ("prefill", 16, 5), ("verify", 4, 4), ("verify", 2, 2), ("verify", 4, 3)]
CALLS += [("decode", 1, 1), ("decode", 1, 1), ("verify", 4, 4), ("prefill", 16, 9), ("decode", 1, 1)]
DECOMPOSED = {"ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Reciprocal", "Sin", "Cos", "Einsum"}
NORMS = ("RMSNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization")
TURNED = {"smollm3": 1, "cohere2": 1}  # of the two layers; the rest turn in both


@pytest.fixture(
    scope="module", params=[(f, c) for f in tiny.FAMILIES for c in ("rows", "append")], ids="-".join
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    family, contract = request.param
    folder = tmp_path_factory.mktemp(family)
    source = tiny.checkpoint(folder / "source", tiny.model(family))
    cache = CacheSpec(contract, 64, 16, "none", 0, 0, (64,), 16)
    return family, tiny.export_tiny(source, cache, folder / "graphs")


def graph(engine: Engine, kind: str) -> onnx.ModelProto:
    file = next(g.file for g in engine.entry.graphs if g.kind == kind)
    return onnx.load(engine.folder / file, load_external_data=False)


def test_logits_are_those_of_transformers(exported: tuple[str, Engine]) -> None:
    family, engine = exported
    absorbed_as_wanted(engine, own_logits(tiny.model(family), TOKENS).numpy(), TOKENS, CALLS, CLOSE)


def test_a_model_in_parts_gives_the_same_bits(exported: tuple[str, Engine], tmp_path: Path) -> None:
    _, whole = exported
    source = open_checkpoint(str(whole.folder.parent / "source"))
    parts = tiny.export_tiny(source, whole.cache, tmp_path, (4,), counts=(1, 1))
    assert parts.entry.parts == (1, 1)
    for engine in (whole, parts):
        engine.reset()
    for kind, rows in (("prefill", 9), ("verify", 4), ("decode", 1)):
        given = TOKENS[whole.count : whole.count + rows]
        ours, theirs = (engine.call(kind, given)["logits"] for engine in (parts, whole))
        assert np.array_equal(ours, theirs)
        for engine in (whole, parts):
            engine.accept(rows)
    for ours, theirs in zip(parts.caches.values(), whole.caches.values(), strict=True):
        assert all(np.array_equal(a[:, :, :14], b[:, :, :14]) for a, b in zip(ours, theirs, strict=True))


def test_an_npu_graph_holds_no_constant_bool(exported: tuple[str, Engine]) -> None:
    """Bug: Qualcomm's compiler took the one in the mask of a one-row call for false, or not, by chance."""
    _, engine = exported
    if engine.cache.contract == "append":
        return
    for kind in ("decode", "verify", "prefill"):
        held = graph(engine, kind).graph.initializer
        assert not [i.name for i in held if i.data_type == onnx.TensorProto.BOOL]


def test_what_lies_beyond_the_count_is_never_seen(exported: tuple[str, Engine]) -> None:
    _, engine = exported

    def logits() -> np.ndarray:
        return engine.call("verify", TOKENS[9:13], 4)["logits"].copy()

    engine.reset()
    engine.prefill(TOKENS[:9])
    clean = logits()
    noise = np.random.default_rng(1)
    for buffer in (*engine.caches["keys"], *engine.caches["values"]):
        buffer[:, :, 9:] = noise.normal(0, 300, buffer[:, :, 9:].shape)
    assert np.array_equal(logits(), clean)


def test_operators_are_named_and_none_is_spelled_out(exported: tuple[str, Engine]) -> None:
    family, engine = exported
    norms = sum("norm" in type(m).__name__.lower() for m in tiny.model(family).modules())
    for kind in ("prefill", "verify", "decode"):
        model = graph(engine, kind)
        nodes = list(model.graph.node)
        count = Counter(node.op_type for node in nodes)
        assert sum(count[name] for name in NORMS) == norms
        assert not DECOMPOSED & set(count)
        turning = count["AttendPacked"]
        assert count["RotaryEmbedding"] + 2 * turning == 2 * TURNED.get(family, 2)
        fused = count["Attend"] + turning
        if engine.cache.contract == "rows":
            assert {node.domain for node in nodes} == {""}
            assert count["Softmax"] == 2 and not fused
        else:
            assert fused == 2 and not count["Softmax"]
            for body in model.functions:
                made = Counter(node.op_type for node in body.node)
                assert made["GroupQueryAttention"] == (1 if body.name.startswith("Attend") else 0)
                assert not DECOMPOSED & set(made)


def test_every_dimension_is_fixed_and_the_checker_passes(exported: tuple[str, Engine]) -> None:
    _, engine = exported
    for spec in engine.entry.graphs:
        onnx.checker.check_model(str(engine.folder / spec.file), full_check=engine.cache.contract == "rows")
        model = onnx.load(engine.folder / spec.file, load_external_data=False)
        assert {i.version for i in model.opset_import if i.domain == ""} == {23}
        for given, named in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            assert [(v.name, shape(v)) for v in given] == [(t.name, t.shape) for t in named]
        if engine.cache.contract == "rows":  # no shape rules for com.microsoft
            model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            known = {v.name: shape(v) for v in (*model.graph.value_info, *model.graph.output)}
            made = [name for node in model.graph.node for name in node.output]
            assert not [name for name in made if None in known.get(name, (None,))]


def shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def test_a_weights_file_is_shared_and_holds_a_tied_table_once(tmp_path: Path) -> None:
    """Bug: a tied table small enough to keep its data was two parameters after the move to meta."""
    source = tiny.checkpoint(tmp_path / "source", tiny.model("llama"))
    assert "lm_head.weight" not in source.names()
    engine = tiny.export_tiny(
        source, CacheSpec("append", 64, 16, "none", 0, 0, (64,), 16), tmp_path / "graphs"
    )
    places = {}
    for spec in engine.entry.graphs:
        for tensor in graph(engine, spec.kind).graph.initializer:
            where = {e.key: e.value for e in tensor.external_data}
            if where:
                assert where["location"] == engine.entry.weights
                assert places.setdefault(tensor.name, where) == where
    parameters = sum(p.numel() for p in tiny.model("llama").parameters())
    angles = 2 * tiny.POSITIONS * 8
    stored = (engine.folder / engine.entry.weights).stat().st_size
    assert 4 * (parameters + angles) <= stored <= 4 * (parameters + angles) + 64 * len(places)


def test_an_npu_s_quantised_graphs_add_one_operator_only(tmp_path: Path) -> None:
    """MatMulNBits compiles for an NPU; the fused norms and GroupQueryAttention of com.microsoft do not."""
    source = tiny.checkpoint(tmp_path / "source", tiny.model("gemma3"))
    precision = {"linear": "int4", "head": "fp16", "embedding": "fp16"}
    cache = CacheSpec("rows", 64, 16, "keydiff", 2, 4, (64,), 16)
    engine = tiny.export_tiny(source, cache, tmp_path / "graphs", precision=precision)
    for kind in ("prefill", "verify", "decode"):
        nodes = graph(engine, kind).graph.node
        assert {n.op_type for n in nodes if n.domain} == {"MatMulNBits"}
        assert sum(n.op_type == "MatMulNBits" for n in nodes) == 2 * 7
    assert {n.domain for n in graph(engine, "commit").graph.node} == {""}
    want = own_logits(tiny.model("gemma3"), TOKENS[:9])[-1].numpy()
    got = engine.prefill(TOKENS[:9])
    assert np.corrcoef(got, want)[0, 1] > 0.85  # rounded weights, the same model

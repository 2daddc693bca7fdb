"""The npu's list of operators is what Qualcomm's compiler takes and computes, one operator at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgespec.profiles import operators, refused
from edgespec.soc import SOCS

pytest.importorskip(
    "onnxruntime_qnn", reason="Qualcomm's compiler is not installed (EDGESPEC_QNN=1 scripts/setup)"
)

from edgespec.exporters import qualcomm

RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal((1, 4, 8)).astype(np.float32) for _ in "ab")
POSITIVE, TRUE, FALSE = np.abs(X) + 0.5, X > 0, Y > 0
HEADS = RNG.standard_normal((1, 2, 4, 8)).astype(np.float32)
W, ONES = RNG.standard_normal((8, 6)).astype(np.float32), np.ones(8, np.float32)
CODES = RNG.integers(0, 256, (32, 1, 16)).astype(np.uint8)
ANGLES = [np.cos(X[..., :4]), np.sin(X[..., :4])]
INTS = RNG.integers(0, 100, (1, 8)).astype(np.int32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# Operator -> what flows in (a graph's inputs), constants behind it, attributes, number of outputs.
Case = tuple[list[np.ndarray], list[np.ndarray], dict[str, Any], int]
CASES: dict[str, Case] = {
    **{op: ([X, Y], [], {}, 1) for op in ("Add", "Sub", "Mul", "Max", "Min")},
    **{op: ([X], [], {}, 1) for op in ("Neg", "Exp", "Relu", "Sigmoid", "Tanh", "Gelu", "Identity")},
    **{op: ([X, Y], [], {}, 1) for op in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")},
    **{op: ([POSITIVE], [], {}, 1) for op in ("Sqrt", "Reciprocal")},
    **{op: ([X], [], {"axis": -1}, 1) for op in ("Softmax", "LogSoftmax")},
    **{f"Reduce{kind}": ([X], [ints(-1)], {"keepdims": 1}, 1) for kind in ("Sum", "Mean", "Max", "Min")},
    **{f"{kind}Normalization": ([X], [ONES], {"axis": -1, "epsilon": 1e-5}, 1) for kind in ("RMS", "Layer")},
    "And": ([TRUE, FALSE], [], {}, 1),
    "Or": ([TRUE, FALSE], [], {}, 1),
    "Not": ([TRUE], [], {}, 1),
    "Equal": ([INTS, INTS[:, ::-1].copy()], [], {}, 1),
    "Div": ([X, POSITIVE], [], {}, 1),
    "Pow": ([X], [np.float32(2)], {}, 1),
    "Clip": ([X], [np.float32(-1), np.float32(1)], {}, 1),
    "Where": ([TRUE, X, Y], [], {}, 1),
    "MatMul": ([X], [W], {}, 1),
    "Concat": ([X, Y], [], {"axis": -1}, 1),
    "Split": ([X], [ints(3, 5)], {"axis": -1}, 2),
    "Slice": ([X], [ints(1), ints(5), ints(2)], {}, 1),
    "Gather": ([INTS % 8], [], {"axis": 0}, 1),
    "GatherElements": ([X, np.sort(INTS.reshape(1, 1, 8) % 4, -1)], [], {"axis": 1}, 1),
    "Reshape": ([X], [ints(1, 2, 2, 8)], {}, 1),
    "Transpose": ([X], [], {"perm": [0, 2, 1]}, 1),
    "Expand": ([X[:, :1]], [ints(1, 4, 8)], {}, 1),
    "Squeeze": ([X], [ints(0)], {}, 1),
    "Unsqueeze": ([X], [ints(1)], {}, 1),
    "Cast": ([INTS], [], {"to": TensorProto.FLOAT}, 1),
    "ArgMax": ([X], [], {"axis": -1, "keepdims": 0}, 1),
    "Conv": ([HEADS], [RNG.standard_normal((3, 2, 2, 2)).astype(np.float32)], {"strides": [2, 2]}, 1),
    "ReduceL2": ([X], [ints(-1)], {"keepdims": 1}, 1),
    "TopK": ([X], [ints(3)], {"axis": -1}, 2),
    "QuantizeLinear": ([X], [np.float32(1e-3), np.uint16(2**15)], {}, 1),
    "DequantizeLinear": ([(X * 40).astype(np.int8)], [np.float32(0.02), np.int8(0)], {}, 1),
    "RotaryEmbedding": ([HEADS, *ANGLES], [], {"interleaved": 0}, 1),
    "MatMulNBits": (
        [RNG.standard_normal((1, 4, 32)).astype(np.float32)],
        [CODES, np.full(32, 0.1, np.float32)],
        {"K": 32, "N": 32, "bits": 4, "block_size": 32},
        1,
    ),
    "Erf": ([X], [], {}, 1),
    "Trilu": ([X], [], {"upper": 0}, 1),
    "MatMulInteger": ([INTS.astype(np.uint8)], [(W * 9).astype(np.uint8)], {}, 1),
    "SkipSimplifiedLayerNormalization": ([X, Y], [ONES], {"epsilon": 1e-5}, 1),
}  # fmt: skip
CODES_OF = ("QuantizeLinear", "DequantizeLinear")
REFUSED = {"Erf", "Trilu", "MatMulInteger", "SkipSimplifiedLayerNormalization"}  # of those with a case


def graph(domain: str, op: str, folder: Path) -> Path:
    """A graph of the operator alone."""
    flowing, constants, attributes, count = CASES[op]
    names = [f"x{i}" for i in range(len(flowing))]
    held = [numpy_helper.from_array(array, f"c{i}") for i, array in enumerate(constants)]
    given = [*names, *(c.name for c in held)]
    if op == "Gather":  # from a table
        held, given = [numpy_helper.from_array(W, "table")], ["table", *names]
    made = [f"y{i}" for i in range(count)]
    nodes = [helper.make_node(op, given, made, name=f"module/{op}", domain=domain, **attributes)]
    if op in CODES_OF:  # what makes codes, or makes floats of them, is taken beside what computes
        makes = op == "QuantizeLinear"
        squares = helper.make_node(
            "Mul", [given[0], given[0]] if makes else ["m", "m"], ["m" if makes else "y0"]
        )
        codes = helper.make_node(op, ["m", *given[1:]] if makes else given, ["y0" if makes else "m"])
        nodes = [squares, codes] if makes else [codes, squares]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, flowing, strict=True)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, op, inputs, [], held),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
        ir_version=11,
    )
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    path = folder / f"{op}.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("domain", "op"), sorted(operators("npu")), ids=lambda word: word or "onnx")
def test_an_operator_of_the_list_compiles_for_every_soc_and_computes(
    domain: str, op: str, tmp_path: Path
) -> None:
    path = graph(domain, op, tmp_path)
    for soc in SOCS.values():
        assert qualcomm.outcome(path, soc).refusal == ""
    feed = {f"x{i}": array for i, array in enumerate(CASES[op][0])}
    want = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    got = qualcomm.opened(path, SOCS["8-elite"]).run(None, feed)
    for ours, theirs in zip(want, got, strict=True):
        near = 0.02 * float(np.abs(ours.astype(np.float64)).max())
        np.testing.assert_allclose(theirs.astype(np.float64), ours.astype(np.float64), rtol=0, atol=near)


@pytest.mark.parametrize(("domain", "op"), [pair for pair in sorted(refused("npu")) if pair[1] in REFUSED])
def test_an_operator_said_to_stay_on_the_cpu_does(domain: str, op: str, tmp_path: Path) -> None:
    path = graph(domain, op, tmp_path)
    for soc in SOCS.values():
        assert qualcomm.outcome(path, soc).refusal == f"{f'{domain}.{op}'.lstrip('.')} at module"

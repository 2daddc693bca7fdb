"""Builds one XNNPACK subgraph node by node, as ExecuTorch's delegate reads it. Knows XNNPACK and no models.

The subgraph is made directly, not by ExecuTorch's partitioner: that one walks a traced program forty times,
minutes for each width of a real model, where this takes a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput

from edgespec.exporters.grids import packed

NO_VALUE = 2**32 - 1
IN_STORE = 2**64 - 1  # where the bytes of a constant are: in the store, under its name
INPUT, OUTPUT = 1, 2  # XNN_VALUE_FLAG_EXTERNAL_*
TRANSPOSE_B = 1  # XNN_FLAG_TRANSPOSE_B
ALIGNMENT = 64  # bytes
MOST_JOINED = 5  # tensors that one concatenation takes
LARGEST = 3.4e38
SCHEMA, FLATC = "backends/xnnpack/serialization/schema.fbs", "data/bin/flatc"  # in the executorch package
HEADER = 32  # bytes, with its padding


@dataclass(frozen=True)
class Value:
    """A tensor of a subgraph; `coded`: of 8-bit codes, else float32."""

    id: int
    shape: tuple[int, ...]
    coded: bool = False


@dataclass
class Constants:
    """A model's stored arrays, each once whatever methods use it; `tag` is the weights file without .ptd."""

    tag: str
    store: NamedDataStore = field(default_factory=NamedDataStore)
    names: dict[Hashable, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def named(self, key: Hashable, make: Callable[[], np.ndarray]) -> tuple[str, tuple[int, ...]]:
        """The stored name of an array and its shape; `make` gives it when it is first asked for."""
        if key not in self.names:
            array = np.ascontiguousarray(make())
            data = array.tobytes()
            name = hashlib.sha256(data).hexdigest()
            self.store.add_named_data(name, data, ALIGNMENT, external_tag=self.tag)
            self.names[key] = name, array.shape or (1,)
        return self.names[key]

    def output(self) -> NamedDataStoreOutput:
        """Everything that was stored, as a delegate hands it over."""
        return self.store.get_named_data_store_output()


class Subgraph:
    """A subgraph under construction; equal constants and equal work are written once."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.nodes: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []
        self.codings: dict[int, tuple[str, dict[str, Any]]] = {}  # by value
        self.data = [{"offset": 0, "size": 0, "named_key": ""}]
        self.inputs: list[Value] = []
        self.arrays: list[np.ndarray] = []  # of the last inputs
        self.memo: dict[Hashable, Any] = {}

    def input(self, shape: Sequence[int]) -> Value:
        """The next tensor that the delegate is called with."""
        value = self._value(shape, external=len(self.inputs), flags=INPUT)
        self.inputs.append(value)
        return value

    def stored(self, key: Hashable, make: Callable[[], np.ndarray]) -> Value:
        """A stored float32 array for `linear`. What is not packed must be `given`: the delegate frees what it
        packed from, and reads on.
        """
        return self.once(("stored", key), lambda: self._value(*self._data(key, make, 4)))

    def coded(self, key: Hashable, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Value:
        """A stored weight [n,k] for `linear` as int8 codes, with a float32 scale for each row."""

        def define() -> Value:
            both = functools.cache(make)
            shape, codes = self._data((key, "codes"), lambda: both()[0].astype(np.int8), 1)
            _, scales = self._data((key, "scale"), lambda: both()[1], 4)
            per = {"scale": [], "channel_dim": 0, "scale_buffer_idx": scales, "num_scales": shape[0]}
            return self._value(shape, codes, coding=("qcint8", "PerChannelQuant", per))

        return self.once(("coded", key), define)

    def coded_blocks(self, key: Hashable, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Value:
        """A stored weight [n,k] for `linear` as 4-bit codes around 8 in blocks of 32 inputs, each with a
        scale [n,k/32] that bfloat16 holds.
        """

        def define() -> Value:
            both = functools.cache(make)
            shape, codes = self._data((key, "codes"), lambda: packed(both()[0]), 1)
            halves = lambda: (both()[1].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # noqa: E731
            blocks, scales = self._data((key, "scale"), halves, 2)
            per = {"scale": [], "channel_dim": 0, "group_size": 2 * shape[1] // blocks[1]}
            per |= {"scale_buffer_idx": scales, "num_scales": blocks[0] * blocks[1]}
            whole = (shape[0], 2 * shape[1])
            return self._value(whole, codes, coding=("qbint4", "PerChannelGroupQuant", per))

        return self.once(("coded", key), define)

    def _data(self, key: Hashable, make: Callable[[], np.ndarray], size: int) -> tuple[tuple[int, ...], int]:
        """A stored array's shape, and its place among the subgraph's constants."""
        name, shape = self.constants.named(key, make)
        self.data.append({"offset": IN_STORE, "size": size * int(np.prod(shape)), "named_key": name})
        return shape, len(self.data) - 1

    def given(self, key: Hashable, make: Callable[[], np.ndarray]) -> Value:
        """A constant array that the delegate is called with, after all other inputs."""

        def define() -> Value:
            array = np.array(make(), np.float32)
            self.arrays.append(array)
            return self.input(array.shape)

        return self.once(("given", key), define)

    def number(self, value: float) -> Value:
        """A constant of one element."""
        return self.given(("number", value), lambda: np.array([value], np.float32))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`'s answer, computed at the first call with this key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def unary(self, kind: str, x: Value) -> Value:
        """An element-wise function: Sigmoid, Tanh, Gelu, Square, ReciprocalSquareRoot, ...; or Softmax."""
        y = self._value(x.shape)
        self._node(kind, y, input_id=x.id)
        return y

    def relu(self, x: Value) -> Value:
        """What is below 0 becomes 0."""
        y = self._value(x.shape)
        self._node("Clamp", y, input_id=x.id)
        self.nodes[-1]["output_min_max"] = {"output_min": 0.0, "output_max": LARGEST}
        return y

    def binary(self, kind: str, a: Value, b: Value) -> Value:
        """Add, Subtract, Multiply or Div, broadcast as numpy does."""
        y = self._value(np.broadcast_shapes(a.shape, b.shape))
        self._node(kind, y, input1_id=a.id, input2_id=b.id)
        return y

    def linear(self, x: Value, weight: Value) -> Value:
        """x [...,k] · Wᵀ, the weight [n,k] `stored` or of codes: then each row of x gets 8-bit codes too."""
        y = self._value((*x.shape[:-1], weight.shape[0]))
        x = self.once(("quantised", x), lambda: self._quantised(x)) if weight.coded else x
        self._node("FullyConnected", y, input1_id=x.id, filter_id=weight.id, bias_id=NO_VALUE)
        return y

    def _quantised(self, x: Value) -> Value:
        y = self._value(x.shape, coding=("qdint8", "PerTokenDynamicQuant", {"num_nonbatch_dims": 1}))
        self._node("Convert", y, input_id=x.id)
        return y

    def product(self, a: Value, b: Value, turned: bool = False) -> Value:
        """a [...,m,k] · b [...,k,n], or with `turned` · b [...,n,k] transposed; both computed."""
        y = self._value((*a.shape[:-1], b.shape[-2 if turned else -1]))
        flags = TRANSPOSE_B if turned else 0
        self._node("BatchMatrixMultiply", y, input1_id=a.id, input2_id=b.id, flags=flags)
        return y

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """The same numbers in another shape, in which one size may be -1."""
        left = int(np.prod(x.shape)) // abs(int(np.prod(shape)))
        whole = tuple(left if size == -1 else int(size) for size in shape)
        if whole == x.shape:
            return x
        y = self._value(whole)
        self._node("StaticReshape", y, input_id=x.id, num_dims=len(whole), new_shape=list(whole))
        return y

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """The axes in another order; no copy where only axes of one element move."""
        shape = tuple(x.shape[i] for i in perm)
        if [i for i in perm if x.shape[i] > 1] == [i for i, size in enumerate(x.shape) if size > 1]:
            return self.reshape(x, shape)
        y = self._value(shape)
        self._node("StaticTranspose", y, input_id=x.id, num_dims=len(perm), perm=[int(i) for i in perm])
        return y

    def slice(self, x: Value, axis: int, start: int, size: int) -> Value:
        """`size` elements of one axis."""
        axis %= len(x.shape)
        if size == x.shape[axis]:
            return x
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        y = self._value(shape)
        offsets = [start if i == axis else 0 for i in range(len(shape))]
        sizes = {"num_dims": len(shape), "offsets": offsets, "sizes": list(shape)}
        self._node("StaticSlice", y, input_id=x.id, **sizes)
        return y

    def pad(self, x: Value, size: int) -> Value:
        """The last axis made this long by zeros behind it."""
        more = size - x.shape[-1]
        if not more:
            return x
        y = self._value((*x.shape[:-1], size))
        before, behind = [0] * len(x.shape), [0] * (len(x.shape) - 1) + [more]
        room = {"pre_paddings": before, "post_paddings": behind, "padding_value": 0.0}
        self._node("StaticConstantPad", y, input_id=x.id, **room)
        return y

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """Tensors one behind the other."""
        axis %= len(parts[0].shape)
        while len(parts) > 1:
            groups = [parts[i : i + MOST_JOINED] for i in range(0, len(parts), MOST_JOINED)]
            parts = [self._joined(group, axis) for group in groups]
        return parts[0]

    def _joined(self, parts: Sequence[Value], axis: int) -> Value:
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        y = self._value(shape)
        ids = [part.id for part in parts] + [NO_VALUE] * (MOST_JOINED - len(parts))
        given = {f"input{i}_id": value for i, value in enumerate(ids, 1)}
        self._node(f"Concatenate{len(parts)}", y, axis=axis, **given)
        return y

    def finish(self, outputs: Sequence[Value]) -> bytes:
        """The subgraph for ExecuTorch's delegate; its outputs follow its inputs."""
        ids = []
        for place, given in enumerate(outputs):
            value = given
            if self.values[value.id]["flags"]:  # an input, or an output already
                value = self.unary("Copy", value)
            self.values[value.id] |= {"external_id": len(self.inputs) + place, "flags": OUTPUT}
            ids.append(value.id)
        return serialized(
            {
                "version": "0",
                "xnodes": self.nodes,
                "xvalues": [self._whole(value) for value in self.values],
                "num_externs": len(self.inputs) + len(ids),
                "input_ids": [value.id for value in self.inputs],
                "output_ids": ids,
                "constant_data": self.data,
            }
        )

    def _whole(self, value: dict[str, Any]) -> dict[str, Any]:
        """A value as the schema has it, with what its codes mean."""
        if value["id_out"] not in self.codings:
            return {"xvalue_union_type": "XNNTensorValue", "xvalue_union": value}
        kind, what = self.codings[value["id_out"]]
        whole = {"tensor_value": value, "quant_params_type": kind, "quant_params": what}
        return {"xvalue_union_type": "XNNQuantizedTensorValue", "xvalue_union": whole}

    def _value(
        self,
        shape: Sequence[int],
        buffer: int = 0,
        external: int = NO_VALUE,
        flags: int = 0,
        coding: tuple[str, str, dict[str, Any]] | None = None,
    ) -> Value:
        """A value; `coding`: its element type and the kind and fields of what its codes mean."""
        value = Value(len(self.values), tuple(int(size) for size in shape), coding is not None)
        if coding:
            self.codings[value.id] = coding[1:]
        self.values.append(
            {
                "datatype": f"xnn_datatype_{coding[0] if coding else 'fp32'}",
                "num_dims": len(value.shape),
                "dims": list(value.shape),
                "constant_buffer_idx": buffer,
                "external_id": external,
                "flags": flags,
                "id_out": value.id,
            }
        )
        return value

    def _node(self, kind: str, output: Value, **what: Any) -> None:
        node = {"flags": 0, **what, "output_id": output.id}
        whole = {"xnode_union_type": f"XNN{kind}", "xnode_union": node, "debug_handle": len(self.nodes)}
        self.nodes.append(whole)


def serialized(graph: dict[str, Any]) -> bytes:
    """A graph by XNNPACK's schema as the flatbuffer that the delegate reads, behind its header.

    The header: "XH00" at byte 4, its length, then where the flatbuffer is and its size, and where constants
    would be that are in no store.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "graph.json"
        file.write_text(json.dumps(graph))
        command = [package() / FLATC, "--binary", "-o", temporary, package() / SCHEMA, file]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        data = file.with_suffix(".bin").read_bytes()
    size, whole = len(data), -(-len(data) // 16) * 16
    header = struct.pack("<4x4sHIIIQ", b"XH00", 30, HEADER, size, HEADER + whole, 0)
    return header.ljust(HEADER, b"\0") + data.ljust(whole, b"\0")


@functools.cache
def package() -> Path:
    """The folder of the executorch package."""
    spec = find_spec("executorch")
    (place, *_) = (spec and spec.submodule_search_locations) or ["executorch"]
    return Path(place)

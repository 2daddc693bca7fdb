"""Builds one ONNX graph node by node. Knows onnx_ir and nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

FUNCTIONS = "edgespec"  # the domain of the functions that graphs define
OPSETS = {"": 23, "com.microsoft": 1, FUNCTIONS: 1}
IR_VERSION = 11


@dataclass(frozen=True)
class Given:
    """An attribute of a node's function, inside its body."""

    name: str
    type: ir.AttributeType


class Builder:
    """Appends nodes to a graph under construction; equal constants and equal work are written once.

    `named`: what `call` makes are functions that the graph defines, for which a runtime may have kernels.
    """

    def __init__(self, named: bool = False) -> None:
        self.named = named
        self.functions: dict[str, ir.Function] = {}
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}
        self.memo: dict[Hashable, Any] = {}
        self.module = ""  # the path of the module whose nodes are being made; they are named after it

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Append a node; its output, or a tuple of them where `outputs` > 1."""
        attributes = {
            key: ir.RefAttr(key, value.name, value.type) if isinstance(value, Given) else value
            for key, value in attributes.items()
        }
        node = ir.node(kind, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        if self.module:
            node.name = f"{self.module}/{kind}_{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{kind.lower()}_{len(self.nodes)}" + (f"_{i}" if i else "")
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def call(
        self, name: str, make: Callable[..., Any], *inputs: ir.Value, outputs: int = 1, **attributes: Any
    ) -> Any:
        """What `make(builder, *inputs, **attributes)` computes, a value or a tuple of `outputs`; as a node of
        its own if named.
        """
        if not self.named:
            return make(self, *inputs, **attributes)
        if name not in self.functions:
            body = Body()
            values = [ir.Value(name=f"given_{i}") for i in range(len(inputs))]
            types = {key: ir.convenience.convert_attribute(key, v).type for key, v in attributes.items()}
            made = make(body, *values, **{key: Given(key, kind) for key, kind in types.items()})
            out = [made] if outputs == 1 else list(made)
            domains = sorted({node.domain for node in body.nodes} | {""})
            graph = ir.Graph(values, out, nodes=body.nodes, opset_imports={d: OPSETS[d] for d in domains})
            own = [ir.Attr(key, kind, None) for key, kind in types.items()]
            self.functions[name] = ir.Function(FUNCTIONS, name, graph=graph, attributes=own)
        return self.op(name, *inputs, domain=FUNCTIONS, outputs=outputs, **attributes)

    def ints(self, values: Any) -> ir.Value:
        """A constant of int64 numbers, or one that a function is given."""
        if isinstance(values, Given):
            return self.op("Constant", value_ints=values)
        return self.const(np.array(values, np.int64))

    def const(self, array: Any) -> ir.Value:
        """A constant, once per value and type."""
        array = np.asarray(array, order="C")
        key = ("const", array.dtype.str, array.shape, array.tobytes())
        return self.once(
            key, lambda: self.initializer(ir.tensor(array, name=f"const_{len(self.initializers)}"))
        )

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A stored tensor under its own name, once."""
        name = tensor.name or ""
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def input(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`'s answer, computed at the first call with this key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def model(self, name: str, outputs: dict[str, tuple[ir.Value, ir.DataType, tuple[int, ...]]]) -> ir.Model:
        """The finished model: unused nodes dropped, outputs named, typed and shaped."""
        used = live(self.nodes, [value for value, _, _ in outputs.values()])
        taken: list[ir.Value] = []
        for label, (value, dtype, shape) in outputs.items():
            if (
                value.producer() is None or value in taken
            ):  # an input or a shared value needs a node to carry the output's name
                value = self.op("Identity", value)
                used.append(self.nodes[-1])
            value.name, value.shape, value.type = label, ir.Shape(shape), ir.TensorType(dtype)
            taken.append(value)
        read = {v for node in used for v in node.inputs if v is not None}
        domains = {node.domain for node in used} | {""}
        graph = ir.Graph(
            self.inputs,
            taken,
            nodes=used,
            name=name,
            initializers=[v for v in self.initializers.values() if v in read],
            opset_imports={d: OPSETS[d] for d in sorted(domains)},
        )
        functions = [f for name, f in self.functions.items() if any(node.op_type == name for node in used)]
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgespec", functions=functions)


class Body(Builder):
    """Builds the body of a function, which stores nothing: its constants are nodes."""

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A constant node."""
        return self.op("Constant", value=tensor)


def live(nodes: list[ir.Node], wanted: list[ir.Value]) -> list[ir.Node]:
    """The nodes that something wanted depends on, in order."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if any(output in needed for output in node.outputs):
            kept.append(node)
            needed.update(v for v in node.inputs if v is not None)
    return kept[::-1]

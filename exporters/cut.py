"""Cuts a model's program into parts, each a program of its own over a run of its layers.

Between two parts goes one value, the sum of activations after a layer; angles and positions, which depend on
no token, are computed in each part anew. Knows no family, no device and no width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from edgespec.errors import InputError
from edgespec.exporters.program import Program
from edgespec.parts import Part
from edgespec.spec import HIDDEN


def cut(program: Program, parts: Sequence[Part], family: str) -> tuple[Program, ...]:
    """The program of each part: one before the last gives `hidden_i` instead of logits, which the next takes
    instead of tokens.

    InputError where more than one value, or no sum, goes from a layer to the next.
    """
    graph, made = program.graph, []
    given: ir.Value | None = None
    for part, following in zip(parts, (*parts[1:], None), strict=True):
        handed = None if following is None else between(graph, following.layers[0], family)
        shared = [v for v in graph.inputs if given is None or v.name != "tokens"]
        inputs = shared if given is None else [given, *shared]
        own = ir.convenience.extract(graph, inputs, [handed or graph.outputs[0]])
        if given is not None:
            own.inputs[0].name = f"{HIDDEN}{part.number}"
        made.append(replace(program, graph=own))
        given = handed
    return tuple(made)


def between(graph: ir.Graph, layer: int, family: str) -> ir.Value:
    """The one value of tokens that is alive last before a layer's attention."""
    nodes = list(graph)
    place = {node: i for i, node in enumerate(nodes)}
    seen = {v for v in graph.inputs if v.name == "tokens"}
    for node in nodes:
        if any(v in seen for v in node.inputs):
            seen.update(node.outputs)
    end = next(
        i for i, n in enumerate(nodes) if n.op_type == "Attend" and n.attributes["layer"].value == layer
    )
    last = {v: max((place[node] for node in v.consumers()), default=-1) for v in seen}
    born = {v: place.get(v.producer(), -1) for v in seen}
    for at in range(end, 0, -1):
        alive = [v for v in seen if born[v] < at <= last[v]]
        if len(alive) == 1:
            break
    if len(alive) != 1 or residual(alive[0]) is None:
        raise InputError(
            f"{family} hands more than one sum of activations to layer {layer}, so no part can end before it",
            "leave --parts out",
        )
    return alive[0]


def residual(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The two terms of a sum of two activations of one shape, or None."""
    node = x.producer()
    if node is None or node.op_type != "Add" or any(v is None for v in node.inputs):
        return None
    a, c = node.inputs
    return (a, c) if a.shape == c.shape == x.shape else None

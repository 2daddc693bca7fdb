"""The traced step as a short ONNX program of named parts (Linear, Embed, Norm, Rope, Attend, Take) and
standard operators.

`torch.onnx.export` does the translation; nothing here knows a model family, a device, a width or a weight's
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset23
from onnxscript.values import Op, Opset

from edgespec.errors import InputError
from edgespec.exporters.step import Skeleton, trace
from edgespec.exporters.to_onnx import to_onnx
from edgespec.spec import ModelSpec

DOMAIN = "edgespec"


@dataclass(frozen=True)
class Program:
    """The named-parts graph; `shapes` of every parameter by Transformers name.

    `constants` the values of its buffers.
    """

    graph: ir.Graph
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, torch.Tensor]


def part(name: str, inputs: str, outputs: str, **attributes: str) -> Op:
    """An operator of our own for onnxscript to emit; attribute kinds are 'i' or 'f'."""
    one = OpSchema.FormalParameterOption.Single
    kinds = {"i": OpSchema.AttrType.INT, "f": OpSchema.AttrType.FLOAT}
    formal = lambda n: OpSchema.FormalParameter(  # noqa: E731
        n, "tensor(int64)" if n in ("ids", "count", "row") else "tensor(float)", "", param_option=one
    )
    return Op(
        Opset(DOMAIN, 1),
        name,
        OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[formal(n) for n in inputs.split()],
            outputs=[formal(n) for n in outputs.split()],
            attributes=[OpSchema.Attribute(n, kinds[kind], required=True) for n, kind in attributes.items()],
        ),
    )


ATTEND = part(
    "Attend", "q k v keys values count", "out new_k new_v", layer="i", scale="f", window="i", softcap="f"
)
NORM = part("Norm", "x w", "y", epsilon="f", centred="i", offset="f")
ROPE = part("Rope", "x cos sin", "y", interleaved="i")
LINEAR = part("Linear", "x w", "y")
EMBED = part("Embed", "w ids", "y")
TAKE = part("Take", "x row", "y")


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """aten.linear: the product is ours to lower, the bias a plain Add."""
    y = LINEAR(x, weight)
    return y if bias is None else opset23.Add(y, bias)


def index(x: Any, indices: Any) -> Any:
    """aten.index as `hidden[:, row, :]` uses it: rows of axis 1."""
    if len(indices) != 2 or indices[0] is not None:
        raise NotImplementedError("only hidden[:, rows] is translated")
    return TAKE(x, indices[1])


def translations() -> dict[Any, Any]:
    """What torch.onnx.export writes for our operators and for the three it would spell out."""
    ours, aten = torch.ops.edgespec, torch.ops.aten
    return {
        ours.attend.default: lambda q, k, v, keys, values, count, layer, scale, window, softcap: ATTEND(
            q, k, v, keys, values, count, layer=layer, scale=scale, window=window, softcap=softcap
        ),
        ours.norm.default: lambda x, w, epsilon, centred, offset: NORM(
            x, w, epsilon=epsilon, centred=int(centred), offset=offset
        ),
        ours.rope.default: lambda x, cos, sin, interleaved: ROPE(x, cos, sin, interleaved=int(interleaved)),
        aten.linear.default: linear,
        aten.embedding.default: lambda w, ids, *rest, **named: EMBED(w, ids),
        aten.index.Tensor: index,
    }


def build_program(bones: Skeleton, spec: ModelSpec) -> Program:
    """Trace a skeleton into a Program; InputError where the model cannot be traced."""
    try:
        traced = trace(bones.model, spec)
        ir_model = to_onnx(traced, optimize=False, custom_translation_table=translations())
    except InputError:
        raise
    except Exception as error:  # torch.export and torch.onnx.export raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split("\x1b")[0].strip()
        raise InputError(
            f"{spec.family} cannot be traced with fixed shapes: {first}",
            "its code depends on values that only exist at run time; choose another model",
        ) from error
    graph = ir_model.graph
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.device.type == "meta":
            graph.initializers.pop(name)
            value.const_value = None
            value.name = name.removeprefix("model.")
            shapes[value.name] = tuple(raw.shape)
            graph.inputs.append(value)  # without data the optimizer leaves it alone
    onnxscript.optimizer.optimize(ir_model)
    return Program(ir_model.graph, shapes, bones.constants)

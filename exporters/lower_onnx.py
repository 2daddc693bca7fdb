"""Program -> ONNX graph of one width over caches of one size.

Device choices live in lower_attention, weight forms in forms.

Knows the program's named parts and nothing of model families or weight values.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgespec.errors import InputError
from edgespec.exporters.build import Builder
from edgespec.exporters.cut import residual
from edgespec.exporters.lower_attention import append_attend, new_queries, rows_attend
from edgespec.exporters.lower_codes import HEAD, Spans, coded, coded_attend, codes_of
from edgespec.exporters.lower_context import absolute_ids, joined, masked
from edgespec.exporters.program import DOMAIN, Program
from edgespec.exporters.step import TRACED_WIDTH
from edgespec.parts import Part, parts_of
from edgespec.spec import (
    ABSORBING,
    CODED,
    HIDDEN,
    CacheSpec,
    ModelSpec,
    TensorSpec,
    step_inputs,
    step_outputs,
)

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
DTYPES = {"float32": FLOAT, "int32": INT32, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class Storage:
    """Where a model's parameters come from and how each is stored.

    `place(b, parameters, role)` -> (form, parts): role is linear, head or embedding, and several parameters
    are packed as one, row after row; `plain` gives float32 arrays. `spans`: what activations reach, where
    they are coded.
    """

    place: Callable[[Builder, tuple[str, ...], str], tuple[Any, dict[str, ir.Value]]]
    plain: Callable[[Builder, str, float], ir.Value]
    head: frozenset[str]
    embedding: frozenset[str]
    spans: Spans | None = None


@dataclass(frozen=True)
class Target:
    """What one graph is: kind, width, bucket, the model's cache, and whether ORT's fused operators serve.

    `head_ids`, `head_rows`: the tokens of a trimmed head and its rows; `context`: the rows given as input.
    `part`: which of the model's layers, None for all.
    """

    kind: str
    width: int
    bucket: int
    cache: CacheSpec
    fused: bool
    head_ids: np.ndarray | None = None
    head_rows: int = 0
    context: int = 0
    part: Part | None = None

    def tensors(self, spec: ModelSpec) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What the graph takes and gives."""
        kind, width, cache, bucket, part = self.kind, self.width, self.cache, self.bucket, self.part
        return (
            step_inputs(kind, width, spec, cache.rows(bucket), self.context, cache.dtype, part),
            step_outputs(kind, width, spec, cache, bucket, self.head_rows, context=self.context, part=part),
        )


class Lowering:
    """Walks a program once, giving each old value its new one."""

    def __init__(self, program: Program, spec: ModelSpec, storage: Storage, target: Target) -> None:
        self.program, self.spec, self.storage, self.target = program, spec, storage, target
        self.b = Builder(named=target.fused)
        self.width = target.width
        self.steps = np.arange(target.width, dtype=np.int32)
        self.values: dict[ir.Value, ir.Value] = {}
        self.order = {node: i for i, node in enumerate(program.graph)}
        self.attends: dict[int, ir.Node] = {}
        self.new_keys: dict[int, ir.Value] = {}
        self.new_values: dict[int, ir.Value] = {}
        self.flat: dict[
            ir.Value, ir.Value
        ] = {}  # a [1,S,H,d] value of the program that exists as [1,S,H·d] too
        self.part = target.part or parts_of((spec.layers,))[0]
        self.inputs = {
            t.name: self.b.input(t.name, DTYPES[t.dtype], t.shape) for t in target.tensors(spec)[0]
        }

    def run(self) -> ir.Model:
        """The whole graph."""
        for value in self.program.graph.inputs:
            self.feed(value)
        for node in self.program.graph:
            if not self.target.fused:  # an NPU's compiler may refuse a node: its name says where it stands
                self.b.module = module_of(node)
            getattr(
                self,
                f"lower_{node.op_type.lower()}"
                if node.domain == DOMAIN or node.op_type == "Reshape"
                else "copy",
            )(node)
        made = self.get(self.program.graph.outputs[0])
        self.b.module = "" if self.target.fused else "outputs"
        return self.b.model(f"{self.target.kind}_{self.target.width}", self.outputs(made))

    def feed(self, value: ir.Value) -> None:
        """The program's call inputs; its parameters are met where they are used."""
        if value.name == "tokens" or handed(value):
            self.values[value] = self.inputs[value.name or ""]
        elif value.name == "positions":
            made = self.places(self.steps)
            counted = any(node.op_type != "Embed" for node in value.consumers())
            self.values[value] = self.b.op("Cast", made, to=int(ir.DataType.INT64)) if counted else made

    def places(self, steps: np.ndarray) -> ir.Value:
        """Positions [1,S] of rows so many steps on.

        Padding rows beyond the model's last position share it.
        """
        made = self.b.op("Add", self.inputs["position"], self.b.const(steps[None]))
        return self.b.op("Min", made, self.b.const(np.int32(self.spec.positions - 1)))

    def get(self, value: ir.Value) -> ir.Value:
        """The new value of an old one.

        A parameter used outside Linear, Embed and Norm becomes a plain float32 array.
        """
        if value in self.values:
            return self.values[value]
        if value.const_value is not None:
            array = value.const_value.numpy()
            if TRACED_WIDTH in array.shape or (array.dtype.kind == "i" and (array == TRACED_WIDTH).any()):
                raise InputError(
                    f"{self.spec.family}: a constant of shape {array.shape} depends on the width",
                    "this model's code cannot be given a fixed width; please report it",
                )
            return self.b.const(array)
        return self.storage.plain(self.b, value.name or "", 0.0)

    def copy(self, node: ir.Node) -> None:
        """A standard operator, as it is."""
        made = self.b.op(
            node.op_type,
            *[None if v is None else self.get(v) for v in node.inputs],
            domain=node.domain,
            outputs=len(node.outputs),
            **{a.name: a.value for a in node.attributes.values()},
        )
        for old, new in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            self.values[old] = new

    def lower_reshape(self, node: ir.Node) -> None:
        """A reshape whose leading dimensions are its input's, so that it holds at any width."""
        source, target, out = node.inputs[0], node.inputs[1], node.outputs[0]
        wanted, given = [int(i) for i in target.const_value.numpy()], list(source.shape)
        if source in self.flat and len(out.shape) == 3:
            self.values[out] = self.flat[source]
            return
        shape = [0 if i < len(given) and size == given[i] else size for i, size in enumerate(wanted)]
        if TRACED_WIDTH in shape:
            raise InputError(
                f"{self.spec.family}: a reshape to {wanted} depends on the number of tokens in a call",
                "this model's code cannot be given a fixed width; please report it",
            )
        self.values[out] = self.b.op("Reshape", self.get(source), self.b.const(np.array(shape, np.int64)))

    def lower_linear(self, node: ir.Node) -> None:
        """x · Wᵀ in the weight's form; on a CPU all linears of one x are one product, split afterwards."""
        x, weight = node.inputs
        if weight.name in self.storage.head:
            rows = 1 if self.target.kind in ABSORBING else self.width
            made = self.product(x, (weight.name,), "head", rows)
            self.values[node.outputs[0]] = joined(self, self.get(x), made) if self.target.context else made
            return
        names = self.packed(x) if self.target.fused else (weight.name,)
        packed = self.b.once(("packed", x, names), lambda: self.product(x, names, "linear", self.width))
        if len(names) == 1:
            self.values[node.outputs[0]] = packed
            return
        sizes = self.b.const(np.array([self.program.shapes[name][0] for name in names], np.int64))
        parts = self.b.once(
            ("split", packed), lambda: self.b.op("Split", packed, sizes, axis=-1, outputs=len(names))
        )
        self.values[node.outputs[0]] = parts[names.index(weight.name)]

    def packed(self, x: ir.Value) -> tuple[str, ...]:
        """Names of the weights that multiply this activation, in the model's order."""
        linears = [n for n in x.consumers() if n.op_type == "Linear" and n.inputs[0] is x]
        return tuple(n.inputs[1].name for n in sorted(linears, key=lambda n: self.order[n]))

    def product(self, x: ir.Value, names: tuple[str, ...], role: str, rows: int) -> ir.Value:
        """One product with the (packed) weights."""
        form, parts = self.storage.place(self.b, names, role)
        n, k = sum(self.program.shapes[name][0] for name in names), self.program.shapes[names[0]][1]
        if form.name not in CODED:
            return form.linear(self.b, self.get(x), parts, rows, n, k)
        assert self.storage.spans is not None
        into, out = self.storage.spans.of(HEAD if role == "head" else names[0])
        given = coded(self.b, self.get(x), into)
        return coded(self.b, form.linear(self.b, given, parts, rows, n, k), out)

    def lower_embed(self, node: ir.Node) -> None:
        """Rows of a table: the token embedding in its form, any other table (angles) as float32."""
        table, ids = node.inputs
        if table.name in self.storage.embedding:
            form, parts = self.storage.place(self.b, (table.name,), "embedding")
            given = self.get(ids)
            if self.target.kind == "embeds":  # no table is asked for a row below 0: an NPU would not wrap
                given = self.b.op("Max", given, self.b.const(np.int32(0)))
            made = form.embed(self.b, given, parts, self.width, *self.program.shapes[table.name])
            if self.target.kind == "embeds":
                seen = self.b.op("Less", self.get(ids), self.b.const(np.int32(0)))
                seen = self.b.op("Unsqueeze", seen, self.b.const(np.array([2], np.int64)))
                made = self.b.op("Where", seen, self.inputs["features"], made)
        else:
            made = self.b.op("Gather", self.get(table), self.get(ids), axis=0)
        self.values[node.outputs[0]] = made

    def lower_norm(self, node: ir.Node) -> None:
        """RMSNormalization, or LayerNormalization where centred.

        Fused with the residual sum before it on a CPU.
        """
        x, weight = node.inputs
        epsilon, centred = node.attributes["epsilon"].value, node.attributes["centred"].value
        scale = self.storage.plain(self.b, weight.name, node.attributes["offset"].value)
        kind = "LayerNormalization" if centred else "RMSNormalization"
        if not self.target.fused and len(x.shape) == 4:
            made = self.norm_of_heads(kind, x, scale, epsilon)
        elif centred:
            made = self.b.op(kind, self.get(x), scale, axis=-1, epsilon=epsilon)
        elif self.target.fused and (terms := self.terms(x)) is not None:
            made, *unused, total = self.b.op(
                "SkipSimplifiedLayerNormalization",
                *terms,
                scale,
                domain="com.microsoft",
                outputs=4,
                epsilon=epsilon,
            )
            for value in unused:
                value.name = ""
            self.values[x] = total  # whoever adds to the residual stream next reads the kernel's own sum
        else:
            made = self.b.op(kind, self.get(x), scale, axis=-1, epsilon=epsilon)
        self.values[node.outputs[0]] = made

    def terms(self, x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """The two terms of a sum, or None where x is none; of one that another part made, itself and zeros:
        the fused kernel rounds otherwise than the norm alone.
        """
        if handed(x):
            return self.get(x), self.b.const(np.zeros((1, self.width, self.spec.hidden), np.float32))
        found = residual(x)
        return None if found is None else (self.get(found[0]), self.get(found[1]))

    def norm_of_heads(self, kind: str, x: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        """A norm over the last axis of [1,S,H,d] or [1,H,S,d], as one of [1,S·H,d].

        Qualcomm's compiler (onnxruntime-qnn 2.7.0) takes a norm of four dimensions beside a Transpose, and
        gives other numbers.
        """
        whole = [self.width if size == TRACED_WIDTH else int(size) for size in x.shape]
        flat = [1, whole[1] * whole[2], whole[3]]
        shape = lambda sizes: self.b.const(np.array(sizes, np.int64))  # noqa: E731
        made = self.b.op("Reshape", self.get(x), shape(flat))
        made = self.b.op(kind, made, scale, axis=-1, epsilon=epsilon)
        return self.b.op("Reshape", made, shape(whole))

    def lower_rope(self, node: ir.Node) -> None:
        """RotaryEmbedding over [1,H,S,d]."""
        self.values[node.outputs[0]] = self.rotate(node, self.get(node.inputs[0]))

    def rotate(self, node: ir.Node, x: ir.Value, **attributes: Any) -> ir.Value:
        """A Rope node's operator, applied to x in the layout that `attributes` say."""
        cos, sin = self.get(node.inputs[1]), self.get(node.inputs[2])
        half, dim = int(node.inputs[1].shape[-1]), int(node.inputs[0].shape[-1])
        if 2 * half < dim:
            attributes["rotary_embedding_dim"] = 2 * half
        return self.b.op(
            "RotaryEmbedding", x, cos, sin, interleaved=node.attributes["interleaved"].value, **attributes
        )

    def lower_take(self, node: ir.Node) -> None:
        """Prefill and embeds want the logits of one row, others of all."""
        x = self.get(node.inputs[0])
        if self.target.kind in ABSORBING:
            x = self.b.op("Gather", x, self.inputs["row"], axis=1)
        self.values[node.outputs[0]] = x

    def lower_attend(self, node: ir.Node) -> None:
        """The one attention operator, as the cache's contract has it."""
        attend = append_attend if self.target.cache.contract == "append" else rows_attend
        if self.target.cache.dtype == "int8":
            attend = coded_attend
        layer = node.attributes["layer"].value
        self.attends[layer] = node
        out, self.new_keys[layer], self.new_values[layer] = attend(self, node, layer)
        self.values[node.outputs[0]] = out

    def outputs(self, last: ir.Value) -> dict[str, tuple[ir.Value, ir.DataType, tuple[int, ...]]]:
        """Every output the specification names, from the logits, or a part's last sum, and the new rows."""
        b, t = self.b, self.target
        name = f"{HIDDEN}{self.part.number + 1}"
        made = self.of_logits(last) if self.part.last else {name: last}
        if t.cache.queries:
            made["new_queries"] = new_queries(self)
        for label, rows in (("keys", self.new_keys), ("values", self.new_values)):
            ordered = [rows[i] for i in self.part.layers]
            if t.cache.contract == "rows":
                every = b.op("Concat", *ordered, axis=0)
                made[f"new_{label}"] = every if t.cache.dtype == "float32" else codes_of(b, every)
            else:
                names = (f"new_{label}_{i}" for i in self.part.layers)
                made.update(zip(names, ordered, strict=True))
        return {w.name: (made[w.name], DTYPES[w.dtype], w.shape) for w in t.tensors(self.spec)[1]}

    def of_logits(self, logits: ir.Value) -> dict[str, ir.Value]:
        """The logits and what follows from them."""
        b, t = self.b, self.target
        logits = masked(self, logits) if t.context else logits
        made: dict[str, ir.Value] = {"logits": logits}
        best = b.op("ArgMax", logits, axis=-1, keepdims=0)
        ids = None if t.head_ids is None else absolute_ids(self, t.head_ids)
        made["argmax"] = (
            b.op("Cast", best, to=int(INT32)) if ids is None else b.op("Gather", ids, best, axis=0)
        )
        if t.kind == "draft":
            log_p = b.op("LogSoftmax", logits, axis=-1)
            p = b.op("Exp", log_p)
            entropy = b.op("ReduceSum", b.op("Mul", p, log_p), b.const(np.array([-1], np.int64)), keepdims=0)
            made["entropy"] = b.op("Neg", entropy)
            top = step_outputs("draft", t.width, self.spec, t.cache, t.bucket, t.head_rows)[3].shape[-1]
            made["top_probabilities"], places = b.op(
                "TopK", p, b.const(np.array([top], np.int64)), axis=-1, outputs=2
            )
            made["top_ids"] = (
                b.op("Cast", places, to=int(INT32)) if ids is None else b.op("Gather", ids, places, axis=0)
            )
        return made


def module_of(node: ir.Node) -> str:
    """The path of the module that a traced node came from, as Transformers names it; empty where unknown."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""


def handed(x: ir.Value) -> bool:
    """Whether another part of the model made this value."""
    return x.producer() is None and (x.name or "").startswith(HIDDEN)

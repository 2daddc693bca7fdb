"""Program -> one XNNPACK subgraph a call, with all that multiplies; what looks up, masks and chooses stands
before and after it (executorch_call.py).

Knows the program's named parts and nothing of model families or weight values. Every method is the pure
function of design section 3, over caches of exactly M slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from edgespec.errors import InputError
from edgespec.exporters.gguf_weights import Grid
from edgespec.exporters.grids import BLOCK, MIDDLE4, int8_rows, nearest_grid
from edgespec.exporters.lower_onnx import Target, module_of
from edgespec.exporters.program import DOMAIN, Program
from edgespec.exporters.step import TRACED_WIDTH
from edgespec.exporters.xnnpack import Constants, Subgraph, Value
from edgespec.spec import ABSORBING, ModelSpec

ELEMENTWISE = {"Add": "Add", "Sub": "Subtract", "Mul": "Multiply", "Div": "Div"}
LANES = 64  # more than any softmax kernel takes at once
SQRT_2_PI = 0.7978845608028654


@dataclass(frozen=True)
class Stored:
    """A model's parameters and buffers by the program's names: `read` gives one as float32, `read_head` the
    rows that the head keeps, whose names are `head`. `form`: of a role and a name; `grid`: the 4-bit grid
    that a parameter is on, or None.
    """

    read: Callable[[str], np.ndarray]
    read_head: Callable[[], np.ndarray]
    head: frozenset[str]
    form: Callable[[str, str], str]
    grid: Callable[[str], Grid | None]
    constants: Constants


class Lowering:
    """Walks a program once, giving each old value its new one in the subgraph.

    `lookups` are the tables whose rows the call reads, with True for rows of tokens and False for rows of
    positions; `masks` the windows for which a mask is wanted: both become inputs of the subgraph.
    """

    def __init__(self, program: Program, spec: ModelSpec, stored: Stored, target: Target) -> None:
        self.program, self.spec, self.stored, self.target = program, spec, stored, target
        self.g = Subgraph(stored.constants)
        self.values: dict[ir.Value, Value] = {}
        self.lookups: list[tuple[str, bool]] = []
        self.windows: list[int] = []
        self.new_keys: dict[int, Value] = {}
        self.new_values: dict[int, Value] = {}
        self.queries: dict[int, Value] = {}
        self.module = ""

    def run(self) -> bytes:
        """The subgraph's bytes. Its inputs: looked up rows, masks, places, the row or context, caches."""
        nodes, g, t = list(self.program.graph), self.g, self.target
        for node in nodes:
            if node.op_type == "Embed":
                self.look_up(node)
        self.windows = sorted({n.attributes["window"].value for n in nodes if n.op_type == "Attend"})
        slots = t.cache.rows(t.bucket)
        group = self.spec.heads // self.spec.kv_heads
        self.masks = {w: g.input((1, 1, group * t.width, columns(t))) for w in self.windows}
        self.places = g.input((1, 1, slots, t.width))
        self.row = g.input((1, 1, t.width)) if t.kind in ABSORBING else None
        self.context = g.input((1, self.spec.hidden, t.context)) if t.context else None
        cache = (1, self.spec.kv_heads, slots, self.spec.head_dim)
        self.caches = [g.input(cache) for _ in range(2 * self.spec.layers)]
        for node in nodes:
            if node.op_type != "Embed":
                self.lower(node)
        outputs = [self.get(self.program.graph.outputs[0])]
        layers = range(self.spec.layers)
        if t.cache.queries:
            stacked = g.concat([self.queries[i] for i in layers], 0)
            outputs.append(g.transpose(stacked, (2, 0, 1, 3)))
        outputs += [g.concat([rows[i] for i in layers], 0) for rows in (self.new_keys, self.new_values)]
        self.outputs = [value.shape for value in outputs]
        return g.finish(outputs)

    def lower(self, node: ir.Node) -> None:
        """One node; InputError where XNNPACK has no such operator."""
        make = getattr(self, f"lower_{node.op_type.lower()}", None)
        if make is None and node.op_type not in ELEMENTWISE:
            raise self.refused(node)
        self.values[node.outputs[0]] = make(node) if make else self.elementwise(node)

    def refused(self, node: ir.Node) -> InputError:
        """What to say of a node that cannot be lowered."""
        where = module_of(node) or self.spec.family
        name = node.op_type if node.domain in ("", DOMAIN) else f"{node.domain}.{node.op_type}"
        return InputError(
            f"{self.spec.family}: {where} needs the operator {name}, which is not lowered to XNNPACK",
            "use --format onnx, or choose another model",
        )

    def get(self, value: ir.Value) -> Value:
        """The new value of an old one; a parameter or constant is stored."""
        if value in self.values:
            return self.values[value]
        if value.const_value is not None:
            array = value.const_value.numpy()
            if TRACED_WIDTH in array.shape:
                raise InputError(
                    f"{self.spec.family}: a constant of shape {array.shape} depends on the width",
                    "this model's code cannot be given a fixed width; please report it",
                )
            return self.g.given(("value", array.shape, array.tobytes()), lambda: array)
        return self.weight(value.name or "")

    def weight(self, name: str, offset: float = 0.0) -> Value:
        """A parameter or a buffer, plus a number, as every operator but a product takes it."""
        return self.g.given((name, offset), lambda: self.stored.read(name) + np.float32(offset))

    def look_up(self, node: ir.Node) -> None:
        """Rows of a table are an input: XNNPACK looks nothing up."""
        table, ids = node.inputs
        if ids.name not in ("tokens", "positions"):
            raise self.refused(node)
        self.lookups.append((table.name, ids.name == "tokens"))
        self.values[node.outputs[0]] = self.g.input((1, self.target.width, int(table.shape[-1])))

    def elementwise(self, node: ir.Node) -> Value:
        """A sum, difference, product or quotient."""
        return self.g.binary(ELEMENTWISE[node.op_type], *map(self.get, node.inputs))

    def lower_linear(self, node: ir.Node) -> Value:
        """x · Wᵀ; the head's product is joined by that with the context rows."""
        g, x, name = self.g, self.get(node.inputs[0]), node.inputs[1].name
        if name not in self.stored.head:
            if self.stored.form("linear", name) == "int4":
                return self.on_grid(x, name)
            return g.linear(x, self.factor(name, "linear", name, lambda: self.stored.read(name)))
        made = g.linear(x, self.factor("head", "head", name, self.stored.read_head))
        return made if self.context is None else g.concat([made, g.product(x, self.context)], -1)

    def on_grid(self, x: Value, name: str) -> Value:
        """x · Wᵀ with W on a 4-bit grid. XNNPACK's has its 0 in the middle, so W = scale·(code - 8) + C, and
        C, a number for each block of inputs, meets the block's sum (as forms.Int4Grid has it).
        """
        g, blocks = self.g, -(-x.shape[-1] // BLOCK)
        parts = functools.cache(lambda: middled(self.stored.grid(name), self.stored.read(name)))
        x = g.once(("whole", x), lambda: g.pad(x, blocks * BLOCK))
        main = g.linear(x, g.coded_blocks(name, lambda: parts()[:2]))
        ones = g.stored(("ones", BLOCK), lambda: np.ones((1, BLOCK), np.float32))
        split = (*x.shape[:-1], blocks, BLOCK)
        sums = g.once(
            ("sums", x), lambda: g.reshape(g.linear(g.reshape(x, split), ones), (*x.shape[:-1], blocks))
        )
        rest = g.linear(sums, g.coded((name, "offsets"), lambda: positive(*int8_rows(parts()[2]))))
        return g.binary("Add", main, rest)

    def factor(self, key: str, role: str, name: str, read: Callable[[], np.ndarray]) -> Value:
        """A product's weight in the form of its role."""
        if self.stored.form(role, name) == "int8":
            return self.g.coded(key, lambda: positive(*int8_rows(read())))
        return self.g.stored(key, read)

    def lower_norm(self, node: ir.Node) -> Value:
        """The mean of squares is a product with a row of 1/n: XNNPACK's subgraph format has no other sum."""
        offset = node.attributes["offset"].value
        centred, epsilon = node.attributes["centred"].value, node.attributes["epsilon"].value
        return self.normed(node.inputs[0], self.weight(node.inputs[1].name, offset), epsilon, centred)

    def lower_layernormalization(self, node: ir.Node) -> Value:
        """The same, centred, and with a bias."""
        if node.attributes["axis"].value not in (-1, len(node.inputs[0].shape) - 1):
            raise self.refused(node)
        made = self.normed(node.inputs[0], self.get(node.inputs[1]), node.attributes["epsilon"].value, True)
        return self.g.binary("Add", made, self.get(node.inputs[2])) if len(node.inputs) > 2 else made

    def normed(self, given: ir.Value, scale: Value, epsilon: float, centred: bool) -> Value:
        """x / sqrt(mean(x²) + epsilon) · scale over the last axis, x less its mean if `centred`."""
        g, x = self.g, self.get(given)
        n = x.shape[-1]
        average = g.stored(("average", n), lambda: np.full((1, n), 1 / n, np.float32))
        if centred:
            x = g.binary("Subtract", x, g.linear(x, average))
        mean = g.linear(g.unary("Square", x), average)
        inverse = g.unary("ReciprocalSquareRoot", g.binary("Add", mean, g.number(epsilon)))
        return g.binary("Multiply", g.binary("Multiply", x, inverse), scale)

    def lower_rope(self, node: ir.Node) -> Value:
        """Turn the first 2r of d dimensions of [1,H,S,d]: pairs (i, i+r), or (2i, 2i+1) if interleaved."""
        g, x = self.g, self.get(node.inputs[0])
        interleaved = node.attributes["interleaved"].value
        _, heads, rows, dim = x.shape
        r = int(node.inputs[1].shape[-1])
        head, tail = g.slice(x, -1, 0, 2 * r), dim - 2 * r
        shape = (1, rows, r, 1) if interleaved else (1, 1, rows, r)
        cos, sin = (self.angles(value, shape) for value in node.inputs[1:3])
        pairs = g.reshape(head, (heads, rows, r, 2)) if interleaved else head
        size = 1 if interleaved else r
        a, b = g.slice(pairs, -1, 0, size), g.slice(pairs, -1, size, size)
        times = lambda p, q: g.binary("Multiply", p, q)  # noqa: E731
        first = g.binary("Subtract", times(a, cos), times(b, sin))
        second = g.binary("Add", times(a, sin), times(b, cos))
        turned = g.reshape(g.concat([first, second], -1), head.shape)
        return g.concat([turned, g.slice(x, -1, 2 * r, tail)], -1) if tail else turned

    def angles(self, value: ir.Value, shape: tuple[int, ...]) -> Value:
        """Looked up rows [1,S,r] in another shape, once a call."""
        return self.g.once(("angles", value, shape), lambda: self.g.reshape(self.get(value), shape))

    def lower_take(self, node: ir.Node) -> Value:
        """Prefill wants the logits of one row, by a product with 0 and one 1; every other kind of all."""
        x = self.get(node.inputs[0])
        return x if self.row is None else self.g.product(self.row, x)

    def lower_attend(self, node: ir.Node) -> Value:
        """Attention over the cache with the call's rows put in their slots, which hold zeros until then.

        Two parts, as an NPU has them, would add up a row's terms in another order when it is in the cache; so
        every term has the place that it will always have, and a row the same bits, whatever the width.
        """
        g, spec, t = self.g, self.spec, self.target
        layer, scale = node.attributes["layer"].value, node.attributes["scale"].value
        window, softcap = node.attributes["window"].value, node.attributes["softcap"].value
        query, key, value = (self.get(v) for v in node.inputs[:3])
        self.queries[layer] = scaled = g.binary("Multiply", query, g.number(scale))
        self.new_keys[layer], self.new_values[layer] = key, value
        if t.cache.queries and softcap != spec.softcap:
            raise InputError(
                f"{spec.family} caps the attention scores of its layers differently",
                "use --policy keydiff or sinks, which read no queries",
            )
        keys, values = (
            g.binary("Add", cache, g.product(self.places, rows))
            for cache, rows in ((self.caches[layer], key), (self.caches[spec.layers + layer], value))
        )
        group = spec.heads // spec.kv_heads
        q = g.reshape(scaled, (1, spec.kv_heads, group * t.width, spec.head_dim))
        scores = g.product(q, keys, turned=True)
        if softcap:
            capped = g.unary("Tanh", g.binary("Multiply", scores, g.number(1 / softcap)))
            scores = g.binary("Multiply", capped, g.number(softcap))
        slots, whole = keys.shape[2], columns(t)
        p = g.unary("Softmax", g.binary("Add", g.pad(scores, whole), self.masks[window]))
        out = g.product(g.slice(p, -1, 0, slots), values)
        out = g.reshape(out, (1, spec.heads, t.width, spec.head_dim))
        return g.transpose(out, (0, 2, 1, 3))

    def lower_reshape(self, node: ir.Node) -> Value:
        """A reshape whose leading dimensions are its input's, so that it holds at any width."""
        x, traced = self.get(node.inputs[0]), list(node.inputs[0].shape)
        wanted = [int(i) for i in node.inputs[1].const_value.numpy()]
        shape = [x.shape[i] if i < len(traced) and n == traced[i] else n for i, n in enumerate(wanted)]
        if TRACED_WIDTH in shape and self.target.width != TRACED_WIDTH:
            raise InputError(
                f"{self.spec.family}: a reshape to {wanted} depends on the number of tokens in a call",
                "this model's code cannot be given a fixed width; please report it",
            )
        return self.g.reshape(x, shape)

    def lower_transpose(self, node: ir.Node) -> Value:
        """The axes in another order."""
        return self.g.transpose(self.get(node.inputs[0]), node.attributes["perm"].value)

    def lower_concat(self, node: ir.Node) -> Value:
        """Tensors one behind the other."""
        return self.g.concat([self.get(v) for v in node.inputs], node.attributes["axis"].value)

    def lower_slice(self, node: ir.Node) -> Value:
        """Part of one axis, in steps of one."""
        x = self.get(node.inputs[0])
        start, end, axis, *step = (int(v.const_value.numpy().item()) for v in node.inputs[1:])
        if step not in ([], [1]):
            raise self.refused(node)
        start, end, _ = slice(start, end).indices(x.shape[axis])
        return self.g.slice(x, axis, start, end - start)

    def lower_split(self, node: ir.Node) -> Value:
        """An axis in parts."""
        x, axis, start = self.get(node.inputs[0]), node.attributes["axis"].value, 0
        for value in node.outputs:
            size = int(value.shape[axis])
            self.values[value] = self.g.slice(x, axis, start, size)
            start += size
        return self.values[node.outputs[0]]

    def lower_sigmoid(self, node: ir.Node) -> Value:
        """1 / (1 + exp(-x))."""
        return self.g.unary("Sigmoid", self.get(node.inputs[0]))

    def lower_tanh(self, node: ir.Node) -> Value:
        """The hyperbolic tangent."""
        return self.g.unary("Tanh", self.get(node.inputs[0]))

    def lower_relu(self, node: ir.Node) -> Value:
        """What is below 0 becomes 0."""
        return self.g.relu(self.get(node.inputs[0]))

    def lower_gelu(self, node: ir.Node) -> Value:
        """x·Φ(x), or its approximation by a tanh."""
        g, x = self.g, self.get(node.inputs[0])
        if "approximate" not in node.attributes or node.attributes["approximate"].value == "none":
            return g.unary("Gelu", x)
        cube = g.binary("Multiply", g.unary("Square", x), x)
        inside = g.binary("Add", x, g.binary("Multiply", cube, g.number(0.044715)))
        turned = g.unary("Tanh", g.binary("Multiply", inside, g.number(SQRT_2_PI)))
        half = g.binary("Multiply", x, g.number(0.5))
        return g.binary("Multiply", half, g.binary("Add", turned, g.number(1.0)))

    def lower_pow(self, node: ir.Node) -> Value:
        """A square or a cube."""
        x, exponent = self.get(node.inputs[0]), node.inputs[1].const_value
        if exponent is None or exponent.numpy().size != 1 or exponent.numpy().item() not in (2, 3):
            raise self.refused(node)
        square = self.g.unary("Square", x)
        return square if exponent.numpy().item() == 2 else self.g.binary("Multiply", square, x)


def columns(target: Target) -> int:
    """Scores of a row: one a slot, up to whole vectors of the softmax's kernel, so that a slot is in the same
    lane in every bucket.
    """
    return -(-target.cache.rows(target.bucket) // LANES) * LANES


def middled(grid: Grid | None, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n,k] of a 4-bit grid, the nearest where a weight is on none; the scale of each block rounded to
    bfloat16, which XNNPACK keeps; and the number of each block that makes up for it and for the middle of
    the codes: what the block then lacks in the mean [n,k/32].
    """
    codes, scale, low = nearest_grid(weight) if grid is None else (grid.codes, grid.scale, grid.low)
    kept = torch.from_numpy(np.where(scale > 0, scale, 1).astype(np.float32)).bfloat16().float().numpy()
    mean = codes.reshape(*scale.shape, BLOCK).mean(-1, dtype=np.float32)
    return codes, kept, low + scale * mean - kept * (mean - MIDDLE4)


def positive(codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same, with the scale of a row of zeros 1: XNNPACK refuses 0."""
    return codes, np.where(scale > 0, scale, np.float32(1))

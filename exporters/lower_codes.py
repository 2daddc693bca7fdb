"""The form with coded activations (QDQ), for NPUs that multiply integers: what goes into and out of a product
are codes of 16 bits over a span known beforehand, and the caches' rows are codes of 8.

Norms, angles, the softmax and the residual stream stay floats. A cache's row is code/127 · most, `most` the
largest size that a key-value head of the layer was seen to have (Spans). Graphs see code/127: queries and
outputs are multiplied with the rest, so a commit sees the right products too, and no scale is an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgespec.errors import InputError
from edgespec.exporters.build import Builder
from edgespec.exporters.lower_attention import Triple, by_token, probabilities

if TYPE_CHECKING:
    from edgespec.exporters.lower_onnx import Lowering

Span = tuple[float, float]
HEAD = "head.weight"
STEPS8, STEPS16 = 127, 65535
MIDDLE = 32768  # the code of 0 in a span around it
ROOM = 1.25  # a text may reach further than the ones that were looked at; 16 bits have some to spare


@dataclass(frozen=True)
class Spans:
    """What a model's activations reached on texts: the least and the largest number into and out of each
    linear, by its weight's name (the LM head's is HEAD); by layer, the largest size of each head's keys and
    values [KV], of the queries times the attention's scale, and of scores.
    """

    linears: dict[str, tuple[Span, Span]]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    queries: list[float]
    scores: list[float]

    def of(self, name: str) -> tuple[Span, Span]:
        """Into and out of a linear; InputError where no text reached it."""
        if name not in self.linears:
            raise InputError(
                f"{name} is no linear module of its own, so what it takes cannot be coded",
                "use --weights fp16",
            )
        return self.linears[name]

    def of_queries(self, layer: int, group: int) -> np.ndarray:
        """What each query head [H] is multiplied with, so that its products with keys as seen are right."""
        return self.keys[layer].repeat(group)


def coded(b: Builder, x: ir.Value, span: Span) -> ir.Value:
    """x through codes of 16 bits over the span and some room; 0 has a code."""
    low, high = min(ROOM * span[0], 0.0), max(ROOM * span[1], 0.0)
    scale = np.float32((high - low) / STEPS16 or 1.0)
    return through(b, x, scale, np.uint16(round(-low / float(scale))))


def through(b: Builder, x: ir.Value, scale: np.float32, zero: np.generic) -> ir.Value:
    """x as codes of the zero's type and back."""
    given = b.const(scale), b.const(zero)
    made = lambda: b.op("DequantizeLinear", b.op("QuantizeLinear", x, *given), *given)  # noqa: E731
    return b.once(("codes", x, float(scale), int(zero)), made)


def codes_of(b: Builder, x: ir.Value) -> ir.Value:
    """The codes of a cache's rows, from what `seen` made of them."""
    return b.op("QuantizeLinear", x, b.const(np.float32(1 / STEPS8)), b.const(np.int8(0)))


def coded_attend(low: Lowering, node: ir.Node, layer: int) -> Triple:
    """rows_attend on coded caches: out [1,S,H,d], and the call's own rows [1,KV,S,d] as they are seen."""
    b, spec, width = low.b, low.spec, low.width
    spans = low.storage.spans
    assert spans is not None
    query, key, value = (low.get(v) for v in node.inputs[:3])
    scale, window, softcap = (node.attributes[name].value for name in ("scale", "window", "softcap"))
    group = spec.heads // spec.kv_heads
    shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
    by_head = lambda sizes: b.const(np.asarray(sizes, np.float32).reshape(1, -1, 1, 1))  # noqa: E731
    turned = lambda x: b.op("Transpose", x, perm=[0, 1, 3, 2])  # noqa: E731
    step = np.float32(1 / STEPS8), np.int8(0)
    decoded = lambda x: b.op("DequantizeLinear", x, *map(b.const, step))  # noqa: E731
    seen = lambda x, most: through(b, b.op("Mul", x, by_head(1 / most)), *step)  # noqa: E731
    most_key, most_value = spans.keys[layer], spans.values[layer]
    keys, values = (decoded(low.inputs[f"{part}_{layer}"]) for part in ("keys", "values"))
    key, value = seen(key, most_key), seen(value, most_value)
    q = b.op("Mul", query, by_head(scale * spans.of_queries(layer, group)))
    reach = spans.queries[layer] * float(most_key.max())
    q = coded(b, b.op("Reshape", q, shape(1, spec.kv_heads, group * width, spec.head_dim)), (-reach, reach))
    span = (-spans.scores[layer], spans.scores[layer])
    scores = tuple(coded(b, b.op("MatMul", q, turned(rows)), span) for rows in (keys, key))
    outs = []
    for p, rows in zip(probabilities(low, scores, window, softcap), (values, value), strict=True):
        # probabilities, and weighted means of numbers from -1 to 1
        given = through(b, p, np.float32(1 / STEPS16), np.uint16(0))
        outs.append(through(b, b.op("MatMul", given, rows), np.float32(2 / STEPS16), np.uint16(MIDDLE)))
    return by_token(low, b.op("Mul", b.op("Add", *outs), by_head(most_value))), key, value

"""The one attention operator on its two cache contracts (design, section 3).

rows: a pure function in standard operators, two-part attention, for an NPU. append: ONNX Runtime's
GroupQueryAttention, which reads the filled part only and appends the call's rows to the buffers bound as
its outputs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgespec.errors import InputError
from edgespec.exporters.attention import MASKED

if TYPE_CHECKING:
    from edgespec.exporters.build import Builder
    from edgespec.exporters.lower_onnx import Lowering

Triple = tuple[ir.Value, ir.Value, ir.Value]
BY_ROW = (0, 2, 1, 3)


def rows_attend(low: Lowering, node: ir.Node, layer: int) -> Triple:
    """Out [1,S,H,d] and the call's own rows [1,KV,S,d].

    Scores of cache and call are concatenated, never the keys.
    """
    b, spec, width = low.b, low.spec, low.width
    query, key, value = (low.get(v) for v in node.inputs[:3])
    keys, values = low.inputs[f"keys_{layer}"], low.inputs[f"values_{layer}"]
    scale, window, softcap = (node.attributes[name].value for name in ("scale", "window", "softcap"))
    group = spec.heads // spec.kv_heads
    shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
    number = lambda x: b.const(np.float32(x))  # noqa: E731
    q = b.op(
        "Reshape", b.op("Mul", query, number(scale)), shape(1, spec.kv_heads, group * width, spec.head_dim)
    )
    turned = lambda x: b.op("Transpose", x, perm=[0, 1, 3, 2])  # noqa: E731
    scores = b.op("MatMul", q, turned(keys)), b.op("MatMul", q, turned(key))
    old, new = probabilities(low, scores, window, softcap)
    out = b.op("Add", b.op("MatMul", old, values), b.op("MatMul", new, value))
    return by_token(low, out), key, value


def probabilities(
    low: Lowering, scores: tuple[ir.Value, ir.Value], window: int, softcap: float
) -> tuple[ir.Value, ir.Value]:
    """Of the scores of the cache's slots and of the call's rows, [1,KV,group·S,slots] and [..,S]: the softmax
    over both, in the same two parts.
    """
    b, width, group = low.b, low.width, low.spec.heads // low.spec.kv_heads
    shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
    number = lambda x: b.const(np.float32(x))  # noqa: E731
    both = b.op("Concat", *scores, axis=-1)
    if softcap:
        both = b.op("Mul", b.op("Tanh", b.op("Mul", both, number(1 / softcap))), number(softcap))
    slots = low.target.cache.rows(low.target.bucket)
    seen = b.once(("seen", window), lambda: mask(low, slots, window, group))
    p = b.op("Softmax", b.op("Where", seen, both, number(MASKED)), axis=-1)
    old = b.op("Slice", p, shape(0), shape(slots), shape(3))
    return old, b.op("Slice", p, shape(slots), shape(slots + width), shape(3))


def by_token(low: Lowering, out: ir.Value) -> ir.Value:
    """The attention's output [1,KV,group·S,d] as [1,S,H,d]."""
    whole = np.array([1, low.spec.heads, low.width, low.spec.head_dim], np.int64)
    return low.b.op("Transpose", low.b.op("Reshape", out, low.b.const(whole)), perm=list(BY_ROW))


def mask(low: Lowering, slots: int, window: int, group: int) -> ir.Value:
    """What each row sees, bool [1,1,group·S,slots+S], once per call: slots < count, rows <= its own.

    With a window w the slot's distance to the row must stay under w; slots stand in order of position.

    Nothing of it is a constant bool: Qualcomm's compiler (onnxruntime-qnn 2.7.0) takes one of a single
    element for true or false by chance, and a call of one row then did not see its own row.
    """
    b, width = low.b, low.width
    row, slot = np.arange(width, dtype=np.int32), np.arange(slots, dtype=np.int32)
    count = low.inputs["count"]
    filled = b.op(
        "Expand", b.op("Less", b.const(slot[None]), count), b.const(np.array([width, slots], np.int64))
    )
    if window:  # slot > count + row - window
        filled = b.op("And", filled, b.op("Greater", b.const(slot[None] - row[:, None] + window), count))
    apart = row[:, None] - row[None]
    own = (apart >= 0) & (apart < window) if window else apart >= 0
    causal = b.op("Less", b.const(np.where(own, -1, np.iinfo(np.int32).max).astype(np.int32)), count)
    seen = b.op("Concat", filled, causal, axis=1)
    if group > 1:
        seen = b.op("Concat", *[seen] * group, axis=0)
    return b.op("Reshape", seen, b.const(np.array([1, 1, group * width, slots + width], np.int64)))


def append_attend(low: Lowering, node: ir.Node, layer: int) -> Triple:
    """Out [1,S,H,d] and both buffers, bound as input and as output, with the call's rows at `count`.

    One function: GroupQueryAttention, for which our native runtime has kernels (runtime/native/kernels.h).
    """
    b, spec, width = low.b, low.spec, low.width
    scale, window, softcap = (node.attributes[name].value for name in ("scale", "window", "softcap"))
    rows = max(width, 2)
    qkv, angles = plain_projection(low, node)
    count = low.inputs["count"]
    last = b.once("last", lambda: b.op("Add", count, b.const(np.array([rows - 1], np.int32))))
    total = b.once("total", lambda: b.op("Add", count, b.const(np.array([rows], np.int32))))
    caches = (low.inputs[f"keys_{layer}"], low.inputs[f"values_{layer}"], count, last, total)
    numbers: dict[str, Any] = {"heads": spec.heads, "kv_heads": spec.kv_heads, "scale": float(scale)}
    numbers |= {"softcap": float(softcap), "window": int(window) or -1}
    how = {"outputs": 3, **numbers}
    if qkv is None:
        given = [by_row(low, value) for value in node.inputs[:3]]
        out, new_keys, new_values = b.call("Attend", partial(separate, width), *given, *caches, **how)
    else:
        given = [qkv, *caches, angles[0], angles[1], positions(low, rows)]
        how["interleaved"] = int(angles[2])
        out, new_keys, new_values = b.call("AttendPacked", partial(packed, width), *given, **how)
    low.flat[node.outputs[0]] = out
    return (
        b.op("Reshape", out, b.const(np.array([1, width, spec.heads, spec.head_dim], np.int64))),
        new_keys,
        new_values,
    )


def separate(
    width: int, b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, keys: ir.Value, values: ir.Value,
    count: ir.Value, last: ir.Value, total: ir.Value, **numbers: Any,
) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
    """Attention of rows that are turned already, if at all."""
    return grouped(width, b, (q, k, v), (keys, values, last, total), (), **numbers)


def packed(
    width: int, b: Builder, qkv: ir.Value, keys: ir.Value, values: ir.Value, count: ir.Value, last: ir.Value,
    total: ir.Value, cos: ir.Value, sin: ir.Value, places: ir.Value, *, interleaved: Any, **numbers: Any,
) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
    """Attention of rows [1,S,(H+2·KV)·d] that are turned here, by the angles of their positions."""
    turning = {"do_rotary": 1, "rotary_interleaved": interleaved}
    caches = (keys, values, last, total)
    return grouped(width, b, (qkv, None, None), caches, (cos, sin, places), **turning, **numbers)


def grouped(
    width: int,
    b: Builder,
    rows: tuple[ir.Value | None, ...],
    caches: tuple[ir.Value, ...],
    angles: tuple[ir.Value, ...],
    *,
    heads: Any,
    kv_heads: Any,
    window: Any,
    **attributes: Any,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """GroupQueryAttention rounds otherwise at one row: a one-row call attends with its row twice (the second
    copy lands on a slot beyond the count, which holds garbage by contract), so that decode gives the bits of
    a verify row.
    """
    if width == 1:
        rows = tuple(None if x is None else b.op("Concat", x, x, axis=1) for x in rows)
    out, new_keys, new_values = b.op(
        "GroupQueryAttention",
        *rows,
        *caches,
        *angles,
        domain="com.microsoft",
        outputs=3,
        num_heads=heads,
        kv_num_heads=kv_heads,
        local_window_size=window,
        **attributes,
    )
    if width == 1:
        out = b.op("Gather", out, b.const(np.array([0], np.int64)), axis=1)
    return out, new_keys, new_values


def new_queries(low: Lowering) -> ir.Value:
    """The layers' queries of the call's rows, after RoPE and times the attention's scale: [S,L,H,d]."""
    b, spec = low.b, low.spec
    nodes = [low.attends[i] for i in low.part.layers]
    shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
    whole = (low.width, len(nodes), spec.heads, spec.head_dim)
    if low.target.cache.contract == "rows":
        stacked = b.op("Concat", *[low.get(n.inputs[0]) for n in nodes], axis=0)
        made = b.op("Transpose", stacked, perm=[2, 0, 1, 3])
    else:
        made = b.op("Reshape", turned_together(low, nodes), shape(*whole))
    scales = np.array([n.attributes["scale"].value for n in nodes], np.float32).reshape(-1, 1, 1)
    if low.storage.spans is not None:  # a policy multiplies them with keys as they are seen
        group = spec.heads // spec.kv_heads
        every = [low.storage.spans.of_queries(i, group) for i in low.part.layers]
        scales = scales * np.stack(every)[..., None].astype(np.float32)
    if any(n.attributes["softcap"].value != spec.softcap for n in nodes):
        raise InputError(
            f"{spec.family} caps the attention scores of its layers differently",
            "use --policy keydiff or sinks, which read no queries",
        )
    return b.op("Mul", made, b.const(scales if len({*scales.flat}) > 1 else scales.flat[0]))


def turned_together(low: Lowering, nodes: list[ir.Node]) -> ir.Value:
    """The layers' queries [1,S,L·H·d]. Where GroupQueryAttention turns them itself, they are cut out of the
    packed projections and turned in one operator for all layers.
    """
    b, spec = low.b, low.spec
    packed = [plain_projection(low, n)[0] for n in nodes]
    ropes: list[Any] = [n.inputs[0].producer() for n in nodes]
    if any(p is None for p in packed) or any(r.inputs[1:] != ropes[0].inputs[1:] for r in ropes):
        return b.op("Concat", *[by_row(low, n.inputs[0]) for n in nodes], axis=-1)
    shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
    every = spec.heads + 2 * spec.kv_heads
    joined = b.op("Concat", *packed, axis=-1)
    joined = b.op("Reshape", joined, shape(low.width, len(nodes), every * spec.head_dim))
    cut = b.op("Slice", joined, shape(0), shape(spec.heads * spec.head_dim), shape(2))
    flat = b.op("Reshape", cut, shape(1, low.width, len(nodes) * spec.heads * spec.head_dim))
    return low.rotate(ropes[0], flat, num_heads=len(nodes) * spec.heads)


def positions(low: Lowering, rows: int) -> ir.Value:
    """Position of every row the attention is given, int64 [1,rows].

    A doubled row stands twice at the same position.
    """
    width = low.width
    steps = low.steps if width > 1 else np.zeros(rows, np.int32)
    return low.b.once(("positions", rows), lambda: low.b.op("Cast", low.places(steps), to=7))


def plain_projection(low: Lowering, node: ir.Node) -> tuple[ir.Value | None, Any]:
    """The packed [1,S,(H+2·KV)·d] projection and its angles, where only rotary precedes attention.

    GroupQueryAttention then turns q and k itself and needs no split.
    """
    turned: list[Any] = [value.producer() for value in node.inputs[:2]]
    if any(n is None or n.op_type != "Rope" or n.inputs[1:] != turned[0].inputs[1:] for n in turned):
        return None, None
    linears: list[Any] = [
        projection(value) for value in (turned[0].inputs[0], turned[1].inputs[0], node.inputs[2])
    ]
    if any(n is None for n in linears):
        return None, None
    x = linears[0].inputs[0]
    if low.packed(x) != tuple(n.inputs[1].name for n in linears) or any(
        n.inputs[0] is not x for n in linears
    ):
        return None, None
    tables = [value.producer() for value in turned[0].inputs[1:]]
    if any(t is None or t.op_type != "Embed" or t.inputs[1].name != "positions" for t in tables):
        return None, None
    if 2 * int(turned[0].inputs[1].shape[-1]) != low.spec.head_dim:
        return None, None
    low.get(linears[0].outputs[0])
    whole = low.b.memo["packed", x, low.packed(x)]
    return whole, (
        low.get(tables[0].inputs[0]),
        low.get(tables[1].inputs[0]),
        turned[0].attributes["interleaved"].value,
    )


def projection(value: ir.Value) -> ir.Node | None:
    """The Linear whose output a [1,H,S,d] value is, only reshaped and transposed.

    None if anything else is between.
    """
    for kind in ("Transpose", "Reshape", "Linear"):
        node = value.producer()
        if node is None or node.op_type != kind:
            return None
        if kind != "Linear":
            value = node.inputs[0]
    return node


def by_row(low: Lowering, value: ir.Value) -> ir.Value:
    """A value that the program holds as [1,H,S,d], as [1,S,H·d]; the model's transposes are undone."""
    node = value.producer()
    heads, dim = int(value.shape[1]), int(value.shape[3])
    flat = low.b.const(np.array([1, low.width, heads * dim], np.int64))
    if node is not None and node.op_type == "Rope":
        return low.rotate(node, by_row(low, node.inputs[0]), num_heads=heads)
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].value) == BY_ROW:
        inner = node.inputs[0]
        made = inner.producer()
        if made is not None and made.op_type == "Reshape" and len(made.inputs[0].shape) == 3:
            return low.get(made.inputs[0])
        return low.b.op("Reshape", low.get(inner), flat)
    return low.b.op("Reshape", low.b.op("Transpose", low.get(value), perm=list(BY_ROW)), flat)

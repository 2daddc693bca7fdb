"""Context rows: further rows of a draft's head that are an input, filled with tokens of the conversation.

Which tokens they hold is the runtime's business (runtime/native/context.h); here is what multiplies them, and
the graph that looks them up in the target's stored head, whatever its form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgespec.exporters.attention import MASKED
from edgespec.exporters.build import Builder
from edgespec.spec import context_tensors

if TYPE_CHECKING:
    from edgespec.exporters.lower_onnx import Lowering

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def joined(low: Lowering, x: ir.Value, own: ir.Value) -> ir.Value:
    """Logits of the head's own rows [1,S,head rows], then of the context rows: x·C, C [hidden,R]."""
    return low.b.op("Concat", own, low.b.op("MatMul", x, low.inputs["context"]), axis=-1)


def masked(low: Lowering, logits: ir.Value) -> ir.Value:
    """Logits in which a context row that is not filled (id -1) has no part.

    After whatever the model does to its logits (a softcap would raise a mask that was there before).
    """
    b = low.b
    filled = b.op("Greater", low.inputs["context_ids"], b.const(np.int32(-1)))
    own = b.const(np.ones(low.target.head_rows, np.bool_))
    return b.op("Where", b.op("Concat", own, filled, axis=0), logits, b.const(np.float32(MASKED)))


def absolute_ids(low: Lowering, head_ids: np.ndarray) -> ir.Value:
    """The absolute token id of each logit; those of context rows come with the call."""
    own = low.b.const(head_ids.astype(np.int32))
    return low.b.op("Concat", own, low.inputs["context_ids"], axis=0) if low.target.context else own


def context_graph(
    place: Callable[[Builder], tuple[Any, dict[str, ir.Value]]],
    width: int,
    vocab: int,
    hidden: int,
    fused: bool,
) -> ir.Model:
    """tokens [1,S] -> their rows of the target's head [1,S,hidden]; `place` gives its stored form."""
    b = Builder(named=fused)
    (tokens,), (rows,) = context_tensors(width, hidden)
    ids = b.input(tokens.name, INT32, tokens.shape)
    form, parts = place(b)
    return b.model(
        "context", {rows.name: (form.embed(b, ids, parts, width, vocab, hidden), FLOAT, rows.shape)}
    )

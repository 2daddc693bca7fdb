"""The forms a weight matrix can be stored in: how each is encoded, multiplied and looked up in an ONNX graph.

Knows numpy arrays and ONNX Runtime's kernels; knows nothing of models, names or files. A form is chosen so
that a row of x gives the same bits in a call of any width. On a CPU a product is a function, for which our
native runtime has kernels (runtime/native/kernels.h). Any other runtime takes its body, of which ONNX Runtime
1.32 asks (AVX2, no VNNI):
- MatMulNBits of 4 bits rounds otherwise for one row than for several, so one row is multiplied twice over.
- MatMulInteger with int8 weights adds pairs of products in 16 bits and saturates; uint8 weights are exact
  and as fast.
- DynamicQuantizeLinear's one scale for all rows would let a row change its neighbours: here each has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgespec.errors import InputError
from edgespec.exporters.grids import (
    BLOCK,
    MIDDLE4,
    int8_rows,
    nearest_grid,
    nearest_steps,
    on_steps,
    packed,
    symmetric,
    unpacked,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgespec.exporters.build import Builder
    from edgespec.exporters.gguf_weights import Grid

Parts = dict[str, "ir.Value"]
Layout = dict[str, tuple[str, tuple[int, ...]]]

STAGES = 2  # coarse and fine codes of an offset
MIDDLE8 = 128  # the zero point of uint8 weights
MICROSOFT = "com.microsoft"
FLOAT, UINT8 = 1, 2  # ONNX's numbers of the types


@dataclass(frozen=True)
class Encoded:
    """A weight in a form: its named arrays, as they are stored."""

    arrays: dict[str, np.ndarray]


class Int4Grid:
    """4-bit codes in blocks of 32 inputs, each with a scale and a least value (Q4_1); kept exactly if given.

    With C = low + 8·scale, W = scale·(code - 8) + C, so W·x = MatMulNBits(x) + C·(block sums of x). C is
    stored in the same kind of codes, coarse ones and those of what they leave (8 bits together), and
    multiplied by the same product: the sums stand behind x, once for each.
    """

    name = "int4"

    def parts(self, n: int, k: int) -> Layout:
        """Type and shape of each array of an [n,k] weight."""
        blocks = all_blocks(k)
        return {"codes": ("uint8", (n, blocks, BLOCK // 2)), "scale": ("float32", (n, blocks))}

    def encode(self, weight: np.ndarray, grid: Grid | None = None) -> Encoded:
        """Codes two a byte (the even input in the low half) and scales; k is padded to whole blocks."""
        codes, scale, low = nearest_grid(weight) if grid is None else (grid.codes, grid.scale, grid.low)
        blocks, extra = layout(weight.shape[1] if grid is None else codes.shape[1])
        left = np.pad((low + MIDDLE4 * scale).astype(np.float32), ((0, 0), (0, extra * BLOCK - blocks)))
        all_codes, scales = [codes], [scale.astype(np.float32)]
        for _ in range(STAGES):
            steps, step = symmetric(left.reshape(len(left), extra, BLOCK))
            all_codes.append((steps + MIDDLE4).astype(np.uint8).reshape(len(left), -1))
            scales.append(step)
            left = left - (steps * step[..., None]).reshape(left.shape)
        codes = packed(np.concatenate(all_codes, 1).reshape(len(left), -1, BLOCK))
        return Encoded({"codes": codes, "scale": np.concatenate(scales, 1)})

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weight [n,k] that the graph multiplies with."""
        codes, scale = unpacked(encoded.arrays["codes"]), encoded.arrays["scale"]
        values = (codes.astype(np.float32) - MIDDLE4) * scale[..., None]
        blocks, extra = layout(k)
        coarse, fine = values[:, blocks : blocks + extra], values[:, blocks + extra :]
        offset = (coarse.reshape(len(codes), -1) + fine.reshape(len(codes), -1))[:, :blocks]
        return (values[:, :blocks] + offset[..., None]).reshape(len(codes), -1)[:, :k]

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x [1,rows,k] -> [1,rows,n]."""
        blocks, extra = layout(k)
        name, make = ("Int4LinearRow", int4_linear_row) if rows == 1 else ("Int4Linear", int4_linear)
        return b.call(
            name, make, x, parts["codes"], parts["scale"], inputs=k, width=all_blocks(k) * BLOCK, height=n,
            fill=[0, 0, 0, 0, 0, -k % BLOCK], fill_sums=[0, 0, 0, 0, 0, extra * BLOCK - blocks],
        )  # fmt: skip

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """ids [1,rows] -> those rows of the weight, [1,rows,k]."""
        blocks, extra = layout(k)
        table = b.op("Reshape", parts["codes"], shape(b, n, all_blocks(k) * BLOCK // 2))
        values = b.op(
            "GatherBlockQuantized", table, ids, parts["scale"], domain=MICROSOFT,
            bits=4, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        sizes = shape(b, blocks * BLOCK, blocks, extra * BLOCK - blocks, blocks, extra * BLOCK - blocks)
        main, coarse, _, fine, _ = b.op("Split", values, sizes, axis=-1, outputs=5)
        offset = b.op("Reshape", b.op("Add", coarse, fine), shape(b, 1, rows, blocks, 1))
        whole = b.op("Add", b.op("Reshape", main, shape(b, 1, rows, blocks, BLOCK)), offset)
        flat = b.op("Reshape", whole, shape(b, 1, rows, blocks * BLOCK))
        return b.op("Slice", flat, shape(b, 0), shape(b, k), shape(b, 2)) if k % BLOCK else flat


class Int8Rows:
    """8-bit weights with a scale per output; every row of x is quantised to 8 bits over its own range.

    x ≈ s·u + l, l the row's least value, s = range/255: W·x = s·scale·(codes·u) + l·scale·(sum of codes).
    There is no zero point to round, nothing to clamp, and a constant row is right (s = 0).
    """

    name = "int8"

    def parts(self, n: int, k: int) -> Layout:
        """Type and shape of each array of an [n,k] weight."""
        return {"codes": ("uint8", (k, n)), "scale": ("float32", (n,)), "sums": ("float32", (n,))}

    def encode(self, weight: np.ndarray, grid: Grid | None = None) -> Encoded:
        """Codes + 128, transposed; the scale, and the weight's own sum, of each output."""
        codes, scale = int8_rows(weight)
        stored = np.ascontiguousarray((codes + MIDDLE8).astype(np.uint8).T)
        sums = (codes.sum(1, dtype=np.int64) * scale.astype(np.float64)).astype(np.float32)
        return Encoded({"codes": stored, "scale": scale.astype(np.float32), "sums": sums})

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weight [n,k] that the graph multiplies with."""
        return (encoded.arrays["codes"].T.astype(np.float32) - MIDDLE8) * encoded.arrays["scale"][:, None]

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x [1,rows,k] -> [1,rows,n]."""
        return b.call("Int8Linear", int8_linear, x, parts["codes"], parts["scale"], parts["sums"], inputs=k)

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """ids [1,rows] -> those rows of the weight, [1,rows,k]."""
        return b.call("Int8Embed", int8_embed, ids, parts["codes"], parts["scale"])


class Plain:
    """The weight itself, transposed, in the given float type; the arithmetic is float32."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype

    def parts(self, n: int, k: int) -> Layout:
        """Type and shape of the one array of an [n,k] weight."""
        return {"weight": (self.dtype, (k, n))}

    def encode(self, weight: np.ndarray, grid: Grid | None = None) -> Encoded:
        """The transposed weight; InputError where it does not fit the type."""
        largest, limit = np.abs(weight).max(initial=0), np.finfo(self.dtype).max
        if not largest <= limit:
            raise InputError(
                f"a weight of size {largest:.3g} does not fit {self.name} (largest {limit:.3g})",
                "use --weights fp32",
            )
        return Encoded({"weight": np.ascontiguousarray(weight.T, dtype=self.dtype)})

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weight [n,k] that the graph multiplies with."""
        return encoded.arrays["weight"].T.astype(np.float32)

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x [1,rows,k] -> [1,rows,n]."""
        return b.op("MatMul", x, self.wide(b, parts["weight"]))

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """ids [1,rows] -> those rows of the weight, [1,rows,k]."""
        return self.wide(b, b.op("Transpose", b.op("Gather", parts["weight"], ids, axis=1), perm=[1, 2, 0]))

    def wide(self, b: Builder, value: ir.Value) -> ir.Value:
        """The value in float32."""
        return (
            value
            if self.dtype == "float32"
            else b.once(("wide", value), lambda: b.op("Cast", value, to=FLOAT))
        )


class CodedRows:
    """8-bit weights with a scale per output, for activations that are codes (lower_codes.py): a
    DequantizeLinear that an NPU's compiler takes into the product.
    """

    name = "w8a16"

    def parts(self, n: int, k: int) -> Layout:
        """Type and shape of each array of an [n,k] weight."""
        return {"codes": ("int8", (k, n)), "scale": ("float32", (n,))}

    def encode(self, weight: np.ndarray, grid: Grid | None = None) -> Encoded:
        """Codes, transposed, and the scale of each output."""
        codes, scale = int8_rows(weight)
        return Encoded({"codes": np.ascontiguousarray(codes.astype(np.int8).T), "scale": scale})

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weight [n,k] that the graph multiplies with."""
        return encoded.arrays["codes"].T.astype(np.float32) * encoded.arrays["scale"][:, None]

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x [1,rows,k] -> [1,rows,n]."""
        return b.op("MatMul", x, b.op("DequantizeLinear", parts["codes"], parts["scale"], axis=1))

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """ids [1,rows] -> those rows of the weight, [1,rows,k].

        Between two DequantizeLinear of the same step: an NPU looks codes up only as part of such a group.
        """
        step = number(b, 1), b.const(np.int8(0))
        found = b.op("Gather", b.op("DequantizeLinear", parts["codes"], *step), ids, axis=1)
        found = b.op("DequantizeLinear", b.op("QuantizeLinear", found, *step), *step)
        scale = b.op("Reshape", b.op("Gather", parts["scale"], ids, axis=0), shape(b, 1, rows, 1))
        return b.op("Mul", b.op("Transpose", found, perm=[1, 2, 0]), scale)


class CodedBlocks:
    """4-bit weights in blocks of 32 inputs for coded activations: a block's scale is 1 to 15 steps of its
    output's (Qualcomm's low-power block quantisation, LPBQ), so that sums of products stay integers.
    """

    name = "w4a16"

    def parts(self, n: int, k: int) -> Layout:
        """Type and shape of each array of an [n,k] weight; InputError where blocks do not fit."""
        if k % BLOCK:
            raise InputError(
                f"w4a16 holds weights in blocks of {BLOCK} inputs, and a layer has {k}", "use --weights w8a16"
            )
        blocks = k // BLOCK
        by_block = (blocks, n)
        return {
            "codes": ("int4", (k, n)),
            "zeros": ("int4", by_block),  # the compiler takes no block without one
            "steps": ("uint8", by_block),
            "scale": ("float32", (n,)),
        }

    def encode(self, weight: np.ndarray, grid: Grid | None = None) -> Encoded:
        """Codes two a byte (the even output in the low half), whole steps of each block, the step's size."""
        codes, steps, size = nearest_steps(weight) if grid is None else on_steps(grid)
        zeros = np.zeros(-(-steps.size // 2), np.uint8)
        by_block = np.ascontiguousarray(steps.T)
        return Encoded(
            {"codes": packed(codes.T.reshape(-1)), "zeros": zeros, "steps": by_block, "scale": size}
        )

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weight [n,k] that the graph multiplies with."""
        steps = encoded.arrays["steps"]
        codes = unpacked(encoded.arrays["codes"]).reshape(k, -1).astype(np.float32)
        codes = np.where(codes < MIDDLE4, codes, codes - 2 * MIDDLE4)
        return (codes * steps.repeat(BLOCK, 0) * encoded.arrays["scale"]).T.astype(np.float32)

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x [1,rows,k] -> [1,rows,n]."""
        scale = b.op("DequantizeLinear", parts["steps"], parts["scale"], axis=1)
        weight = b.op("DequantizeLinear", parts["codes"], scale, parts["zeros"], axis=0, block_size=BLOCK)
        return b.op("MatMul", x, weight)


Form = Int4Grid | Int8Rows | Plain | CodedRows | CodedBlocks
FORMS: dict[str, Any] = {
    form.name: form
    for form in (
        Int4Grid(),
        Int8Rows(),
        Plain("fp16", "float16"),
        Plain("fp32", "float32"),
        CodedRows(),
        CodedBlocks(),
    )
}


def int4_linear(
    b: Builder, x: ir.Value, codes: ir.Value, scale: ir.Value, *, inputs: Any, width: Any, height: Any,
    fill: Any, fill_sums: Any,
) -> ir.Value:  # fmt: skip
    """x padded to whole blocks, then the sum of every block, twice, each padded too; times the codes."""

    def longer() -> ir.Value:
        whole = x if fill == [0] * 6 else b.op("Pad", x, b.ints(fill))
        sums = b.op("ReduceSum", b.op("Reshape", whole, shape(b, 0, 0, -1, BLOCK)), shape(b, -1), keepdims=0)
        return b.op("Concat", whole, *[b.op("Pad", sums, b.ints(fill_sums))] * STAGES, axis=-1)

    return b.op(
        "MatMulNBits", b.once(("int4", "sums", x), longer), codes, scale, domain=MICROSOFT,
        K=width, N=height, bits=4, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip


def int4_linear_row(b: Builder, x: ir.Value, *arrays: ir.Value, **sizes: Any) -> ir.Value:
    """One row, multiplied twice over: ONNX Runtime's kernel rounds it otherwise than one of several."""
    twice = b.once(("int4", "twice", x), lambda: b.op("Concat", x, x, axis=1))
    return b.op("Gather", int4_linear(b, twice, *arrays, **sizes), shape(b, 0), axis=1)


def int8_linear(
    b: Builder, x: ir.Value, codes: ir.Value, scale: ir.Value, sums: ir.Value, *, inputs: Any
) -> ir.Value:
    """A row's 8-bit codes over its own range, times the codes of the weight."""
    high, low = (b.op(kind, x, shape(b, -1), keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
    step = b.op("Mul", b.op("Sub", high, low), number(b, 1 / 255))
    raised = b.op("Sub", x, low)
    u = b.op("QuantizeLinear", raised, step, axis=2, block_size=inputs, output_dtype=UINT8)
    middle = b.const(np.uint8(MIDDLE8))
    main = b.op("MatMulIntegerToFloat", u, codes, number(b, 1), scale, None, middle, domain=MICROSOFT)
    return b.op("Add", b.op("Mul", main, step), b.op("Mul", low, sums))


def int8_embed(b: Builder, ids: ir.Value, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Columns of the codes, around 0, times their scales."""
    columns = b.op("Transpose", b.op("Gather", codes, ids, axis=1), perm=[1, 2, 0])
    values = b.op("Sub", b.op("Cast", columns, to=FLOAT), number(b, MIDDLE8))
    own = b.op("Unsqueeze", b.op("Gather", scale, ids, axis=0), shape(b, 2))
    return b.op("Mul", values, own)


def layout(k: int) -> tuple[int, int]:
    """Blocks of an int4 row: of its k inputs, and of one stage of their sums' factors."""
    blocks = -(-k // BLOCK)
    return blocks, -(-blocks // BLOCK)


def all_blocks(k: int) -> int:
    """Blocks of an int4 row with every stage."""
    blocks, extra = layout(k)
    return blocks + STAGES * extra


def shape(b: Builder, *sizes: int) -> ir.Value:
    """A constant of int64 sizes or axes."""
    return b.const(np.array(sizes, np.int64))


def number(b: Builder, value: float) -> ir.Value:
    """A float32 constant."""
    return b.const(np.float32(value))

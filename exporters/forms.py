"""How a weight is stored and multiplied: one small class a form, with its arrays, its ONNX nodes and its inverse.

Every form gives a row the same bits at every width on ONNX Runtime's CPU kernels (a one-row int4 product runs as two
equal rows). Knows nothing of models or files; x is [1,rows,K] float32 and a weight is [N,K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgespec.errors import InputError

if TYPE_CHECKING:
    from edgespec.exporters.build import Builder
    from edgespec.exporters.checkpoint import Grid

ORT = "com.microsoft"
BLOCK = 32
FLOAT, UINT8 = int(ir.DataType.FLOAT), int(ir.DataType.UINT8)
Arrays = dict[str, np.ndarray]
Parts = dict[str, ir.Value]
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Int8Rows:
    """int8: a scale per output channel, and per token row a scale and an offset (asymmetric, W8A8).

    x ≈ s·u + lo with u = round((x - lo)/s) in 0..255, s = (max - lo)/255 of the row, so
    y = s·(u·W)·w + lo·(w·colsum). Codes are stored + 128 as uint8: int8 weights saturate on AVX2 without VNNI.
    """

    name: str = "int8"

    def parts(self, n: int, k: int) -> Shapes:
        """codes uint8 [K,N] (transposed for the kernel), scale [N], and scale times the sum of each channel's codes."""
        return {"codes": ("uint8", (k, n)), "scale": ("float32", (n,)), "total": ("float32", (n,))}

    def encode(self, weight: np.ndarray, grid: Grid | None) -> Arrays:
        """Symmetric per-channel codes."""
        scale = np.maximum(np.abs(weight).max(1) / 127, 1e-12).astype(np.float32)
        codes = np.rint(weight / scale[:, None]).astype(np.int16)
        return {
            "codes": (codes + 128).astype(np.uint8).T,
            "scale": scale,
            "total": (codes.sum(1, dtype=np.int64) * scale).astype(np.float32),
        }

    def decode(self, arrays: Arrays) -> np.ndarray:
        """[N,K], as the graph sees it."""
        return (arrays["codes"].T.astype(np.float32) - 128) * arrays["scale"][:, None]

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """The row quantisation is shared by all products with this x."""
        u, scale, low = b.once(("int8 rows", x), lambda: quantised_rows(b, x, k))
        y = b.op(
            "MatMulIntegerToFloat", u, parts["codes"], b.const(np.float32(1)), parts["scale"], None,
            b.const(np.uint8(128)), domain=ORT,
        )  # fmt: skip
        return b.op("Add", b.op("Mul", y, scale), b.op("Mul", low, parts["total"]))

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """Columns of the same codes."""
        codes = b.op("Transpose", b.op("Gather", parts["codes"], ids, axis=1), perm=[1, 2, 0])
        centred = b.op("Sub", b.op("Cast", codes, to=FLOAT), b.const(np.float32(128)))
        scale = b.op("Gather", parts["scale"], ids, axis=0)
        return b.op("Mul", centred, b.op("Unsqueeze", scale, b.const(np.array([-1], np.int64))))


def quantised_rows(b: Builder, x: ir.Value, k: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """u [1,rows,K] uint8, and each row's scale and offset [1,rows,1]. Blocked QuantizeLinear takes a scale known at run time."""
    axis = b.const(np.array([-1], np.int64))
    low = b.op("ReduceMin", x, axis, keepdims=1)
    scale = b.op(
        "Mul", b.op("Sub", b.op("ReduceMax", x, axis, keepdims=1), low), b.const(np.float32(1 / 255))
    )
    return (
        b.op("QuantizeLinear", b.op("Sub", x, low), scale, axis=2, block_size=k, output_dtype=UINT8),
        scale,
        low,
    )


@dataclass(frozen=True)
class Int4Grid:
    """int4: the asymmetric grid w = scale·code + low in blocks of 32 (a GGUF Q4_1 file's own, kept exactly).

    MatMulNBits (zero point 8) gives scale·(code - 8); the rest is (sums of x over each block) · (low + 8·scale).
    """

    name: str = "int4"

    def parts(self, n: int, k: int) -> Shapes:
        """codes uint8 [N,K/32,16] (two a byte), scale [N,K/32], offset [K/32,N]."""
        if k % BLOCK:
            raise InputError(
                f"int4 stores blocks of {BLOCK} inputs, and this model has a layer of {k}",
                "use --weights int8 or fp16",
            )
        return {
            "codes": ("uint8", (n, k // BLOCK, BLOCK // 2)),
            "scale": ("float32", (n, k // BLOCK)),
            "offset": ("float32", (k // BLOCK, n)),
        }

    def encode(self, weight: np.ndarray, grid: Grid | None) -> Arrays:
        """The given grid, or each block's minimum and maximum."""
        codes, scale, low = (grid.codes, grid.scale, grid.low) if grid is not None else nearest_grid(weight)
        pairs = codes.reshape(len(weight), -1, BLOCK)
        return {
            "codes": pairs[..., 0::2] | (pairs[..., 1::2] << 4),
            "scale": scale.astype(np.float32),
            "offset": (low + 8 * scale).astype(np.float32).T,
        }

    def decode(self, arrays: Arrays) -> np.ndarray:
        """[N,K], as the graph sees it."""
        packed = arrays["codes"]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], BLOCK).astype(np.float32)
        blocks = (codes - 8) * arrays["scale"][..., None] + arrays["offset"].T[..., None]
        return blocks.reshape(len(packed), -1)

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """One row is multiplied twice over: the kernel's one-row path rounds otherwise."""
        if rows == 1:
            x = b.once(("twice", x), lambda: b.op("Concat", x, x, axis=1))
        main = b.op(
            "MatMulNBits", x, parts["codes"], parts["scale"], domain=ORT,
            K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip
        ones = np.repeat(
            np.eye(k // BLOCK, dtype=np.float32), BLOCK, 0
        )  # a product is cheaper than Reshape + ReduceSum
        sums = b.once(("block sums", x), lambda: b.op("MatMul", x, b.const(ones)))
        y = b.op("Add", main, b.op("MatMul", sums, parts["offset"]))
        return b.op("Gather", y, b.const(np.array([0], np.int64)), axis=1) if rows == 1 else y

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """Rows of the same codes, unpacked in standard operators: low + scale·code, block by block."""
        shape = lambda *dims: b.const(np.array(dims, np.int64))  # noqa: E731
        packed = b.op("Cast", b.op("Gather", parts["codes"], ids, axis=0), to=FLOAT)  # [1,rows,K/32,16]
        high = b.op("Floor", b.op("Mul", packed, b.const(np.float32(1 / 16))))
        first = b.op("Sub", packed, b.op("Mul", high, b.const(np.float32(16))))
        last = shape(-1)
        pair = b.op("Concat", b.op("Unsqueeze", first, last), b.op("Unsqueeze", high, last), axis=-1)
        codes = b.op("Sub", b.op("Reshape", pair, shape(1, rows, k // BLOCK, BLOCK)), b.const(np.float32(8)))
        scale = b.op("Unsqueeze", b.op("Gather", parts["scale"], ids, axis=0), last)
        offset = b.op("Gather", parts["offset"], ids, axis=1)  # [K/32,1,rows]
        offset = b.op("Unsqueeze", b.op("Transpose", offset, perm=[1, 2, 0]), last)
        return b.op("Reshape", b.op("Add", b.op("Mul", codes, scale), offset), shape(1, rows, k))


def nearest_grid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [N,K], scale and low [N,K/32] of a weight rounded to nearest between each block's minimum and maximum."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = np.maximum((high - low) / 15, 1e-12)
    codes = np.clip(np.rint((blocks - low[..., None]) / scale[..., None]), 0, 15).astype(np.uint8)
    return codes.reshape(weight.shape), scale.astype(np.float32), low.astype(np.float32)


@dataclass(frozen=True)
class Plain:
    """Floating point weights [N,K]; fp16 is stored as such and widened when the graph is loaded."""

    name: str
    dtype: str

    def parts(self, n: int, k: int) -> Shapes:
        """The weight transposed [K,N], as MatMul reads it."""
        return {"weight": (self.dtype, (k, n))}

    def encode(self, weight: np.ndarray, grid: Grid | None) -> Arrays:
        """The weight in this type."""
        return {"weight": weight.astype(self.dtype).T}

    def decode(self, arrays: Arrays) -> np.ndarray:
        """[N,K] float32."""
        return arrays["weight"].T.astype(np.float32)

    def wide(self, b: Builder, value: ir.Value) -> ir.Value:
        """As float32."""
        return (
            value
            if self.dtype == "float32"
            else b.once(("wide", value), lambda: b.op("Cast", value, to=FLOAT))
        )

    def linear(self, b: Builder, x: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """x · W."""
        return b.op("MatMul", x, self.wide(b, parts["weight"]))

    def embed(self, b: Builder, ids: ir.Value, parts: Parts, rows: int, n: int, k: int) -> ir.Value:
        """Columns of the same array."""
        return self.wide(b, b.op("Transpose", b.op("Gather", parts["weight"], ids, axis=1), perm=[1, 2, 0]))


FORMS = {
    form.name: form for form in (Int4Grid(), Int8Rows(), Plain("fp16", "float16"), Plain("fp32", "float32"))
}

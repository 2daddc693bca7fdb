"""How weights are rounded: codes on a grid whose steps a row, a block of inputs or both set. Only numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgespec.exporters.gguf_weights import Grid

BLOCK = 32  # inputs that share a 4-bit grid
LEVELS = 15  # steps of a 4-bit grid
MIDDLE4 = 8  # the code of 0 among unsigned 4-bit codes, which MatMulNBits and GatherBlockQuantized assume


def packed(codes: np.ndarray) -> np.ndarray:
    """4-bit codes two a byte along the last axis, the first of two in the low half."""
    halves = codes.astype(np.uint8) & LEVELS
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def unpacked(pairs: np.ndarray) -> np.ndarray:
    """The codes 0..15 that `packed` put there."""
    return np.stack([pairs & LEVELS, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1)


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes -127..127 of [n,k] as int16, and the scale of each row."""
    scale = np.abs(weight).max(1) / np.float32(127)
    codes = np.rint(weight / np.where(scale > 0, scale, 1)[:, None]).astype(np.int16)
    return codes, scale.astype(np.float32)


def nearest_grid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n,k], scale, low [n,k/32] on a grid from a block's least to its largest value.

    K padded with 0.
    """
    n, k = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -k % BLOCK))).reshape(n, -1, BLOCK).astype(np.float32)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = (high - low) / LEVELS
    steps = (blocks - low[..., None]) / np.where(scale > 0, scale, 1)[..., None]
    return np.rint(steps).astype(np.uint8).reshape(n, -1), scale, low


def symmetric(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of 15 steps around 0 for each value of [n,blocks,32], and the size of a block's step."""
    step = np.abs(values).max(-1) / np.float32(MIDDLE4 - 1)
    return np.rint(values / np.where(step > 0, step, 1)[..., None]), step


def nearest_steps(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes -7..7 of [n,k], each block's scale in whole steps [n,k/32], and the size of an output's step."""
    blocks = weight.reshape(len(weight), -1, BLOCK).astype(np.float32)
    steps, size = whole_steps(np.abs(blocks).max(-1) / np.float32(MIDDLE4 - 1), np.ceil)
    scale = (steps * size[:, None])[..., None]
    codes = np.rint(blocks / np.where(scale > 0, scale, 1)).astype(np.int8)
    return codes.reshape(len(weight), -1), steps, size


def on_steps(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of weights that were rounded to such a grid: codes 0..15 around 8."""
    return (grid.codes.astype(np.int8) - MIDDLE4, *whole_steps(grid.scale, np.rint))


def whole_steps(
    scale: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of blocks [n,blocks] as 1 to 15 steps, and the size of a step of each output [n]."""
    size = (scale.max(1) / LEVELS).astype(np.float32)
    steps = rounded(scale / np.where(size > 0, size, 1)[:, None])
    return np.clip(steps, 1, LEVELS).astype(np.uint8), size

"""The weights file: every stored array of a model once, at a fixed place, written parameter by parameter.

Graphs ask for the arrays they need while they are built (only shapes are known then); `write` fills the file
afterwards, holding one parameter in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgespec.errors import MismatchError
from edgespec.exporters.build import Builder

ALIGNMENT = 64  # bytes: a cache line, and what the kernels' vector loads like


@dataclass
class Entry:
    """One parameter in one form: where each of its arrays lies, and how to make them."""

    make: Callable[[], dict[str, np.ndarray]]
    tensors: dict[str, ir.ExternalTensor]


@dataclass
class Weights:
    """The layout of one data file `name` in the folder `base`."""

    name: str
    base: Path
    entries: dict[Any, Entry] = field(default_factory=dict)
    size: int = 0

    def parts(
        self,
        b: Builder,
        key: tuple[str, str],
        shapes: dict[str, tuple[str, tuple[int, ...]]],
        make: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, ir.Value]:
        """A parameter's arrays as initializers (type and shape in `shapes`), placed when first used."""
        if key not in self.entries:
            self.entries[key] = Entry(
                make,
                {
                    part: self.place(f"{key[0]}.{part}" if part else key[0], *what)
                    for part, what in shapes.items()
                },
            )
        return {part: b.initializer(tensor) for part, tensor in self.entries[key].tensors.items()}

    def place(self, name: str, dtype: str, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Reserve aligned room for one array."""
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        kind, length = kind_of(dtype), array_bytes(dtype, shape)
        self.size = start + length
        return ir.ExternalTensor(
            self.name,
            start,
            length,
            kind,
            name=name,
            shape=ir.Shape(shape),
            base_dir=self.base,
        )

    def write(self, tick: Callable[[Any], None] = lambda key: None) -> None:
        """Fill the file, one entry in memory at a time.

        `tick` is called with each entry's key once it is written.
        """
        with open(self.base / self.name, "wb") as file:
            file.truncate(self.size)
            for key, entry in self.entries.items():
                arrays = entry.make()
                for part, tensor in entry.tensors.items():
                    array = np.asarray(arrays[part], order="C")
                    packed = tensor.dtype == ir.DataType.INT4  # two codes a byte
                    if array.nbytes != tensor.length or not (packed or array.shape == tuple(tensor.shape)):
                        raise MismatchError(
                            f"{tensor.name} is {array.shape} of {array.nbytes} bytes, "
                            f"{tuple(tensor.shape)} was reserved",
                            "this is a fault of the exporter; please report the model's config",
                        )
                    file.seek(tensor.offset or 0)
                    file.write(array.tobytes() if array.ndim == 0 else array.data)
                tick(key)


def kind_of(dtype: str) -> ir.DataType:
    """ONNX's name of an element type; numpy has no int4."""
    return ir.DataType[dtype.upper()] if dtype == "int4" else ir.DataType.from_numpy(np.dtype(dtype))


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that an array takes as stored."""
    return -(-int(np.prod(shape, dtype=np.int64)) * kind_of(dtype).bitwidth // 8)


def bytes_read(model: ir.Model) -> int:
    """Bytes of stored weights that one graph refers to."""
    return sum(tensor_bytes(v.const_value for v in model.graph.initializers.values()))


def tensor_bytes(tensors: Iterable[Any]) -> Iterable[int]:
    """Each tensor's bytes."""
    return (t.nbytes for t in tensors if t is not None)

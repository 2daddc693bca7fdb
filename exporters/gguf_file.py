"""Reads a GGUF file's header and the bytes of one tensor at a time; knows nothing of models.

Every length is checked against the file's size before it is believed, so a damaged file is refused and never
loops. The gguf package's own reader is not used: it believes array lengths, and makes numpy arrays per token
(seconds for a 49,152-token vocabulary). Its type tables and dequantisation are.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from edgespec.errors import InputError

VERSIONS = (2, 3)
ALIGNMENT = 32
AGAIN = "download or convert the file again, and compare its size with the original's"

SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place: its type, shape (outermost dimension first), first byte in the file and bytes."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata and tensor table."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [shape[0], bytes of one row]; read, as a map would stay in memory."""
        tensor = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.offset)
        if data.size != tensor.size:
            raise InputError(f"{self.path.name} was cut short while it was read", AGAIN)
        return data.reshape(tensor.shape[0], -1)


class _Broken(ValueError):
    """The header contradicts itself or the file's size."""


class _Header:
    """A cursor over the file's bytes that refuses to go past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise _Broken(f"its header asks for byte {end:,} of {len(self.data):,}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        kind = GGUFValueType(kind)
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is not GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0]
        inner, count = GGUFValueType(self.number("I")), self.number("Q")
        if inner is GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if inner is GGUFValueType.ARRAY:
            raise _Broken("it has an array of arrays, which no model needs")
        return self.scalars(inner, count)

    def scalars(self, kind: GGUFValueType, count: int) -> list[Any]:
        form = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(form.itemsize * count), form).tolist()

    def tensor(self) -> GgufTensor:
        """One line of the tensor table; `offset` still counts from the start of the data."""
        name = self.text()
        count = self.number("I")
        if not 1 <= count <= 4:
            raise _Broken(f"tensor {name} has {count} dimensions")
        shape = tuple(self.number("Q") for _ in range(count))[::-1]
        kind = GGMLQuantizationType(self.number("I"))
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise _Broken(f"tensor {name} has the shape {list(shape)}, which {kind.name} cannot hold")
        return GgufTensor(name, kind, shape, self.number("Q"), math.prod(shape) // block * size)


def read_gguf(path: Path) -> GgufFile:
    """The metadata and tensor table of a GGUF file of version 2 or 3, little-endian.

    Raises InputError, naming the file, where it is damaged, cut short or of another kind.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except (ValueError, OverflowError) as error:  # an empty file, unknown type numbers, bad UTF-8
        raise InputError(f"{path.name} is not a usable GGUF file: {error}", AGAIN) from None


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    header = _Header(data)
    if header.take(4) != b"GGUF":
        raise _Broken("it does not start with GGUF")
    version = header.number("I")
    if version not in VERSIONS:
        raise _Broken(f"its version is {version}, not 2 or 3 (or it is big-endian)")
    tensor_count, field_count = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = header.text()
        if key in fields:
            raise _Broken(f"it gives {key} twice")
        fields[key] = header.value(header.number("I"))
    table = [header.tensor() for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Broken(f"its alignment is {alignment!r}")
    start = -(-header.position // alignment) * alignment
    tensors = {t.name: GgufTensor(t.name, t.type, t.shape, start + t.offset, t.size) for t in table}
    if len(tensors) != len(table):
        raise _Broken("it names a tensor twice")
    for t in tensors.values():
        if t.offset + t.size > len(data):
            raise _Broken(
                f"it is cut short, tensor {t.name} ends at byte {t.offset + t.size:,} of {len(data):,}"
            )
    return GgufFile(path, fields, tensors)

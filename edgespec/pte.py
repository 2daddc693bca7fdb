"""What an ExecuTorch program file says of its methods: instructions, delegates, and the products in them.

Reads the few fields that it needs of two flatbuffers, ExecuTorch's program and XNNPACK's subgraph (their
schemas number the fields), without ExecuTorch. A file comes from anywhere: what is no such program is a
BundleError.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgespec.errors import BundleError

KERNEL, DELEGATE = 1, 2  # types of an instruction
IN_SEGMENT = 1
FULLY_CONNECTED = 2  # type of a node
CODED_VALUE = 2  # type of a value
SCALES = {1: 2, 4: 4}  # kind of codes -> the field that says where their scales are
DELEGATE_NAME = "delegate"


@dataclass(frozen=True)
class MethodCost:
    """A method: its instructions by operator, and of the products with stored weights in its delegates the
    weights' bytes, operations (two for each weight and row), and numbers into and out of them.
    """

    ops: dict[str, int]
    bytes_weights: int
    ops_weights: int
    numbers_activations: int


class Table:
    """A flatbuffer's table at a place in its bytes; a field that is not there has its default."""

    def __init__(self, data: memoryview, place: int) -> None:
        self.data, self.place = data, place
        self.fields = place - self._unpack("<i", place)
        self.size = self._unpack("<H", self.fields)

    def number(self, field: int, form: str = "<I") -> int:
        """A scalar."""
        place = self._field(field)
        return self._unpack(form, place) if place else 0

    def table(self, field: int) -> Table:
        """A table; BundleError where there is none."""
        place = self._field(field)
        if not place:
            raise IndexError("a table is missing")
        return Table(self.data, self._follow(place))

    def text(self, field: int) -> str:
        """A string."""
        return bytes(self.bytes(field)).decode()

    def bytes(self, field: int) -> memoryview:
        """A vector of bytes, or a string."""
        place, count = self._vector(field)
        return self.data[place : place + count]

    def numbers(self, field: int) -> tuple[int, ...]:
        """A vector of 32-bit numbers."""
        place, count = self._vector(field)
        return struct.unpack_from(f"<{count}I", self.data, place)

    def tables(self, field: int) -> Iterator[Table]:
        """A vector of tables."""
        place, count = self._vector(field)
        for i in range(min(count, len(self.data))):
            yield Table(self.data, self._follow(place + 4 * i))

    def _field(self, field: int) -> int:
        at = 4 + 2 * field
        offset = self._unpack("<H", self.fields + at) if at < self.size else 0
        return self.place + offset if offset else 0

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._field(field)
        if not place:
            return 0, 0
        start = self._follow(place)
        return start + 4, self._unpack("<I", start)

    def _follow(self, place: int) -> int:
        return place + self._unpack("<I", place)

    def _unpack(self, form: str, place: int) -> Any:
        if place < 0:
            raise IndexError("an offset leads out of the file")
        return struct.unpack_from(form, self.data, place)[0]


def read_pte(path: Path) -> dict[str, MethodCost]:
    """Every method by name; BundleError for a file that is no ExecuTorch program, or cut off."""
    data = memoryview(path.read_bytes())
    try:
        if bytes(data[4:12]) != b"ET12eh00":
            raise ValueError("it does not begin as one")
        base = struct.unpack_from("<Q", data, 24)[0]
        program = Table(data, struct.unpack_from("<I", data)[0])
        segments = [(s.number(0, "<Q") + base, s.number(1, "<Q")) for s in program.tables(4)]
        inline = [table.bytes(0) for table in program.tables(3)]
        return {plan.text(0): _method(plan, data, segments, inline) for plan in program.tables(1)}
    except (struct.error, IndexError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not an ExecuTorch program: {error}", "export the bundle again"
        ) from None


def _method(
    plan: Table, data: memoryview, segments: list[tuple[int, int]], inline: list[memoryview]
) -> MethodCost:
    operators = [f"{op.text(0)}.{op.text(1)}".rstrip(".") for op in plan.tables(6)]
    ops: Counter[str] = Counter()
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            kind = instruction.number(0, "<B")
            if kind == KERNEL:
                ops[operators[instruction.table(1).number(0)]] += 1
            elif kind == DELEGATE:
                ops[DELEGATE_NAME] += 1
    sums = [0, 0, 0]
    for delegate in plan.tables(7):
        where = delegate.table(1)
        index = where.number(1)
        if where.number(0, "<B") == IN_SEGMENT:
            start, size = segments[index]
            blob = data[start : start + size]
        else:
            blob = inline[index]
        for i, value in enumerate(_products(blob)):
            sums[i] += value
    return MethodCost(dict(sorted(ops.items())), *sums)


def _products(blob: memoryview) -> tuple[int, int, int]:
    """Bytes of weights, operations and numbers of a subgraph's products with stored weights."""
    if bytes(blob[4:8]) != b"XH00":
        return 0, 0, 0  # another backend's
    start, size = struct.unpack_from("<II", blob, 10)
    data = blob[start : start + size]
    graph = Table(data, struct.unpack_from("<I", data)[0])
    sizes = [constant.number(1, "<Q") for constant in graph.tables(8)]
    values = {}
    for value in graph.tables(2):
        whole, coded = value.table(1), value.number(0, "<B") == CODED_VALUE
        tensor = whole.table(0) if coded else whole
        scales = (
            whole.table(2).number(SCALES[kind]) if coded and (kind := whole.number(1, "<B")) in SCALES else 0
        )
        values[tensor.number(6)] = tensor.numbers(2), (tensor.number(3), scales)
    weights = ops = numbers = 0
    seen: set[int] = set()
    for node in graph.tables(1):
        if node.number(0, "<B") != FULLY_CONNECTED:
            continue
        given, (shape, stored) = node.table(1).number(0), values[node.table(1).number(1)]
        n, k = shape[0], prod(shape[1:])
        rows = prod(values[given][0]) // max(k, 1)
        weights += sum(sizes[place] for place in stored)  # place 0 holds none
        ops += 2 * rows * k * n
        numbers += rows * (n + (0 if given in seen else k))
        seen.add(given)
    return weights, ops, numbers

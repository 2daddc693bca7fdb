"""A model's layers in parts, each a run of them that one graph of a step has, for NPUs whose compiled
contexts hold no more. Knows counts and bytes, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

MOST_PARTS = 64


@dataclass(frozen=True)
class Part:
    """One part: its number, its layers, and whether it is the last.

    The first takes tokens, the last gives logits. In between, `hidden_i` [1,S,hidden], the rows' sum after a
    layer, goes from part i-1 to part i.
    """

    number: int
    layers: range
    last: bool


def parts_of(counts: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a model that have so many layers each."""
    ends = list(accumulate(counts))
    return tuple(
        Part(i, range(end - count, end), i == len(ends) - 1)
        for i, (count, end) in enumerate(zip(counts, ends, strict=True))
    )


def part_name(model: str, part: int, parts: int) -> str:
    """A model's name, and where it has several parts, which one."""
    return f"{model}-part{part + 1}" if parts > 1 else model


def division(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """Layers of each of so many parts, such that the largest part is as small as can be.

    `sizes` are the layers' bytes: the first with the embedding, the last with norm and head.
    """
    sums = [0, *accumulate(sizes)]

    @cache
    def best(layers: int, count: int) -> tuple[int, tuple[int, ...]]:
        """The largest part's bytes, and the layers of each, of the first `layers` in `count` parts."""
        if count == 1:
            return sums[layers], (layers,)
        tries = ((best(before, count - 1), before) for before in range(count - 1, layers))
        return min((max(most, sums[layers] - sums[k]), (*cut, layers - k)) for (most, cut), k in tries)

    return best(len(sizes), parts)[1]


def fewest(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """The layers of the fewest parts that all stay within a limit of bytes; empty where no parts do."""
    for count in range(1, min(len(sizes), MOST_PARTS) + 1):
        counts = division(sizes, count)
        if max(sum(sizes[i] for i in part.layers) for part in parts_of(counts)) <= limit:
            return counts
    return ()

"""How layers are shared out: the largest part as small as can be, and no more parts than a limit needs."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.parts import MOST_PARTS, Part, division, fewest, part_name, parts_of


def largest(sizes: list[int], counts: tuple[int, ...]) -> int:
    return max(sum(sizes[i] for i in part.layers) for part in parts_of(counts))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_division_has_a_smaller_largest_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(1, 100, 9)]
    for parts in range(1, 10):
        ends = [(0, *cut, 9) for cut in combinations(range(1, 9), parts - 1)]
        best = min(max(sum(sizes[a:b]) for a, b in pairwise(end)) for end in ends)
        counts = division(sizes, parts)
        assert len(counts) == parts and all(counts) and sum(counts) == 9
        assert largest(sizes, counts) == best


def test_an_embedding_and_a_head_take_the_place_of_layers() -> None:
    assert division([50, *[10] * 8, 50], 3) == (2, 6, 2)


def test_the_fewest_parts_within_a_limit() -> None:
    sizes = [30, 10, 10, 10, 40]
    assert fewest(sizes, 100) == (5,)
    assert fewest(sizes, 99) == (3, 2)
    assert fewest(sizes, 49) == (1, 3, 1)
    assert fewest(sizes, 39) == ()
    for limit in range(40, 101):
        counts = fewest(sizes, limit)
        assert largest(sizes, counts) <= limit
        assert len(counts) == 1 or largest(sizes, division(sizes, len(counts) - 1)) > limit


def test_parts_know_their_layers_and_names() -> None:
    assert parts_of((2, 1)) == (Part(0, range(0, 2), False), Part(1, range(2, 3), True))
    assert [part_name("target", i, 2) for i in range(2)] == ["target-part1", "target-part2"]
    assert part_name("draft", 0, 1) == "draft"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parts": 0}, "parts 0 is not 1 to 64"),
        ({"parts": MOST_PARTS + 1}, "parts 65 is not 1 to 64"),
        ({"parts": 2, "format": "executorch"}, "parts 2 are given for format executorch"),
    ],
)
def test_parts_that_cannot_be(given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ExportConfig("demo", "x.bundle", **given).check()  # type: ignore[arg-type]
    assert said in caught.value.message and caught.value.hint

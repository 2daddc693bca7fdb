"""`lru` on layers made by hand: whose attention counts, what is even, who wins a tie, how rows age."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgespec.exporters.commit import keep, observed
from edgespec.exporters.scores import Layer, Lru
from edgespec.spec import CacheSpec

torch.set_num_threads(1)
LOOK, NOT = 9.0, 0.0


def shown(logits: list[list[list[float]]], end: int, slots: int, carried: Tensor | None = None) -> Layer:
    """One key-value head whose queries have exactly these logits [W][G][end] (keys are unit vectors)."""
    given = torch.tensor(logits)
    queries = torch.nn.functional.pad(given, (0, slots - given.shape[-1]))
    old = torch.zeros(given.shape[1], slots) if carried is None else carried
    return Layer(torch.eye(slots)[None], end, queries=queries, carried=old)


def test_a_row_that_one_head_attends_to_is_attended() -> None:
    """Query 1 of 2: only the second head looks at row 1, the first at its own row."""
    logits = [[[NOT, NOT, LOOK, 0], [NOT, LOOK, NOT, 0]], [[NOT, NOT, NOT, LOOK]] * 2]
    old = torch.full((2, 4), -3.0)
    made = Lru().observe(shown(logits, 4, 4, old))[0]
    assert made.tolist() == [[-4, -4, 0.5, 1], [-4, 0.5, 0.5, 1]]
    scores = Lru()(shown(logits, 4, 4, made))[0]
    assert scores.argsort(descending=True).tolist() == [3, 2, 1, 0]
    assert [math.floor(float(s)) for s in scores] == [-4, 0, 0, 1]


@pytest.mark.parametrize("slots", range(2, 40))
def test_the_even_share_is_of_the_rows_that_the_query_saw(slots: int) -> None:
    """A query that looks a little more at row 0 than at the others attends to it alone; a little less, to all
    others; free slots do not count.
    """
    old = torch.full((1, slots + 5), -1.0)
    for first, row, others in ((0.1, 1.0, -2.0), (-0.1, -2.0, 1.0)):
        layer = shown([[[first] + [0.0] * (slots - 1)]], slots, slots + 5, old)
        made = Lru().observe(layer)[0, 0, :slots]
        assert made.tolist() == [row] + [others] * (slots - 2) + [1.0]  # the last is the query's own


def test_each_query_of_a_block_has_its_own_even_share() -> None:
    """Row 0 has 0.3 of the first query's attention, which saw 3 rows, and less of the second's."""
    logits = [[[math.log(x) for x in row]] for row in ([0.3, 0.35, 0.35, 1], [0.2, 0.2, 0.3, 0.3])]
    assert Lru().observe(shown(logits, 4, 4))[0, 0].tolist() == [-1, 0.5, 1, 1]


def test_ties_go_to_the_newer_row() -> None:
    """Also between the last slots, and never against a row attended one query later."""
    logits = [[[LOOK, LOOK, LOOK, LOOK, NOT, NOT]], [[LOOK, NOT, NOT, NOT, NOT, LOOK]]]
    cache = CacheSpec("append", 4, 2, "lru", 0, 0, (4,), 2, 2)
    layer = observed(shown(logits, 6, 6, torch.full((1, 6), -1.0)), cache)
    assert layer.carried is not None
    assert layer.carried.tolist() == [[1, 0.5, 0.5, 0.5, 0.5, 1]]
    assert Lru()(layer)[0].argsort(descending=True).tolist() == [5, 0, 4, 3, 2, 1]
    assert keep(layer, cache).tolist() == [[0, 3, 4, 5]]


def test_an_unattended_row_ages_by_one_a_block() -> None:
    """A row counts as attended when it comes: rows 0 and 1 of the first block of two at 1/2 and 1."""
    carried, ages = torch.zeros(1, 8), []
    for end in (2, 4, 6, 8):
        logits = [[[LOOK if place == end - 2 + row else NOT for place in range(end)]] for row in (0, 1)]
        carried = Lru().observe(shown(logits, end, 8, carried))[0]
        ages.append(carried[0].tolist())
    assert ages[0] == [0.5, 1, 0, 0, 0, 0, 0, 0]
    assert ages[1] == [-0.5, 0, 0.5, 1, 0, 0, 0, 0]
    assert ages[3] == [-2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1]

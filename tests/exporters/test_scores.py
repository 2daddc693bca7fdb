"""The scores against their definitions, on small random layers.

Formulas are checked in float64, where no rounding hides a wrong term; float32 and float16 are checked where
their range or rounding is the point. test_kvpress*.py checks the same scores against another library,
test_policy_graphs.py the exported graphs against them, test_lru.py our own baseline by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgespec.exporters.commit import keep, observed, survivors
from edgespec.exporters.scores import (
    H2O,
    MOST,
    Attention,
    Caote,
    Layer,
    Lru,
    SnapKV,
    Tova,
    attention,
    carrying,
)
from edgespec.policy import BASES
from edgespec.spec import CacheSpec
from tests.helpers import oracle

torch.set_num_threads(1)
OF_BASE: dict[str, Attention] = {"tova": Tova(), "snapkv": SnapKV(), "h2o": H2O()}
some = partial(settings, derandomize=True, deadline=None, database=None)


@st.composite
def layers(draw: st.DrawFn, rows: tuple[int, int] = (3, 10), softcap: bool = False) -> Layer:
    """A full layer in float64: values share a direction, attention is flat or peaked, sums are positive."""
    kv, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    slots = draw(st.integers(*rows))
    width, peak = draw(st.integers(1, slots)), draw(st.sampled_from([0.1, 1.0, 3.0]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    normal = partial(torch.randn, generator=noise, dtype=torch.float64)
    return Layer(
        keys=normal(kv, slots, dim),
        end=slots,
        values=normal(kv, slots, dim) + 3 * normal(kv, 1, dim),
        queries=normal(width, kv * group, dim) * peak,
        carried=normal(kv * group, slots).abs() * width,
        softcap=draw(st.sampled_from([0.5, 5.0])) if softcap else 0.0,
    )


def plain(layer: Layer) -> Tensor:
    """Attention [KV,G,W,M] one query and one head at a time."""
    assert layer.queries is not None
    (width, heads, _), (kv, slots, _) = layer.queries.shape, layer.keys.shape
    made = torch.zeros(heads, width, slots, dtype=torch.float64)
    for head in range(heads):
        for row in range(width):
            own = int(layer.end) - width + row
            logits = layer.keys[head // (heads // kv), : own + 1].double() @ layer.queries[row, head].double()
            if layer.softcap:
                logits = layer.softcap * torch.tanh(logits / layer.softcap)
            made[head, row, : own + 1] = logits.exp() / logits.exp().sum()
    return made.unflatten(0, (kv, heads // kv))


class Given(Attention):
    """A base whose shares [KV,G,M] are given."""

    def __init__(self, given: Tensor) -> None:
        self.given = given

    def share(self, layer: Layer) -> Tensor:
        return self.given


def shares(heads: int, slots: int, seed: int, peak: float = 1.0) -> Tensor:
    """Shares of attention [H,M], float64."""
    noise = torch.Generator().manual_seed(seed)
    return (peak * torch.randn(heads, slots, generator=noise, dtype=torch.float64)).softmax(-1)


def rows_of(slots: int, dim: int, seed: int) -> Tensor:
    """Values [M,d], float64."""
    noise = torch.Generator().manual_seed(seed + 1)
    return torch.randn(slots, dim, generator=noise, dtype=torch.float64)


def caote(share: Tensor, values: Tensor, fast: bool = False) -> Tensor:
    """CAOTE's scores [M] of one key-value head: shares [G,M], values [M,d]."""
    layer = Layer(keys=values[None], end=len(values), values=values[None])
    return Caote(Given(share[None]), fast)(layer)[0]


# What the scores are


@some(max_examples=80)
@given(layers(softcap=True))
def test_attention_is_each_query_heads_own_softmax_of_what_it_saw(layer: Layer) -> None:
    """The scale is the queries' own, a softcap comes before the softmax, heads share keys by their group."""
    torch.testing.assert_close(torch.stack(attention(layer)), plain(layer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@some(max_examples=40)
@given(layers())
def test_caote_is_the_change_of_the_output_when_the_row_is_really_removed(base: str, layer: Layer) -> None:
    share = OF_BASE[base].share(layer)
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))
    assume(share.max() < MOST)
    assert layer.values is not None
    want = [oracle.removal_scores(head, rows) for head, rows in zip(share, layer.values, strict=True)]
    torch.testing.assert_close(Caote(OF_BASE[base])(layer), torch.stack(want), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@some(max_examples=40)
@given(layers())
def test_fastcaote_is_caote_around_the_mean_value(base: str, layer: Layer) -> None:
    share = OF_BASE[base].share(layer)
    assume(share.max() < MOST)
    assert layer.values is not None
    want = [oracle.mean_value_scores(head, rows) for head, rows in zip(share, layer.values, strict=True)]
    torch.testing.assert_close(Caote(OF_BASE[base], fast=True)(layer), torch.stack(want), rtol=1e-9, atol=0)


@some(max_examples=40)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_fastcaote_is_caote_where_the_output_is_the_mean_value(slots: int, dim: int, seed: int) -> None:
    values, even = rows_of(slots, dim, seed), torch.full((2, slots), 1 / slots, dtype=torch.float64)
    torch.testing.assert_close(caote(even, values, fast=True), caote(even, values), rtol=0, atol=1e-7)


def joint(share: Tensor, values: Tensor, gone: tuple[int, ...]) -> float:
    """c_S = ‖Σ_S α_i (o - v_i)‖₂ / (1 - Σ_S α_i), of one head."""
    index = list(gone)
    lost = share[index] @ (share @ values - values[index])
    return float(lost.norm() / (1 - share[index].sum()))


@some(max_examples=40)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 3.0]))
def test_the_joint_form_is_the_change_when_the_whole_set_is_removed(
    slots: int, dim: int, seed: int, peak: float
) -> None:
    """For every set but the full one; for one row it is CAOTE's score, and for more it is not their sum."""
    share, values = shares(1, slots, seed, peak)[0], rows_of(slots, dim, seed)
    assume(share.max() < MOST)
    output, single = share @ values, caote(share[None], values)
    for size in range(1, slots):
        for gone in combinations(range(slots), size):
            exact = float((oracle.without(share, values, gone) - output).norm())
            assert math.isclose(joint(share, values, gone), exact, rel_tol=1e-9, abs_tol=1e-12)
            if size == 1:
                assert math.isclose(exact, float(single[gone[0]]), rel_tol=1e-6, abs_tol=1e-7)


def test_single_scores_do_not_add_up() -> None:
    """Two rows on either side of the output: each alone moves it, both together leave it where it was."""
    share, values = torch.tensor([0.25, 0.25, 0.5]), torch.tensor([[1.0], [-1.0], [0.0]])
    assert caote(share[None], values)[:2].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert joint(share, values, (0, 1)) == 0


# Shares near 1


def peaked(slots: int, top: float, seed: int, group: int) -> Tensor:
    """Shares [G,M] whose first head gives one row `top`, whose others have no such row."""
    share = shares(group, slots, seed)
    share[0, 0] = 0
    share[0] *= (1 - top) / share[0].sum()
    share[0, 0] = top
    return share


def lone(top: float, seed: int) -> Tensor:
    """Shares [4,16] of which the first head gives row 0 `top`, and the others give it little."""
    share = peaked(16, top, seed, 4)
    share[1:, 0] /= 50
    share[1:] /= share[1:].sum(-1, keepdim=True)
    return share


TOPS = [0.5, 0.98, 0.99, 0.999, 1 - 1e-6, 1.0]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@some(max_examples=40)
@given(
    st.sampled_from(TOPS), st.integers(2, 24), st.integers(0, 2**31), st.integers(1, 8),
    st.sampled_from([0.01, 1.0, 8.0]),
)  # fmt: skip
def test_a_share_near_1_gives_a_finite_score(
    dtype: torch.dtype, fast: bool, top: float, slots: int, seed: int, group: int, length: float
) -> None:
    """In fp16 too, for rows of 64 values up to 8 around an offset of 4, and below PROTECTED = 3e4."""
    share, values = peaked(slots, top, seed, group), rows_of(slots, 64, seed) * length + 4
    scores = caote(share.to(dtype), values.to(dtype), fast)
    assert scores.isfinite().all() and (scores >= 0).all() and scores.max() < 3e4


@some(max_examples=80)
@given(st.sampled_from(TOPS), st.integers(3, 12), st.integers(0, 2**31), st.integers(1, 4))
def test_the_clamp_changes_no_score_below_it(top: float, slots: int, seed: int, group: int) -> None:
    """So it cannot reorder them, whatever another row's share is."""
    share, values = peaked(slots, top, seed, group), rows_of(slots, 5, seed)
    below = (share < MOST).all(0)
    want = oracle.removal_scores(share, values)[below]
    torch.testing.assert_close(caote(share, values)[below], want, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_with_nearly_all_of_one_heads_attention_is_not_the_first_to_leave(dtype: torch.dtype) -> None:
    """Bug: as the share goes to 1, ‖o - v‖ goes to 0, and the clamped factor did not make up for it."""
    share, values = lone(0.9999, 0), rows_of(16, 64, 0)
    assert oracle.removal_scores(share, values).argmax() == 0  # five times the next
    scores = caote(share.to(dtype), values.to(dtype))
    assert (scores < scores[0]).sum() > len(scores) // 2


def test_a_share_near_the_clamp_is_ranked_in_fp16() -> None:
    """Bug: ‖o‖² - 2 o·v + ‖v‖² cancels in fp16 where the share is 0.98."""
    share, values = lone(0.98, 19), rows_of(16, 64, 19)
    assert oracle.removal_scores(share, values).argmax() == 0
    assert caote(share.half(), values.half()).argmax() == 0


@some(max_examples=40)
@given(st.integers(4, 24), st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([0.1, 1.0, 8.0]))
def test_fp16_scores_are_near_where_no_share_is_large(
    slots: int, seed: int, group: int, length: float
) -> None:
    share, values = shares(group, slots, seed), rows_of(slots, 64, seed) * length + 4
    assume(share.max() < 0.6)
    want = oracle.removal_scores(share, values)
    got = caote(share.half(), values.half()).double()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.median()))


# What a query sees


@some(max_examples=60)
@given(layers(), st.data())
def test_a_query_gives_exactly_nothing_to_what_it_cannot_see(layer: Layer, data: st.DataObject) -> None:
    """Rows after its own, and slots beyond `end` whatever stands there, NaN included; `end` as a commit and
    as an observe graph has it.
    """
    assert layer.queries is not None
    slots, width = layer.keys.shape[1], layer.queries.shape[0]
    end = data.draw(st.integers(width, slots))
    keys = layer.keys.clone()
    keys[:, end:] = data.draw(st.sampled_from([0.0, 1e30, torch.nan, torch.inf]))
    for given_end in (end, torch.tensor([end])):
        p = torch.stack(attention(replace(layer, keys=keys, end=given_end)))
        for row in range(width):
            assert not p[:, :, row, end - width + row + 1 :].any()
        part = replace(layer, keys=layer.keys[:, :end], end=end)
        torch.testing.assert_close(p[..., :end], torch.stack(attention(part)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("score", [H2O(), Lru()], ids=["h2o", "lru"])
@some(max_examples=40)
@given(layers(), st.data())
def test_what_stands_beyond_the_filled_rows_never_matters_to_observe(
    score: H2O | Lru, layer: Layer, data: st.DataObject
) -> None:
    assert layer.queries is not None and layer.carried is not None
    slots, width = layer.keys.shape[1], layer.queries.shape[0]
    end = data.draw(st.integers(width, slots))
    keys, carried = layer.keys.clone(), layer.carried.clone()
    carried[:, end:] = 0
    layer = replace(layer, keys=keys, carried=carried, end=torch.tensor([end]))
    keys[:, end:] = 0
    made = [score.observe(layer)]
    for garbage in (1e30, torch.nan, -torch.inf):
        keys[:, end:] = garbage
        made.append(score.observe(layer))
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert not made[0][..., end:].any()


# What is carried


def spec(policy: str, budget: int, block: int, **more: int) -> CacheSpec:
    """A cache that protects nothing unless told."""
    protects = {"sinks": 0, "recent": 0, **more}
    width = {"queries": block} if carrying(policy) else {}
    return CacheSpec("append", budget, block, policy, **protects, buckets=(budget,), widest=block, **width)


@some(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_h2o_block_by_block_is_the_sum_over_all_queries(
    kv: int, group: int, block: int, blocks: int, seed: int
) -> None:
    """Free slots hold NaN keys until their block comes."""
    noise = torch.Generator().manual_seed(seed)
    slots = block * blocks
    keys = torch.randn(kv, slots, 4, generator=noise, dtype=torch.float64)
    queries = torch.randn(slots, kv * group, 4, generator=noise, dtype=torch.float64)
    carried = torch.zeros(kv * group, slots, dtype=torch.float64)
    for end in range(block, slots + 1, block):
        held = torch.where(torch.arange(slots).view(-1, 1) < end, keys, torch.nan)
        part = Layer(held, torch.tensor([end]), queries=queries[end - block : end], carried=carried)
        carried = H2O().observe(part).flatten(0, 1)
    want = plain(Layer(keys, slots, queries=queries)).sum(2).flatten(0, 1)
    torch.testing.assert_close(carried, want, rtol=0, atol=1e-10)


@some(max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from(["h2o", "caote(h2o)", "fastcaote(h2o)"]), st.integers(0, 2**31),
)  # fmt: skip
def test_sums_of_the_survivors_go_on_after_evictions(
    kv: int, group: int, block: int, held: int, evictions: int, policy: str, seed: int
) -> None:
    """Each head's rows by position: its sum is of every query that saw it, over what was there to be seen."""
    noise = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=noise, dtype=torch.float64)
    cache, heads = spec(policy, block * held, block), kv * group
    text = normal(kv, cache.slots + block * evictions, 4)
    places = torch.arange(cache.slots).expand(kv, -1)
    carried = torch.zeros(heads, cache.slots, dtype=torch.float64)
    total = torch.zeros(heads, text.shape[1], dtype=torch.float64)  # the reference, by position
    ends = [*range(block, cache.slots, block), *[cache.slots] * (evictions + 1)]
    for turn, end in enumerate(ends):
        keys = text.gather(1, places.unsqueeze(-1).expand(-1, -1, 4))
        queries = normal(block, heads, 4)
        layer = Layer(keys, end, keys, queries, carried)
        seen = plain(replace(layer, keys=keys)).sum(2).flatten(0, 1)
        for head in range(heads):
            where = places[head // group, :end]
            total[head, where] += seen[head, :end]
        layer = observed(layer, cache)
        assert layer.carried is not None
        for head in range(heads):
            where = places[head // group, :end]
            torch.testing.assert_close(layer.carried[head, :end], total[head, where], rtol=0, atol=1e-10)
        carried = layer.carried
        if end == cache.slots:
            kept = keep(layer, cache)
            carried = survivors(carried, kept, cache)
            assert not carried[:, cache.budget :].any()
            first = cache.slots + block * (turn - len(ends) + evictions + 1)
            fresh = torch.arange(first, first + block).clamp(max=text.shape[1] - 1).expand(kv, -1)
            places = torch.cat([places.gather(1, kept.long()), fresh], 1)

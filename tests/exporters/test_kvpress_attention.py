"""TOVA, SnapKV and H2O against PyPI's kvpress 0.5.5 where they coincide (golden files of
scripts/golden_kvpress). Each test says which part does, and where kvpress differs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgespec.exporters.scores import H2O, Layer, SnapKV, Tova, attention
from tests.helpers.oracle import survivors

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
MODELS = ("smollm2", "llama-mha", "qwen2-gqa", "qwen3-mqa")
NEAR = 2e-6  # both are fp32 softmaxes over at most 48 rows


class Case:
    """One layer: keys [KV,M,d], scaled queries [M,H,d], and kvpress's scores and sets."""

    def __init__(self, model: str, layer: int) -> None:
        with np.load(GOLDEN / f"attention-{model}.npz", allow_pickle=False) as file:
            self.keys = torch.from_numpy(file["keys"][layer].astype(np.float32))
            self.queries = torch.from_numpy(file["queries"][layer]) * float(file["scale"])
            self.theirs = {name: file[name][layer] for name in ("snapkv", "tova", "observed")}
            self.kept = {name: file[f"{name}_kept"][layer] for name in self.theirs}
            self.budget, self.window = int(file["budget"]), int(file["window"])
        self.kv_heads, self.slots = self.keys.shape[:2]

    def layer(self, width: int, carried: Tensor | None = None) -> Layer:
        """What a commit sees, with the last `width` queries."""
        return Layer(self.keys, self.slots, queries=self.queries[-width:], carried=carried)

    def observed(self, width: int) -> Tensor:
        """What H2O carries of the last `width` queries, from nothing: [KV,M], the mean over each group."""
        heads = self.queries.shape[1]
        return H2O().observe(self.layer(width, torch.zeros(heads, self.slots))).mean(1)

    def sets(self, scores: Tensor, recent: int) -> list[list[int]]:
        return [survivors(row, self.budget, 0, recent)[0] for row in scores.tolist()]


@pytest.fixture(
    scope="module", params=[(m, i) for m in MODELS for i in (0, 1)], ids=lambda v: f"{v[0]}-{v[1]}"
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_snapkv_is_kvpress_without_its_pooling(case: Case) -> None:
    """Scores of the rows before the window, and the sets: it protects the window, as recent = w does.

    kvpress's default pools over 5 neighbours (kernel_size); the golden files are made with 1.
    """
    scores = SnapKV()(case.layer(case.window))
    np.testing.assert_allclose(scores[:, : -case.window], case.theirs["snapkv"], atol=NEAR)
    assert case.sets(scores, case.window) == case.kept["snapkv"].tolist()


def test_tova_is_kvpress_before_it_averages_over_all_heads(case: Case) -> None:
    """kvpress gives every head the mean over all of them; ours is a mean over each key-value head's group.

    So the mean of ours over the key-value heads is theirs, and with recent = 1 (it protects the last row)
    that mean keeps its set; with one key-value head both are the same.
    """
    ours = Tova()(case.layer(1))
    np.testing.assert_allclose(ours.mean(0)[:-1], case.theirs["tova"], atol=NEAR)
    assert case.sets(ours.mean(0, keepdim=True).expand_as(ours), 1) == case.kept["tova"].tolist()
    if case.kv_heads == 1:
        np.testing.assert_allclose(ours[0, :-1], case.theirs["tova"], atol=NEAR)
        assert case.sets(ours, 1) == case.kept["tova"].tolist()


def test_tova_of_each_head_is_another_choice_than_kvpress_makes() -> None:
    """With several key-value heads the two must not be taken for the same."""
    for model in MODELS[:3]:
        case = Case(model, 0)
        ours = Tova()(case.layer(1))
        assert case.sets(ours, 1) != case.kept["tova"].tolist()


def observed(total: Tensor) -> Tensor:
    """A sum over queries as kvpress scores it: over the number of queries that could see the row."""
    return total / torch.arange(total.shape[-1], 0, -1)


def test_h2o_over_every_query_is_kvpress_times_the_queries_that_saw_the_row(case: Case) -> None:
    """ObservedAttentionPress divides row j's sum by M - j and looks at all M queries at once."""
    scores = case.observed(case.slots)
    np.testing.assert_allclose(observed(scores), case.theirs["observed"], atol=NEAR)
    assert case.sets(observed(scores), 0) == case.kept["observed"].tolist()
    np.testing.assert_allclose(scores.sum(-1), case.slots, rtol=1e-6)  # each query gives 1


def test_h2o_carried_over_blocks_is_the_same_sum(case: Case) -> None:
    """Where nothing is evicted between them, queries may come block by block: each row carries its sum."""
    block, heads = case.slots // 4, case.queries.shape[1]
    carried = torch.zeros(heads, case.slots)
    for end in range(block, case.slots + 1, block):
        part = Layer(case.keys, torch.tensor([end]), queries=case.queries[end - block : end], carried=carried)
        carried = H2O().observe(part).flatten(0, 1)
        assert not carried[:, end:].any()
    total = Layer(case.keys, case.slots, carried=carried).grouped(carried).mean(1)
    np.testing.assert_allclose(observed(total), case.theirs["observed"], atol=NEAR)


def test_h2o_of_the_last_block_alone_is_another_choice_than_kvpress_makes(case: Case) -> None:
    """A first commit knows the last B queries only, and a plain sum prefers old rows."""
    for width in (case.slots - case.budget, case.slots):
        assert case.sets(case.observed(width), 0) != case.kept["observed"].tolist()


def test_kvpress_tells_wrong_weights_apart(case: Case) -> None:
    """So that the tests above can fail: the scale, the mask, the window, the grouping of heads."""
    window, kv = case.window, case.kv_heads
    layer = lambda queries: Layer(case.keys, case.slots, queries=queries)  # noqa: E731
    attended = lambda queries: torch.stack(attention(layer(queries)))  # noqa: E731
    right = attended(case.queries[-window:])
    unmasked = torch.einsum(
        "whd,hmd->hwm",
        case.queries[-window:],
        case.keys.repeat_interleave(case.queries.shape[1] // case.kv_heads, 0),
    )
    wrong = {
        "scale": attended(case.queries[-window:] * 2),
        "mask": unmasked.softmax(-1).unflatten(0, (kv, -1)),
        "window": right[:, :, 1:],
    }
    if 1 < case.kv_heads < case.queries.shape[1]:
        shuffled = case.queries.unflatten(1, (case.kv_heads, -1)).transpose(1, 2).flatten(1, 2)
        wrong["grouping"] = attended(shuffled[-window:])
    for what, weights in wrong.items():
        scores = weights.mean(2).mean(1)[:, :-window]
        assert np.abs(scores.numpy() - case.theirs["snapkv"]).max() > 100 * NEAR, what

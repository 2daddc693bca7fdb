"""Token selective attention against its definition; what it is compared with does what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from edgespec.errors import InputError
from edgespec.exporters.tosa import (
    BySelector,
    Merged,
    Pruned,
    Selector,
    by_chance,
    by_norm,
    by_previous,
    by_truth,
    evenly,
    flops,
    received,
)
from edgespec.exporters.vision_encoder import Encoder, attention_of, encoder_of
from tests.helpers.tiny_vision import SIZE, model

PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
WAYS: dict[str, Callable] = {
    "selector": BySelector({1: Selector(2), 3: Selector(2)}),
    "true": by_truth,
    "previous": by_previous,
    "norm": by_norm,
    "chance": by_chance(0),
}


def encoder(family: str = "dinov2_with_registers") -> Encoder:
    return encoder_of(model(family))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_pruned_layer_is_the_layer_over_the_chosen_tokens_alone(way: str) -> None:
    """One layer by hand: the tokens that are not chosen leave as they came, the others as if alone."""
    whole = encoder()
    pruned = Pruned(whole, {1: 5, 3: 7}, WAYS[way])
    x, scores = whole.layers[0](whole.embed(PIXELS))
    index = pruned.chosen(1, whole.layers[1], x, scores)
    assert index.shape == (2, whole.prefix + 5)
    assert index[:, : whole.prefix].tolist() == [list(range(whole.prefix))] * 2
    out = pruned.through(1, whole.layers[1], x, scores)
    for image in range(2):
        chosen = index[image].tolist()
        assert len(set(chosen)) == len(chosen)
        alone, _ = whole.layers[1](x[image : image + 1, chosen])
        torch.testing.assert_close(out[image, chosen], alone[0], atol=1e-5, rtol=1e-5)
        others = [i for i in range(whole.tokens) if i not in chosen]
        assert torch.equal(out[image, others], x[image, others])


@torch.no_grad()
def test_the_choice_is_of_the_most_attended() -> None:
    whole = encoder()
    x, scores = whole.layers[0](whole.embed(PIXELS))
    true = attention_of(whole.layers[1](x)[1], 16).mean((1, 2))
    torch.testing.assert_close(by_truth(1, whole.layers[1], x, scores), true)
    index = Pruned(whole, {1: 4}, by_truth).chosen(1, whole.layers[1], x, scores)[:, whole.prefix :]
    for image in range(2):
        rest = set(range(whole.prefix, whole.tokens)) - set(index[image].tolist())
        assert true[image, index[image]].min() >= max(float(true[image, i]) for i in rest)


@torch.no_grad()
def test_a_bypassing_token_takes_the_change_of_the_nearest_patch() -> None:
    """By hand, token for token; those taking part are as without it."""
    whole = encoder()
    near = Pruned(whole, {1: 5}, by_norm, "nearest")
    x, scores = whole.layers[0](whole.embed(PIXELS))
    index = near.chosen(1, whole.layers[1], x, scores)
    plain = Pruned(whole, {1: 5}, by_norm).through(1, whole.layers[1], x, scores)
    out = near.through(1, whole.layers[1], x, scores)
    for image in range(2):
        chosen = index[image].tolist()
        torch.testing.assert_close(out[image, chosen], plain[image, chosen])
        patches = [i for i in chosen if i >= whole.prefix]
        for other in set(range(whole.tokens)) - set(chosen):
            likeness = torch.cosine_similarity(x[image, other], x[image, patches], dim=-1)
            nearest = patches[int(likeness.argmax())]
            change = plain[image, nearest] - x[image, nearest]
            torch.testing.assert_close(out[image, other], x[image, other] + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["plain", "nearest", "merged"])
@torch.no_grad()
def test_all_patches_kept_is_the_whole_encoder(way: str) -> None:
    whole = encoder("vit")
    keeps = {1: whole.patches, 3: whole.patches}
    pruned = Merged(whole, keeps) if way == "merged" else Pruned(whole, keeps, by_norm, way)
    torch.testing.assert_close(pruned(PIXELS), whole(PIXELS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_selector_predicts_rows_that_sum_to_one_and_does_not_mix_queries() -> None:
    torch.manual_seed(0)
    selector, scores = Selector(2), torch.randn(2, 2, 9, 9)
    found = selector(scores, 16)
    assert found.shape == scores.shape
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 2, 9))
    changed = scores.clone()
    changed[:, :, 4] += 1.5 * torch.randn(2, 2, 9)
    same = [i for i in range(9) if i != 4]
    torch.testing.assert_close(selector(changed, 16)[:, :, same], found[:, :, same])
    assert not torch.allclose(selector(changed, 16)[:, :, 4], found[:, :, 4], atol=1e-3)
    assert received(found.exp()).sum(1).allclose(torch.ones(2))


@torch.no_grad()
def test_merging_two_equal_patches_changes_them_alike() -> None:
    """Two patches with one content are one token; apart from their number in the softmax nothing is lost."""
    whole = encoder("vit")
    merged = Merged(whole, {1: whole.patches - 1})
    x = whole.embed(PIXELS)[:1]
    x[0, whole.prefix] = x[0, whole.prefix + 1]
    out = merged.through(1, whole.layers[1], x, torch.empty(0))
    torch.testing.assert_close(out[0, whole.prefix], out[0, whole.prefix + 1])
    one = torch.cat([x[:, : whole.prefix], x[:, whole.prefix + 1 :]], 1)  # without the double
    torch.testing.assert_close(
        out[:, whole.prefix + 1 :], whole.layers[1](one)[0][:, whole.prefix :], atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_merging_by_hand() -> None:
    """Token for token: the groups' means take part, and each patch gets its group's change."""
    whole = encoder("deit")
    merged = Merged(whole, {1: 11})
    x, scores = whole.layers[0](whole.embed(PIXELS))
    out = merged.through(1, whole.layers[1], x, scores)
    first, second = range(whole.prefix, whole.tokens, 2), range(whole.prefix + 1, whole.tokens, 2)
    for image in range(2):
        like = {i: torch.cosine_similarity(x[image, i], x[image, list(second)], dim=-1) for i in first}
        joining = sorted(first, key=lambda i: -float(like[i].max()))[: whole.patches - 11]
        groups = [[i] for i in range(whole.prefix)] + [[i] for i in first if i not in joining]
        groups += [[j, *(i for i in joining if second[int(like[i].argmax())] == j)] for j in second]
        means = torch.stack([x[image, group].mean(0) for group in groups])[None]
        change = whole.layers[1](means)[0][0] - means[0]
        for group, each in zip(groups, change, strict=True):
            torch.testing.assert_close(out[image, group], x[image, group] + each, atol=1e-5, rtol=1e-5)
    assert Merged(whole, {1: 2}).keeps == {1: 8}


def test_flops_are_those_of_every_product() -> None:
    """Counted again by PyTorch's own counter of the run itself."""
    from torch.utils.flop_counter import FlopCounterMode

    whole = encoder()
    by = BySelector({1: Selector(2), 3: Selector(2)})
    ways: list[Encoder | Pruned] = [
        whole,
        Pruned(whole, evenly(whole, 0.5), by_norm),
        Merged(whole, {1: 9, 3: 12}),
    ]
    ways += [Pruned(whole, {1: 3}, by_norm, "nearest"), Pruned(whole, {3: 5}, by, "nearest")]
    for way in ways:
        x = whole.embed(PIXELS[:1])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            scores = torch.empty(0)
            for number, layer in enumerate(whole.layers):
                if isinstance(way, Pruned) and number in way.keeps:
                    x = way.through(number, layer, x, scores)
                else:
                    x, scores = layer(x)
        assert flops(way) == counter.get_total_flops()


@pytest.mark.parametrize(
    "keeps, said",
    [
        ({0: 4}, "layer 0 cannot"),
        ({1: 4, 2: 4}, "layer 2 cannot"),
        ({9: 4}, "layer 9"),
        ({1: 0}, "keeps 0"),
        ({1: 17}, "keeps 17"),
    ],
)
def test_what_is_refused(keeps: dict[int, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pruned(encoder(), keeps, by_norm)


def test_merging_may_prune_every_layer() -> None:
    whole = encoder()
    assert evenly(whole, 0.75, Merged) == {0: 12, 1: 12, 2: 12, 3: 12} and evenly(whole, 1.0, Merged) == {}
    with torch.no_grad():
        assert Merged(whole, {0: 12, 1: 8, 2: 16, 3: 9})(PIXELS).shape == (2, whole.tokens, 32)
    for keeps in ({4: 9}, {0: 17}):
        with pytest.raises(InputError, match="cannot keep"):
            Merged(whole, keeps)

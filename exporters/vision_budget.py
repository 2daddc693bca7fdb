"""What each layer of an encoder keeps where its FLOPs have a limit, by what it loses on images: how like the
pruned encoder's features are to the whole one's. Knows encoders, nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgespec.errors import InputError
from edgespec.exporters.tosa import Pruned, flops
from edgespec.exporters.vision_encoder import Encoder

TOGETHER = 4  # images that an encoder sees at a time where it is measured
STEPS = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)  # parts of the patches that a layer keeps where FLOPs are shared out

Way = Callable[[Mapping[int, int]], Pruned]  # what each layer keeps -> the encoder pruned so


def features(way: nn.Module, test: Tensor) -> Tensor:
    """The tokens [n,N,D] of images, a few at a time: QK' of many would fill the memory."""
    return torch.cat([way(one) for one in test.split(TOGETHER)])


def likeness(way: nn.Module, test: Tensor, whole: Tensor) -> dict[str, float]:
    """How like a pruned encoder's features are to the whole one's: the mean, and the worst image's mean."""
    images = likeness_of(features(way, test), whole)
    return {"similarity": float(images.mean()), "worst": float(images.min())}


def likeness_of(tokens: Tensor, whole: Tensor) -> Tensor:
    """[n]: the mean cosine of an image's tokens [n,N,D] to the whole encoder's."""
    return torch.cosine_similarity(tokens, whole, dim=-1).mean(1)


@torch.no_grad()
def lost_alone(
    layers: range, encoder: Encoder, pruned: Way, test: Tensor, counts: Sequence[int]
) -> dict[int, list[float]]:
    """What each layer loses of likeness where it alone keeps each of `counts`.

    What stands before a layer is computed once, for a few images at a time.
    """
    lost = {number: [0.0] * len(counts) for number in layers}
    for some in test.split(TOGETHER):
        whole, x, scores = encoder(some), encoder.embed(some), some.new_empty(0)
        for number, layer in enumerate(encoder.layers):
            for step, count in enumerate(counts if number in lost else ()):
                way = pruned({number: count})
                like = likeness_of(way.onward(number, x, scores), whole)
                lost[number][step] += float((1 - like).sum()) / len(test)
            x, scores = layer(x)
    return lost


def shared_out(layers: range, encoder: Encoder, pruned: Way, test: Tensor, part: float) -> dict[int, int]:
    """What each of the layers keeps, so that the layers need at most `part` of their FLOPs.

    Each layer's loss of likeness is measured with that layer alone pruned, for each of STEPS; then always
    that layer goes a step down which loses least for a FLOP saved. InputError where no step is left.
    """
    limit = part * flops(encoder)
    counts = [encoder.patches, *(max(1, round(ratio * encoder.patches)) for ratio in STEPS)]
    lost = {n: [0.0, *losses] for n, losses in lost_alone(layers, encoder, pruned, test, counts[1:]).items()}
    level = dict.fromkeys(lost, 0)

    def keeps(at: Mapping[int, int]) -> dict[int, int]:
        return {number: counts[step] for number, step in at.items() if step}

    while (now := flops(pruned(keeps(level)))) > limit:
        prices = {}
        for number, step in level.items():
            if step + 1 < len(counts):
                saved = now - flops(pruned(keeps(level | {number: step + 1})))
                if saved > 0:
                    prices[number] = (lost[number][step + 1] - lost[number][step]) / saved
        if not prices:
            least = now / flops(encoder)
            raise InputError(f"the layers need {least:.0%} of their FLOPs at least", "allow more of them")
        best = min(prices, key=lambda number: (prices[number], number))
        level[best] += 1
    return keeps(level)

"""Encoders in whose layers fewer tokens take part: chosen ones (ToSA), or the means of alike ones (ToMe).

ToSA (arXiv 2406.08816): a selector reads a standard layer's QK' and tells the next layer's attention, and the
tokens that it attends to most take part in that layer, every second one. Beside it what it is measured
against: a random choice, the largest tokens, the true attention. Every token leaves the network, and all
shapes are fixed. Knows encoders, nothing of training or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from edgespec.errors import InputError
from edgespec.exporters.vision_encoder import Encoder, Layer, attention_of

KERNEL = 3  # of the selector's convolutions, along the keys
SHIFT = 8.0  # what a fresh selector adds before its ReLU: more than most attention logits fall below zero


class Selector(nn.Module):
    """QK' [B,H,N,N] of a layer -> the logarithm of the next layer's attention, [B,H,N,N].

    Two convolutions along the keys with a ReLU between, channels being heads, then log-softmax. The paper
    gives neither kernel nor width; here KERNEL and the layer's own number of heads. Its input is scaled by
    d^-1/2, so that one learning rate suits heads of all sizes.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        # One dimension long, along the keys; as images of queries by keys, since batches of rows are slow
        along_keys = {"kernel_size": (1, KERNEL), "padding": (0, KERNEL // 2)}
        self.first, self.second = (nn.Conv2d(heads, heads, **along_keys) for _ in range(2))
        with (
            torch.no_grad()
        ):  # begins near the layer's own attention, shifted so that the ReLU lets it through
            for conv, shift in ((self.first, SHIFT), (self.second, 0.0)):
                conv.weight.mul_(0.1)
                conv.weight[:, :, 0, KERNEL // 2] += torch.eye(heads)
                conv.bias.fill_(shift)

    def forward(self, scores: Tensor, dim: int) -> Tensor:
        """The prediction, from scores of heads of `dim` numbers."""
        return self.second(torch.relu(self.first(scores * dim**-0.5))).log_softmax(-1)


Importance = Callable[[int, Layer, Tensor, Tensor], Tensor]  # layer's number, layer, tokens, scores before it


def received(attention: Tensor) -> Tensor:
    """How much of the attention [B,H,N,N] every token receives, [B,N]: the mean of heads and queries."""
    return attention.mean((1, 2))


class BySelector(nn.Module):
    """ToSA's importance, an `Importance` that a graph holds; `selectors` by the layer that they prune."""

    def __init__(self, selectors: Mapping[int, Selector]) -> None:
        super().__init__()
        self.selectors = nn.ModuleDict({str(number): one for number, one in selectors.items()})

    def forward(self, number: int, layer: Layer, x: Tensor, scores: Tensor) -> Tensor:
        """How much attention every token will receive, [B,N]."""
        return received(self.selectors[str(number)](scores, x.shape[-1] // layer.heads).exp())


def by_truth(number: int, layer: Layer, x: Tensor, scores: Tensor) -> Tensor:
    """The next layer's own attention: what a selector predicts, at the price of computing it."""
    q, k = layer.split(layer.q(layer.norm1(x))), layer.keys(x)
    return received(attention_of(q @ k.transpose(-1, -2), q.shape[-1]))


def by_previous(number: int, layer: Layer, x: Tensor, scores: Tensor) -> Tensor:
    """The attention before it as it is: a selector that has learned nothing."""
    return received(attention_of(scores, x.shape[-1] // layer.heads))


def by_norm(number: int, layer: Layer, x: Tensor, scores: Tensor) -> Tensor:
    """The length of the tokens."""
    return x.norm(dim=-1)


def by_chance(seed: int) -> Importance:
    """A random choice, another one in every layer, the same for every image."""

    def importance(number: int, layer: Layer, x: Tensor, scores: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return torch.rand(x.shape[1], generator=draw).expand(len(x), -1)

    return importance


class Pruned(nn.Module):
    """An encoder in which `keeps` patches take part in the layers named; class and register tokens always do.

    keeps: {layer's number: patches}. A layer before a pruned one is whole, since its QK' is read. Its call is
    an Encoder's; `importance` is one of this file's. A token that bypasses a layer leaves it as it came
    (`plain`, the paper's), or takes the change of that patch taking part which is most like it by cosine
    (`nearest`, ours: most of a layer's change is common to like tokens, and a frozen network misses it).
    """

    def __init__(
        self, encoder: Encoder, keeps: Mapping[int, int], importance: Importance, bypass: str = "plain"
    ) -> None:
        super().__init__()
        self.encoder, self.keeps, self.importance, self.bypass = encoder, dict(keeps), importance, bypass
        self.check_keeps()

    @staticmethod
    def layers(encoder: Encoder) -> range:
        """The layers that can be pruned together: every second one."""
        return range(1, len(encoder.layers), 2)

    def check_keeps(self) -> None:
        """InputError where layers cannot be pruned so."""
        for number, count in self.keeps.items():
            if not 0 < number < len(self.encoder.layers) or number - 1 in self.keeps:
                raise InputError(
                    f"layer {number} cannot be pruned: the layer before it is read",
                    f"prune layers of 1..{len(self.encoder.layers) - 1} with a whole one before each",
                )
            if not 0 < count <= self.encoder.patches:
                raise InputError(f"layer {number} keeps {count} patches", f"keep 1 to {self.encoder.patches}")

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,S,S] -> tokens [B,N,D]."""
        return self.onward(0, self.encoder.embed(pixels), pixels.new_empty(0))

    def onward(self, first: int, x: Tensor, scores: Tensor) -> Tensor:
        """The tokens that leave the network, from those before layer `first` and QK' of the one before."""
        for number, layer in islice(enumerate(self.encoder.layers), first, None):
            if number in self.keeps:
                x = self.through(number, layer, x, scores)
            else:
                x, scores = layer(x)
        return self.encoder.last(x)

    def through(self, number: int, layer: Any, x: Tensor, scores: Tensor) -> Tensor:
        """The layer over the chosen tokens; the others bypass it."""
        index = spread(self.chosen(number, layer, x, scores), x)
        before = x.gather(1, index)
        after, _ = layer(before)
        if self.bypass == "nearest":
            patches = slice(self.encoder.prefix, None)
            unit = nn.functional.normalize(x, dim=-1)
            like = unit @ nn.functional.normalize(before[:, patches], dim=-1).transpose(1, 2)
            x = x + (after - before)[:, patches].gather(1, spread(like.argmax(-1), x))
        return x.scatter(1, index, after)

    def beside(self, number: int) -> int:
        """FLOPs that a pruned layer needs beside its tokens: the selector's, and of finding the nearest."""
        tokens, layer = self.encoder.tokens, self.encoder.layers[number]
        selecting = 2 * tokens**2 * 2 * KERNEL * layer.heads**2
        comparing = 2 * tokens * self.keeps[number] * layer.q.in_features
        return selecting * isinstance(self.importance, BySelector) + comparing * (self.bypass == "nearest")

    def chosen(self, number: int, layer: Any, x: Tensor, scores: Tensor) -> Tensor:
        """Places [B, prefix + keeps] of the tokens that take part."""
        prefix = self.encoder.prefix
        rank = self.importance(number, layer, x, scores)[:, prefix:]
        best = rank.topk(self.keeps[number], 1).indices + prefix
        return torch.cat([torch.arange(prefix, device=x.device).expand(len(x), -1), best], 1)


class Merged(Pruned):
    """Token merging (ToMe, arXiv 2210.09461) in the place of a choice: alike patches take part as one.

    Patches are parted into two halves; those of the first that are most like one of the second join it, and
    their mean takes part. After the layer each gets its group's change. At most half of the patches can be
    merged in one layer: a smaller number to keep is raised to that. Every layer can be pruned. The paper
    merges for good, between attention and MLP, and compares keys; here all patches leave the layer, and
    tokens are compared (cosine), which needs no product of the layer's.
    """

    def __init__(self, encoder: Encoder, keeps: Mapping[int, int]) -> None:
        half = encoder.patches - encoder.patches // 2
        super().__init__(encoder, {n: max(count, half) for n, count in keeps.items()}, by_norm)

    @staticmethod
    def layers(encoder: Encoder) -> range:
        """All of them: nothing is read of the layer before."""
        return range(len(encoder.layers))

    def check_keeps(self) -> None:
        """InputError for a layer that is not there, or more patches than there are."""
        for number, count in self.keeps.items():
            if number not in self.layers(self.encoder) or count > self.encoder.patches:
                raise InputError(
                    f"layer {number} cannot keep {count} patches",
                    f"there are {len(self.encoder.layers)} layers and {self.encoder.patches} patches",
                )

    def through(self, number: int, layer: Any, x: Tensor, scores: Tensor) -> Tensor:
        """The layer over merged tokens, the change handed back to all; fixed shapes throughout."""
        prefix, gone = self.encoder.prefix, self.encoder.patches - self.keeps[number]
        front, first, second = x[:, :prefix], x[:, prefix::2], x[:, prefix + 1 :: 2]
        one, other = (nn.functional.normalize(half, dim=-1) for half in (first, second))
        like, partner = (one @ other.transpose(1, 2)).max(-1)
        order = like.topk(first.shape[1], 1).indices  # those that join, then those that stay
        to = partner.gather(1, order[:, :gone])
        ordered = first.gather(1, spread(order, x))
        joins = (to[..., None] == torch.arange(second.shape[1], device=x.device)).to(x.dtype)
        total = second + joins.transpose(1, 2) @ ordered[:, :gone]
        merged = total / (1 + joins.sum(1))[..., None]
        taking_part = torch.cat([front, ordered[:, gone:], merged], 1)
        change = layer(taking_part)[0] - taking_part
        stay = prefix + first.shape[1] - gone
        of_second = change[:, stay:]
        of_ordered = torch.cat([of_second.gather(1, spread(to, x)), change[:, prefix:stay]], 1)
        first = first + torch.zeros_like(first).scatter(1, spread(order, x), of_ordered)
        second = second + of_second
        pairs = torch.stack([first[:, : second.shape[1]], second], 2).flatten(1, 2)
        return torch.cat([front + change[:, :prefix], pairs, first[:, second.shape[1] :]], 1)

    def beside(self, number: int) -> int:
        """FLOPs of comparing the halves, and of the sums of those that join."""
        patches, dim = self.encoder.patches, self.encoder.layers[number].q.in_features
        second = patches // 2
        return 2 * second * dim * ((patches - second) + (patches - self.keeps[number]))


def spread(index: Tensor, x: Tensor) -> Tensor:
    """Places [B,n] as those of whole tokens, [B,n,D]."""
    return index[..., None].expand(-1, -1, x.shape[-1])


def evenly(encoder: Encoder, ratio: float, way: type[Pruned] = Pruned) -> dict[int, int]:
    """The same part of the patches in every layer that a way can prune; none where all of them stay."""
    count = max(1, round(ratio * encoder.patches))
    return {} if ratio >= 1 else dict.fromkeys(way.layers(encoder), count)


def flops(way: Encoder | Pruned) -> int:
    """Multiplications and additions of one image's layers, 2 a product; norms and the embedding left out."""
    encoder, keeps = (way, {}) if isinstance(way, Encoder) else (way.encoder, way.keeps)
    total = 0
    for number, layer in enumerate(encoder.layers):
        tokens = encoder.prefix + keeps.get(number, encoder.patches)
        linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
        total += 2 * tokens * linear + 4 * tokens**2 * layer.q.out_features
        if number in keeps and isinstance(way, Pruned):
            total += way.beside(number)
    return total

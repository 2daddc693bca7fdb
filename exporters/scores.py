"""The scores by which a commit ranks a layer's rows: one class a policy, each under its equation.

A class says what it reads of a layer, and gives a score for each row (higher = keep). A new policy is one
class, one row of SCORES, and its name in edgespec.policy. Attention is computed again from the block's stored
queries: nothing is evicted within a block, so it is the attention that these rows gave. Letters: M slots, B
block, W stored queries, H query heads, KV key-value heads of G = H/KV query heads each, d head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from edgespec.exporters.attention import MASKED
from edgespec.policy import OVER, base_of, carries

TINY = 1e-6  # least square of a length; a floor, because the optimizer of torch.onnx.export drops `+ 1e-12`
SMALL = 1 / 16  # in fp16 keys are made smaller first: the square of a length of 256 is beyond its range
MOST = 0.95  # a row with this share of a head's attention stays: beyond it o comes so near to v_j that fp16
LARGEST = 1e4  # loses the distance and α/(1 - α) grows without end. LARGEST is what such a row scores


@dataclass(frozen=True)
class Layer:
    """What a commit sees of a layer, in order of position; a policy is given what it `reads` and None else.

    keys (after RoPE), values [KV,M,d]; queries [W,H,d] (after RoPE, times the attention's scale) of the rows
    before `end`; carried [H,M], what a Carrying score has of its rows; `end` the rows that are filled: M in a
    commit, a tensor [1] elsewhere; `half` where a device computes in fp16.
    """

    keys: Tensor
    end: int | Tensor
    values: Tensor | None = None
    queries: Tensor | None = None
    carried: Tensor | None = None
    softcap: float = 0.0
    half: bool = False

    def grouped(self, heads: Tensor) -> Tensor:
        """[H,...] as [KV,G,...]: the query heads by the key-value head that they share."""
        kv = self.keys.shape[0]
        return heads.reshape(kv, heads.shape[0] // kv, *heads.shape[1:])


def attention(layer: Layer) -> list[Tensor]:
    """Causal attention of the stored queries, one [G,W,M] a key-value head; a row's own slot is end - W + r.

    Head by head: what one has to hold stays in a core's cache, and the mask is added inside the product.
    """
    assert layer.queries is not None
    width, slots = layer.queries.shape[0], layer.keys.shape[1]
    place = torch.arange(slots)
    own = torch.arange(width).view(-1, 1) + (layer.end - width)  # each query's own slot
    mask = torch.where(place <= own, 0.0, MASKED)
    keys = layer.keys
    if not (isinstance(layer.end, int) and layer.end == slots):  # a free slot may hold NaN
        keys = torch.where(place.view(-1, 1) < layer.end, keys, 0.0)
    queries = layer.grouped(layer.queries.transpose(0, 1))
    return [share(q, k, mask, layer.softcap) for q, k in zip(queries, keys, strict=True)]


def share(queries: Tensor, keys: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """One key-value head's attention [G,W,M] of queries [G,W,d] over keys [M,d], the mask [W,M] added."""
    group, width, _ = queries.shape
    mask = mask.expand(group, -1, -1).flatten(0, 1)
    # One product for the group, several times faster than one a query head.
    scores = queries.flatten(0, 1) @ keys.T
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores + mask).softmax(-1).unflatten(0, (group, width))


class Score(ABC):
    """A policy's score. `reads` names the parts of a Layer it is given."""

    reads: tuple[str, ...] = ("keys",)

    @abstractmethod
    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]."""


class Carrying(Score):
    """A score of every block since a row came: `observe` after each block, and what it gave is carried on.

    A commit scores by `carried` alone, this block observed.
    """

    reads = ("keys", "queries", "carried")

    @abstractmethod
    def observe(self, layer: Layer) -> Tensor:
        """What to carry on, [KV,G,M], with what this block's queries saw; 0 where no row is."""


class Sinks(Score):
    """By age: the newest stay, and the protected first (StreamingLLM, arXiv 2309.17453)."""

    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]."""
        kv, slots, _ = layer.keys.shape
        place = torch.arange(slots, dtype=layer.keys.dtype, device=layer.keys.device)
        score = place.expand(kv, -1) / slots
        # On codes the places are all that a graph gives, and Qualcomm's compiler takes none of constants.
        return score + 0 * layer.keys[..., 0] if layer.half else score


class KeyDiff(Score):
    """By how little a key resembles the others (KeyDiff, arXiv 2504.15364, equation 6).

    s_j = -cos(k_j, mean_i k_i/‖k_i‖), the mean over all M rows.
    """

    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]."""
        keys = layer.keys * SMALL if layer.half else layer.keys
        # Keys are never divided by their lengths one by one: two products do it for all.
        least = TINY if layer.half else TINY / SMALL**2
        inverse = torch.rsqrt((keys * keys).sum(-1).clamp(min=least)).unsqueeze(1)
        anchor = (inverse / keys.shape[1]) @ keys
        anchor = anchor * torch.rsqrt(anchor.pow(2).sum(-1, keepdim=True).clamp(min=TINY))
        return -(anchor @ keys.transpose(1, 2) * inverse).squeeze(1)


class Attention(Score):
    """A score that is a share of attention: what CAOTE builds on."""

    reads: tuple[str, ...] = ("keys", "queries")

    @abstractmethod
    def share(self, layer: Layer) -> Tensor:
        """α [KV,G,M]: every query head's attention over the rows, normalised to sum 1."""

    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]: the mean share over the group's query heads."""
        return self.share(layer).mean(1)


class Tova(Attention):
    """By the attention of the block's last query (TOVA, arXiv 2401.06104).

    Differs from the paper: a block leaves at once, and each key-value head keeps its own rows (the paper
    averages over all heads of a layer).
    """

    def share(self, layer: Layer) -> Tensor:
        """α [KV,G,M]."""
        return torch.stack([p[:, -1] for p in attention(layer)])


class SnapKV(Attention):
    """By the mean attention of the last W queries (SnapKV, arXiv 2404.14469).

    Differs from the paper: scored anew at every commit, not once after the prompt; scores are not pooled over
    neighbours; window rows are ranked with the others (`recent` is what protects them).
    """

    def share(self, layer: Layer) -> Tensor:
        """α [KV,G,M]."""
        return torch.stack([p.mean(1) for p in attention(layer)])


class H2O(Attention, Carrying):
    """By the attention summed over every query so far (Heavy-Hitter Oracle, arXiv 2306.14048).

    Differs from the paper: a block leaves at once. The sum is carried per query head.
    """

    reads = Carrying.reads

    def observe(self, layer: Layer) -> Tensor:
        """Sums of attention [KV,G,M]."""
        assert layer.carried is not None
        seen = torch.stack([p.sum(1) for p in attention(layer)])
        return layer.grouped(layer.carried) + seen

    def share(self, layer: Layer) -> Tensor:
        """α [KV,G,M]."""
        assert layer.carried is not None
        total = layer.grouped(layer.carried)
        return total / total.sum(-1, keepdim=True)


class Lru(Carrying):
    """By how lately a row was attended to: with sinks and recent rows protected, "protection only".

    A query attends to a row where one of the group's heads gives it at least the even share, 1 / rows seen. A
    row counts as attended when it comes. Scores are in blocks: in (0,1] this block, below it before. A simple
    baseline of ours, least recently used as caches have it.
    """

    def observe(self, layer: Layer) -> Tensor:
        """When each row was last attended to, [KV,G,M]."""
        assert layer.carried is not None and layer.queries is not None
        width, slots = layer.queries.shape[0], layer.keys.shape[1]
        first = layer.end - width
        turn, place = torch.arange(width).view(-1, 1) + 1.0, torch.arange(slots)
        even = 1 / (turn + first)
        # A product, because a choice between so many costs as much as all the rest.
        now = torch.stack([((p >= even).float() * (turn / width)).amax(1) for p in attention(layer)])
        own = torch.where(place >= first, (place - first + 1) / width, 0.0)
        now = torch.maximum(now, own)
        carried = torch.where(now > 0, now, layer.grouped(layer.carried) - 1)
        return torch.where(place < layer.end, carried, 0.0)

    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]: the latest over the group's query heads; of rows attended together the newer."""
        assert layer.carried is not None and layer.queries is not None
        width, slots = layer.queries.shape[0], layer.keys.shape[1]
        return layer.grouped(layer.carried).amax(1) + torch.arange(slots) / (2.0 * width * slots)


class Caote(Score):
    """By how much the attention's output changes when the row alone is dropped (CAOTE, arXiv 2504.14051,
    theorem 3.2), on a base's attention.

    c_j = Σ_group α_j / (1 - α_j) · ‖o - v_j‖₂, o = Σ_i α_i v_i. `fastcaote`: o is the mean value.
    """

    def __init__(self, base: Attention, fast: bool = False) -> None:
        self.base, self.fast = base, fast
        self.reads = (*base.reads, "values")

    def __call__(self, layer: Layer) -> Tensor:
        """Scores [KV,M]."""
        assert layer.values is not None
        share = self.base.share(layer)
        # Lengths do not change with the origin, and around the mean ‖o‖² - 2 o·v + ‖v‖² cancels little.
        values = layer.values - layer.values.mean(1, keepdim=True)
        square = values.pow(2).sum(-1)
        if self.fast:
            distance = square.clamp(min=0).sqrt().unsqueeze(1)
        else:
            output = share @ values
            apart = output.pow(2).sum(-1, keepdim=True) - 2 * (output @ values.transpose(1, 2))
            distance = (apart + square.unsqueeze(1)).clamp(min=0).sqrt()
        scores = (share / (1 - share.clamp(max=MOST)) * distance).sum(1)
        return torch.where(share.amax(1) < MOST, scores, LARGEST)


SCORES: dict[str, Score] = {
    "sinks": Sinks(),
    "keydiff": KeyDiff(),
    "lru": Lru(),
    "tova": Tova(),
    "snapkv": SnapKV(),
    "h2o": H2O(),
}


def score_of(policy: str) -> Score:
    """The score of a policy's name."""
    base = SCORES[base_of(policy)]
    over = policy.partition("(")[0]
    if over not in OVER:
        return base
    assert isinstance(base, Attention)
    return Caote(base, fast=over == "fastcaote")


def carrying(policy: str) -> Carrying | None:
    """The part of a policy's score that is carried from block to block, None where nothing is."""
    if not carries(policy):
        return None
    base = SCORES[base_of(policy)]
    assert isinstance(base, Carrying)
    return base

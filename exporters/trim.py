"""Chooses the rows of a draft's head (VocabTrim, arXiv 2506.22694) by what the target writes, and how many.

The paper counts tokens of a corpus, or of the target's answers. Here half of a place's count is the token
written, half the probabilities of the target's likeliest tokens there: the expectation of what it would have
written. Sizes are judged on answers that were not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgespec.errors import InputError
from edgespec.exporters.samples import Sample
from edgespec.trim_result import TrimRow

HELD_OUT = 5  # every fifth answer
MOST_DRAFTS = 7  # what the widest verify graph of the default export holds
SIZES = tuple(sorted(n for power in range(9, 17) for n in (2**power, 3 * 2 ** (power - 1))))

Logits = Callable[[Sample], np.ndarray]  # a draft's, of every written place: float32 [T, V]


@dataclass(frozen=True)
class Corpus:
    """Answers to one file of prompts; all of it together counts `weight`, however long."""

    name: str
    weight: float
    samples: tuple[Sample, ...]

    def split(self) -> tuple[Corpus, Corpus]:
        """What is counted, and every fifth answer, which is held out."""
        parts = [
            tuple(s for i, s in enumerate(self.samples) if (i % HELD_OUT == HELD_OUT - 1) == held)
            for held in (False, True)
        ]
        if not all(parts):
            raise InputError(
                f"{self.name} has {len(self.samples)} answers; {HELD_OUT} are needed to hold one out",
                "give more prompts, or a larger --limit",
            )
        counted, held = (Corpus(self.name, self.weight, part) for part in parts)
        return counted, held

    @property
    def tokens(self) -> int:
        """Tokens that the target wrote."""
        return sum(len(s.tokens) - s.prompt for s in self.samples)


def scores(corpora: Sequence[Corpus], vocab: int) -> np.ndarray:
    """How often the target wants each token, [V]; sums to at most 1 (what is beyond its top K is lost).

    score(x) = mean over corpora, by weight, of the mean over places of (1[written = x] + p(x)) / 2.
    """
    total = np.zeros(vocab)
    for corpus in corpora:
        counts = np.zeros(vocab)
        for s in corpus.samples:
            np.add.at(counts, s.tokens[s.prompt :], 0.5)
            np.add.at(counts, s.top_ids, 0.5 * np.exp(s.top_logp.astype(np.float64)))
        total += corpus.weight * counts / corpus.tokens
    return total / sum(c.weight for c in corpora)


def ranked(score: np.ndarray, kept: set[int]) -> np.ndarray:
    """Every id: first those that are always kept, then by falling score; of equals the lower id."""
    rest = sorted((i for i in range(len(score)) if i not in kept), key=lambda i: (-score[i], i))
    return np.array([*sorted(kept), *rest], np.int64)


def chosen(order: np.ndarray, score: np.ndarray, size: int) -> tuple[int, ...]:
    """The ids of a head of this many rows, most frequent first."""
    return tuple(sorted(map(int, order[:size]), key=lambda i: (-score[i], i)))


def recent(sample: Sample, rank: np.ndarray, size: int, rows: int) -> Iterator[dict[int, None]]:
    """What context rows hold at each written place: the last `rows` different tokens that the head lacks."""
    held: dict[int, None] = {}
    for place, token in enumerate(sample.tokens.tolist()):
        if place >= sample.prompt:
            yield held
        if rows and rank[token] >= size:
            held.pop(token, None)
            held[token] = None
            if len(held) > rows:
                del held[next(iter(held))]


def covered(sample: Sample, rank: np.ndarray, size: int, rows: int) -> np.ndarray:
    """Whether each written token has a row, bool [T]."""
    written = sample.tokens[sample.prompt :].tolist()
    held = recent(sample, rank, size, rows)
    return np.array([rank[x] < size or x in some for x, some in zip(written, held, strict=True)])


def accepted(
    sample: Sample, order: np.ndarray, sizes: Sequence[int], rows: int, logits: np.ndarray
) -> np.ndarray:
    """How likely a proposal is accepted at each written place, given the text: [sizes, T]; sizes ascend.

    Greedy: 1 where the draft's likeliest token of the union of both kinds of rows is the one written.
    Sampled, q the draft's law over the union: a token x is written with p(x), and by acceptance with
    min(p(x), q(x)), so given x with min(1, q(x) / p(x)).
    """
    rank, written = np.argsort(order), sample.tokens[sample.prompt :]
    places, heat = np.arange(len(written)), sample.temperature or 1.0
    scaled = logits.astype(np.float64) / heat
    own, by_rank = scaled[places, written], scaled[:, order]
    made = np.zeros((len(sizes), len(written)))
    static = (
        np.full(len(written), -np.inf),
        np.zeros(len(written)),
    )  # largest logit, and sum of exp(logit - it)
    for i, size in enumerate(sizes):
        inside = covered(sample, rank, size, rows)
        static = joined(*static, by_rank[:, sizes[i - 1] if i else 0 : size])
        high, law = (x.copy() for x in static)
        for place, held in enumerate(recent(sample, rank, size, rows)):
            if held:
                high[place], law[place] = joined(high[place], law[place], scaled[place, list(held)])
        if sample.temperature == 0:
            made[i] = inside & (own >= high)
        else:
            made[i] = inside * np.minimum(1, np.exp(own - high) / law / likelihood(sample))
    return made


def joined(high: Any, law: Any, more: np.ndarray) -> tuple[Any, Any]:
    """A softmax's largest logit and its sum of exp(logit - that), with further logits [..., n] in it."""
    top = np.maximum(high, more.max(-1))
    return top, law * np.exp(high - top) + np.exp(more - top[..., None]).sum(-1)


def likelihood(sample: Sample) -> np.ndarray:
    """The target's probability of each written token at the sample's temperature, [T].

    Of its likeliest K tokens; one beyond them is taken as likely as the last of these, which is too much.
    """
    written = sample.tokens[sample.prompt :]
    p = np.exp(sample.top_logp.astype(np.float64) / (sample.temperature or 1.0))
    beyond = 1 - p.sum(1, keepdims=True) if sample.temperature == 1 else 0.0
    p /= p.sum(1, keepdims=True) + np.maximum(beyond, 0)
    hit = sample.top_ids == written[:, None]
    return np.where(hit.any(1), (p * hit).sum(1), p[:, -1])


def verify_calls(acceptance: np.ndarray, drafts: int) -> np.ndarray:
    """Expected verify calls over a text whose places accept with these chances [..., T], `drafts` a round.

    N(i) = 1 + sum over a of P(the a drafts from i are accepted, and no more) N(i + a + 1): exact, since given
    the text its places accept independently of each other.
    """
    places = acceptance.shape[-1]
    calls = np.zeros((*acceptance.shape[:-1], places + drafts + 2))
    for i in range(places - 1, -1, -1):
        calls[..., i] = 1
        run = np.ones(acceptance.shape[:-1])
        for a in range(min(drafts, places - i)):
            calls[..., i] += run * (1 - acceptance[..., i + a]) * calls[..., i + a + 1]
            run = run * acceptance[..., i + a]
        calls[..., i] += run * calls[..., i + min(drafts, places - i) + 1]
    return calls[..., 0]


def curve(
    held_out: Sequence[Corpus],
    order: np.ndarray,
    sizes: Sequence[int],
    rows: int,
    costs: Callable[[int, int], float],
    logits: Logits | None,
    advance: Callable[[int], None],
) -> list[TrimRow]:
    """What heads of these sizes give on held-out answers; without `logits` coverage stands for acceptance."""
    rank = np.argsort(order)
    share = sum(c.weight for c in held_out)
    coverage, acceptance = np.zeros(len(sizes)), np.zeros(len(sizes))
    calls = np.zeros((MOST_DRAFTS, len(sizes)))  # verify calls a token
    for corpus in held_out:
        for s in corpus.samples:
            inside = np.stack([covered(s, rank, size, rows) for size in sizes]).astype(float)
            chance = inside if logits is None else accepted(s, order, sizes, rows, logits(s))
            part = corpus.weight / share / corpus.tokens
            coverage += part * inside.sum(1)
            acceptance += part * chance.sum(1)
            calls += part * np.stack([verify_calls(chance, d) for d in range(1, MOST_DRAFTS + 1)])
            advance(1)
    made = []
    for i, size in enumerate(sizes):
        c = costs(size, rows)
        options = [
            TrimRow(size, rows, float(coverage[i]), float(acceptance[i]), 1 / float(calls[g - 1, i]), g, c,
                    1 / float(calls[g - 1, i]) / (1 + c * g))
            for g in range(1, MOST_DRAFTS + 1)
        ]  # fmt: skip
        made.append(min(options, key=lambda r: (-r.mbsu, r.gamma)))
    return made


def sizes_of(kept: int, vocab: int, wanted: int | None) -> list[int]:
    """Sizes to try: powers of two and what is between, the whole head, and the one asked for."""
    if wanted is not None and not kept <= wanted <= vocab:
        raise InputError(
            f"size {wanted} is not {kept} (the tokens that are always kept) to {vocab}",
            f"use --size {max(kept, min(vocab, 4096))}, or --size auto",
        )
    some = {n for n in SIZES if kept <= n < vocab} | {max(kept, 1), vocab}
    return sorted(some | ({wanted} if wanted else set()))

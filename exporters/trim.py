"""Chooses the rows of a draft's head (VocabTrim, arXiv 2506.22694) by what the target writes, and how many.

The paper counts tokens of a corpus, or of the target's answers. Here half of a place's count is the token
written, half the probabilities of the target's likeliest tokens there: the expectation of what it would have
written. Sizes are judged on answers that were not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgespec.errors import InputError
from edgespec.exporters.samples import Sample
from edgespec.trim_result import TrimRow

HELD_OUT = 5  # every fifth answer
MOST_DRAFTS = 7  # what the widest verify graph of the default export holds
SIZES = tuple(sorted(n for power in range(9, 17) for n in (2**power, 3 * 2 ** (power - 1))))
TOGETHER = 1024  # answers that are counted at once

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
        for start in range(0, len(corpus.samples), TOGETHER):
            some = corpus.samples[start : start + TOGETHER]
            counts += 0.5 * np.bincount(np.concatenate([s.tokens[s.prompt :] for s in some]), minlength=vocab)
            seen = np.concatenate([s.top_logp.ravel() for s in some]).astype(np.float64)
            ids = np.concatenate([s.top_ids.ravel() for s in some])
            counts += 0.5 * np.bincount(ids, np.exp(seen), minlength=vocab)
        total += corpus.weight * counts / corpus.tokens
    return total / sum(c.weight for c in corpora)


def ranked(score: np.ndarray, kept: set[int]) -> np.ndarray:
    """Every id: first those that are always kept, then by falling score; of equals the lower id."""
    rest = sorted((i for i in range(len(score)) if i not in kept), key=lambda i: (-score[i], i))
    return np.array([*sorted(kept), *rest], np.int64)


def chosen(order: np.ndarray, score: np.ndarray, size: int) -> tuple[int, ...]:
    """The ids of a head of this many rows, most frequent first."""
    return tuple(sorted(map(int, order[:size]), key=lambda i: (-score[i], i)))


def latest(sample: Sample) -> np.ndarray:
    """The different tokens before each written place, ids [T, D], the latest first; -1 fills up the rows."""
    ids, which = np.unique(sample.tokens[:-1], return_inverse=True)
    seen = np.full((len(which), len(ids)), -1)
    seen[np.arange(len(which)), which] = np.arange(len(which))
    last = np.maximum.accumulate(seen)[sample.prompt - 1 :]  # where each token stood last
    order = np.argsort(-last, axis=1)
    return np.where(np.take_along_axis(last, order, 1) < 0, -1, ids[order])


def context(before: np.ndarray, rank: np.ndarray, sizes: Sequence[int], ways: Sequence[int]) -> np.ndarray:
    """Which of the tokens `before` [T, D] context rows hold: the last `rows` different ones that the head
    lacks, bool [ways, sizes, T, D]. A way is a number of context rows.
    """
    lacks = (before >= 0) & (rank[before] >= np.reshape(sizes, (-1, 1, 1)))
    count = lacks.cumsum(-1)
    return np.stack([lacks & (count <= rows) for rows in ways])


def covered(sample: Sample, rank: np.ndarray, sizes: Sequence[int], ways: Sequence[int]) -> np.ndarray:
    """Whether each written token has a row, bool [ways, sizes, T]."""
    written, before = sample.tokens[sample.prompt :], latest(sample)
    lent: np.ndarray = (context(before, rank, sizes, ways) & (before == written[:, None])).any(-1)
    return lent | (rank[written] < np.reshape(sizes, (-1, 1)))


def accepted(
    sample: Sample, order: np.ndarray, sizes: Sequence[int], ways: Sequence[int], logits: np.ndarray
) -> np.ndarray:
    """How likely a proposal is accepted at each written place, given the text: [ways, sizes, T].

    Greedy: 1 where no token of the union of both kinds of rows has a larger logit than the one written.
    Sampled, q the draft's law over the union: a token x is written with p(x), and by acceptance with
    min(p(x), q(x)), so given x with min(1, q(x) / p(x)). Sizes ascend: a head holds every smaller one, and
    1 / q(x) is a sum over the union, so one pass over the vocabulary serves all of them.
    """
    rank, places, starts = np.argsort(order), np.arange(len(logits)), [0, *sizes[:-1]]
    before, own = latest(sample), logits[places, sample.tokens[sample.prompt :], None]
    lent, inside = logits[places[:, None], before], covered(sample, rank, sizes, ways)
    held, heat = context(before, rank, sizes, ways), sample.temperature
    pairs = zip(logits, own, strict=True)  # place by place: a row of logits stays in the processor's cache
    if heat == 0:
        first = [rank[row > x].min(initial=len(order)) for row, x in pairs]
        beaten = (held & (lent > own)).any(-1) | (np.array(first) < np.reshape(sizes, (-1, 1)))
        return inside & ~beaten
    sums = [np.add.reduceat(weights(row, x, heat)[order[: sizes[-1]]], starts) for row, x in pairs]
    heads = np.stack(sums, axis=1).cumsum(0)
    more = np.where(held, weights(lent, own, heat), 0).sum(-1)
    law = np.maximum(heads + more, 1)  # 1 is the written token's own part, where it has a row
    made: np.ndarray = inside * np.minimum(1, 1 / law / likelihood(sample))
    return made


def weights(logits: np.ndarray, own: np.ndarray, temperature: float) -> np.ndarray:
    """How many times likelier than the written token, of logit `own`, each token is."""
    with np.errstate(over="ignore"):  # infinitely: the written token is never proposed
        made: np.ndarray = np.exp((logits.astype(np.float64) - own) / temperature)
    return made


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
    padded = np.pad(acceptance, [(0, 0)] * (acceptance.ndim - 1) + [(0, drafts)])  # nothing is behind the end
    ahead = np.lib.stride_tricks.sliding_window_view(padded, drafts, axis=-1)[..., :places, :]
    ends = np.cumprod(np.insert(ahead, 0, 1, axis=-1), axis=-1)  # P(at least a drafts are accepted)
    ends[..., :-1] *= 1 - ahead
    calls = np.zeros((*acceptance.shape[:-1], places + drafts + 1))
    for i in range(places - 1, -1, -1):
        calls[..., i] = 1 + (ends[..., i, :] * calls[..., i + 1 : i + drafts + 2]).sum(-1)
    made: np.ndarray = calls[..., 0]
    return made


def judged(
    held_out: Corpus,
    order: np.ndarray,
    sizes: Sequence[int],
    ways: Sequence[int],
    logits: Logits | None,
    advance: Callable[[int], None],
) -> np.ndarray:
    """What heads of these sizes give on held-out answers, with each number of context rows in turn (`ways`).

    A token's mean, [2 + MOST_DRAFTS, ways, sizes]: coverage, acceptance, and verify calls with 1, 2, ...
    drafts a round. Without `logits` coverage stands for acceptance.
    """
    rank = np.argsort(order)
    total = np.zeros((2 + MOST_DRAFTS, len(ways), len(sizes)))
    for s in held_out.samples:
        inside = covered(s, rank, sizes, ways)
        chance = inside if logits is None else accepted(s, order, sizes, ways, logits(s))
        calls = [verify_calls(chance, drafts) for drafts in range(1, MOST_DRAFTS + 1)]
        total += np.stack([inside.sum(-1), chance.sum(-1), *calls])
        advance(1)
    return total / held_out.tokens


def curve(
    figures: np.ndarray, sizes: Sequence[int], ways: Sequence[int], costs: Callable[[int, int], float]
) -> list[TrimRow]:
    """A row for every size and number of context rows, with as many drafts a round as give the largest MBSU.

    `figures` are those of `judged`, or a mean of several corpora's.
    """
    made = []
    coverage, acceptance, calls = figures[0], figures[1], figures[2:]
    for (way, rows), (i, size) in itertools.product(enumerate(ways), enumerate(sizes)):
        c, gained = costs(size, rows), 1 / calls[:, way, i]
        options = [
            TrimRow(
                size, rows, float(coverage[way, i]), float(acceptance[way, i]), float(be), g, c,
                float(be) / (1 + c * g),
            )
            for g, be in enumerate(gained, 1)
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

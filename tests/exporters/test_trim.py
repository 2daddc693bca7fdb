"""Which rows a head keeps and what sizes give, against brute force: counted by hand, rounds played."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgespec.errors import InputError
from edgespec.exporters.samples import Sample
from edgespec.exporters.trim import (
    Corpus,
    accepted,
    chosen,
    context,
    covered,
    curve,
    judged,
    latest,
    likelihood,
    ranked,
    scores,
    sizes_of,
    verify_calls,
)

VOCAB, TOP = 30, 5


def sample(seed: int, temperature: float = 0.0, prompt: int = 6, written: int = 14) -> Sample:
    """A text whose tokens are, mostly, among the likeliest ones of a random target."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(written, VOCAB)) * 2
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    top = np.argsort(-logp, axis=1)[:, :TOP]
    picked = top[:, 0] if temperature == 0 else draw.integers(0, VOCAB, written)
    tokens = np.concatenate([draw.integers(0, VOCAB, prompt), picked]).astype(np.int32)
    top_logp = np.take_along_axis(logp, top, 1).astype(np.float16)
    return Sample(tokens, prompt, top.astype(np.int32), top_logp, temperature, "x")


def corpus(name: str, weight: float, seeds: range, temperature: float = 0.0) -> Corpus:
    return Corpus(name, weight, tuple(sample(s, temperature, written=8 + s % 5) for s in seeds))


def draft_logits(s: Sample) -> np.ndarray:
    draw = np.random.default_rng(int(s.tokens.sum()))
    made = draw.normal(size=(len(s.tokens) - s.prompt, VOCAB)).astype(np.float32)
    made[np.arange(len(made)), s.tokens[s.prompt :]] += 2.5
    return made


def test_scores_by_hand() -> None:
    one = Sample(
        np.array([9, 1, 2], np.int32), 1, np.array([[1, 3], [4, 2]], np.int32),
        np.log(np.array([[0.5, 0.25], [0.75, 0.125]])).astype(np.float16), 0.0, "a",
    )  # fmt: skip
    two = Sample(np.array([0, 3], np.int32), 1, np.array([[3, 0]], np.int32),
                 np.log(np.array([[1.0, 1e-4]])).astype(np.float16), 0.0, "b")  # fmt: skip
    first, second = Corpus("a", 1, (one,)), Corpus("b", 3, (two,))
    a = np.zeros(10)
    a[[1, 2, 3, 4]] = [(1 + 0.5) / 4, (1 + 0.125) / 4, 0.25 / 4, 0.75 / 4]
    b = np.zeros(10)
    b[[3, 0]] = [1.0, 0.5e-4]
    np.testing.assert_allclose(scores([first], 10), a, atol=1e-3)
    np.testing.assert_allclose(scores([first, second], 10), (a + 3 * b) / 4, atol=1e-3)
    # A corpus counts by its weight, not by its length.
    np.testing.assert_allclose(scores([Corpus("a", 1, (one,) * 7), second], 10), (a + 3 * b) / 4, atol=1e-3)


def test_what_must_be_kept_comes_first_and_ties_go_to_low_ids() -> None:
    score = np.array([0, 5, 1, 5, 0, 2, 0.0])
    order = ranked(score, {6, 2})
    assert order.tolist() == [2, 6, 1, 3, 5, 0, 4]
    assert chosen(order, score, 4) == (1, 3, 2, 6)  # most frequent first
    assert sorted(chosen(order, score, 7)) == list(range(7))


def lent(tokens: list[int], own: set[int], rows: int) -> set[int]:
    """The last `rows` different tokens outside `own`, by definition."""
    found: list[int] = []
    for token in reversed(tokens):
        if token not in own and token not in found and len(found) < rows:
            found.append(token)
    return set(found)


WAYS = (0, 1, 4, 40)


def test_coverage_against_the_definition() -> None:
    order, sizes = np.random.default_rng(1).permutation(VOCAB), (3, 11, VOCAB)
    rank = np.argsort(order)
    for seed in range(8):
        s = sample(seed, 1.0, prompt=1 + seed)
        inside, before = covered(s, rank, sizes, WAYS), latest(s)
        held = context(before, rank, sizes, WAYS)
        for (way, rows), (i, size) in itertools.product(enumerate(WAYS), enumerate(sizes)):
            own = set(order[:size].tolist())
            for place in range(len(before)):
                want = lent(s.tokens[: s.prompt + place].tolist(), own, rows)
                assert set(before[place, held[way, i, place]].tolist()) == want
                assert inside[way, i, place] == (int(s.tokens[s.prompt + place]) in own | want)


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.7, 1.0])
def test_acceptance_against_the_law_over_the_union(temperature: float) -> None:
    order = np.random.default_rng(2).permutation(VOCAB)
    sizes, ways = (4, 12, VOCAB), (0, 3)
    hits = 0.0
    for seed in range(6):
        s = sample(seed, temperature)
        logits = draft_logits(s).astype(np.float64)
        logits[0, 0] += 9e2 * (seed == 0)  # so far that a softmax's sum overflows
        got = accepted(s, order, sizes, ways, logits.astype(np.float32))
        p = likelihood(s)
        for (way, rows), (i, size) in itertools.product(enumerate(ways), enumerate(sizes)):
            own = set(order[:size].tolist())
            for place in range(len(p)):
                x = int(s.tokens[s.prompt + place])
                union = sorted(own | lent(s.tokens[: s.prompt + place].tolist(), own, rows))
                if temperature == 0:
                    want = float(union[int(logits[place, union].argmax())] == x)
                else:
                    q = np.exp((logits[place, union] - logits[place, union].max()) / temperature)
                    want = min(1.0, dict(zip(union, q / q.sum(), strict=True)).get(x, 0.0) / p[place])
                assert got[way, i, place] == pytest.approx(want, abs=1e-9)
                hits += want
    assert hits > 40


def test_the_target_s_likelihood_of_what_it_wrote() -> None:
    top = np.log(np.array([[0.5, 0.3], [0.6, 0.1]])).astype(np.float16)
    ids = np.array([[7, 8], [1, 2]], np.int32)
    for temperature, want in ((1.0, [0.3, 0.1]), (0.5, [0.09 / 0.34, 0.01 / 0.37])):
        s = Sample(np.array([0, 8, 5], np.int32), 1, ids, top, temperature, "x")  # 5 is beyond the top: as 2
        np.testing.assert_allclose(likelihood(s), want, rtol=2e-3)


def played(hits: list[bool], drafts: int) -> int:
    """Verify calls of speculative decoding, round by round."""
    place = calls = 0
    while place < len(hits):
        run = 0
        while run < drafts and place + run < len(hits) and hits[place + run]:
            run += 1
        place, calls = place + run + 1, calls + 1
    return calls


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_verify_calls_against_every_pattern_of_acceptances(drafts: int) -> None:
    draw = np.random.default_rng(3)
    for places in range(1, 9):
        chance = draw.random((2, places))
        want = np.zeros(2)
        for hits in itertools.product([False, True], repeat=places):
            likely = np.prod(np.where(hits, chance, 1 - chance), axis=1)
            want += likely * played(list(hits), drafts)
        np.testing.assert_allclose(verify_calls(chance, drafts), want, rtol=1e-12)
    assert verify_calls(np.ones((1, 12)), 3).tolist() == [3.0]
    assert verify_calls(np.zeros((1, 12)), 3).tolist() == [12.0]


def test_the_curve_is_the_texts_played_by_hand() -> None:
    corpora = [corpus("a", 2, range(4)), corpus("b", 1, range(20, 26))]
    order = ranked(scores(corpora, VOCAB), {0, 1})
    sizes, ways, steps = (5, 10, VOCAB), (0, 4), []
    cost = lambda size, rows: 0.01 * size + 0.002 * rows  # noqa: E731
    figures = [judged(c, order, sizes, ways, draft_logits, steps.append) for c in corpora]
    made = curve((2 * figures[0] + figures[1]) / 3, sizes, ways, cost)
    assert len(steps) == 10
    for row, (way, i) in zip(made, itertools.product(range(2), range(3)), strict=True):
        best: tuple[float, int] = (0.0, 0)
        for drafts in range(1, 8):
            share = 0.0
            for c in corpora:
                hits = [accepted(s, order, sizes, ways, draft_logits(s))[way, i] for s in c.samples]
                calls = sum(played(h.astype(bool).tolist(), drafts) for h in hits)
                share += c.weight / 3 * calls / c.tokens
            best = max(best, (1 / share / (1 + drafts * row.c), -drafts))
        assert (row.size, row.context_rows) == (sizes[i], ways[way])
        assert row.c == cost(sizes[i], ways[way])
        assert row.mbsu == pytest.approx(best[0]) and row.gamma == -best[1]
        assert row.mbsu == pytest.approx(row.block_efficiency / (1 + row.c * row.gamma))
    for few, more, whole in (made[:3], made[3:]):
        assert whole.coverage == pytest.approx(1) and few.coverage < more.coverage < 1


def test_without_a_draft_coverage_stands_for_acceptance() -> None:
    corpora = [corpus("a", 1, range(5), 1.0)]
    order = ranked(scores(corpora, VOCAB), set())
    figures = judged(corpora[0], order, (6, 20), (0, 2), None, lambda n: None)
    for row in curve(figures, (6, 20), (0, 2), lambda size, rows: 0.1):
        assert row.acceptance == row.coverage


def test_every_fifth_answer_is_held_out() -> None:
    whole = corpus("a", 1, range(11))
    counted, held = whole.split()
    assert held.samples == (whole.samples[4], whole.samples[9]) and len(counted.samples) == 9
    with pytest.raises(InputError, match="a has 4 answers; 5 are needed"):
        corpus("a", 1, range(4)).split()


def test_sizes() -> None:
    assert sizes_of(300, 5000, None) == [300, 512, 768, 1024, 1536, 2048, 3072, 4096, 5000]
    assert 700 in sizes_of(300, 5000, 700)
    for wanted in (299, 5001):
        with pytest.raises(InputError, match=rf"size {wanted} is not 300 \(the tokens .* kept\) to 5000"):
            sizes_of(300, 5000, wanted)


def test_a_longer_corpus_does_not_lead() -> None:
    """Weights: the rarer language is ranked by its share, not by its length."""
    long = Corpus("en", 1, tuple(sample(s) for s in range(40)))
    short = Corpus("ko", 1, tuple(sample(s) for s in range(100, 102)))
    both = scores([long, short], VOCAB)
    np.testing.assert_allclose(both, (scores([long], VOCAB) + scores([short], VOCAB)) / 2)

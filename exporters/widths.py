"""Do all widths give a row the same bits? What keeps speculation lossless (design, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgespec.spec import ABSORBING, STEPS, ModelEntry

TOKENS = 40


@dataclass(frozen=True)
class Disagreement:
    """A graph that left the reference: the first place, the largest |difference|, the mean KL in nats."""

    kind: str
    width: int
    position: int
    what: str
    difference: float
    kl: float


def disagreements(engine: Any, tokens: Sequence[int]) -> list[Disagreement]:
    """Run the same tokens through every step graph of every bucket; one entry for each that gives other bits.

    Compared are the logits of every row (of the last one in prefill), the caches at the end, and the queries
    that a policy reads.
    """
    cache, spec = engine.cache, engine.spec
    tokens = list(tokens)[: min(len(tokens), cache.buckets[0] + cache.block, TOKENS)]
    calls = sorted({(g.width, g.kind) for g in engine.entry.graphs if g.kind in STEPS})
    found: list[Disagreement] = []
    reference: dict[int, np.ndarray] = {}
    rows: list[np.ndarray] = []
    for bucket in cache.buckets:
        for width, kind in calls:
            logits, ends = run(engine, kind, width, tokens, bucket)
            engine.close()  # a large model's weights fit in memory once, not once a graph
            if not reference:
                reference, rows = logits, ends
                continue
            places = [p for p in logits if p in reference]
            different = [p for p in places if not np.array_equal(logits[p], reference[p])]
            if different:
                ours, theirs = (np.stack([rows_of[p] for p in places]) for rows_of in (logits, reference))
                largest, kl = float(np.abs(ours - theirs).max()), divergence(theirs, ours)
                found.append(Disagreement(kind, width, different[0], "logits", largest, kl))
                continue
            layers = [i for i, (a, b) in enumerate(zip(ends, rows, strict=True)) if not np.array_equal(a, b)]
            if layers:
                largest = max(float(np.abs(ends[i] - rows[i]).max()) for i in layers)
                first = layers[0]
                where = f"cache of layer {first % spec.layers}" if first < 2 * spec.layers else "queries"
                found.append(Disagreement(kind, width, len(tokens), where, largest, 0.0))
    return found


def divergence(logits: np.ndarray, other: np.ndarray) -> float:
    """Mean KL in nats of the second rows' distributions from the first's."""
    p, q = (x - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (logits, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def run(
    engine: Any, kind: str, width: int, tokens: list[int], bucket: int
) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
    """Logits by position, filled rows and queries, after absorbing the tokens in calls of one graph."""
    engine.reset(bucket)
    logits: dict[int, np.ndarray] = {}
    queries: list[np.ndarray] = []
    done = 0
    while done < len(tokens):
        rows = min(width, len(tokens) - done, engine.free)
        made = engine.call(kind, tokens[done : done + rows], width)
        out = made["logits"][0]
        for i, row in enumerate(out[:rows]) if kind not in ABSORBING else [(rows - 1, out[0])]:
            logits[done + i] = row.copy()
        if "new_queries" in made:
            queries.append(made["new_queries"][:rows].copy())
        engine.accept(rows)
        done += rows
    ends = [
        buffer[0, :, : engine.count].copy() for part in ("keys", "values") for buffer in engine.caches[part]
    ]
    return logits, ends + ([np.concatenate(queries)] if queries else [])


def sample_tokens(vocab: int) -> list[int]:
    """Token ids spread over a vocabulary: the width test needs variety, not sense."""
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab, TOKENS)]


def marked(entry: ModelEntry, engine: Any) -> ModelEntry:
    """The entry, saying whether its widths agree on this machine."""
    return replace(entry, widths_agree=not disagreements(engine, sample_tokens(entry.spec.vocab)))

"""The exported graphs beside their source: perplexity, KL, argmax agreement, the largest |Δlogit|."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgespec.exporters.commit import keep, ranked
from edgespec.exporters.step import Step, prepare, ready
from edgespec.spec import CacheSpec, ModelEntry

WINDOW = 1024
MOST_TOKENS = 4096
ROUNDING = 1e-5  # between a score in a graph and the same on PyTorch tensors


@dataclass(frozen=True)
class Figures:
    """What a comparison over a text gave; logarithms are natural."""

    perplexity: float
    perplexity_source: float
    kl: float
    agreement: float
    difference: float
    tokens: int


def compare(
    entry: ModelEntry, engine: Any, model: Any, tokens: Sequence[int], ids: np.ndarray | None, advance: Any
) -> Figures:
    """Both models over windows of the text, nothing evicted. `ids` are the tokens of a trimmed head's rows.

    With a trimmed head both distributions are over its rows, and next tokens outside them are passed over.
    """
    size = min(WINDOW, entry.cache.slots, len(tokens))
    windows = [tokens[i : i + size] for i in range(0, min(len(tokens), MOST_TOKENS) - size + 1, size)]
    rows = row_of(entry.spec.vocab, ids)
    loss = np.zeros(2)
    kl = agree = difference = 0.0
    count = scored = 0
    for done, window in enumerate(windows):
        with torch.no_grad():
            want = model(torch.tensor([list(window)])).logits[0].float()
        want = want if ids is None else want[:, torch.from_numpy(ids.astype(np.int64))]
        engine.reset()
        for start, logits in calls(engine, window):
            ours, theirs = torch.from_numpy(logits), want[start : start + len(logits)]
            log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            kl += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            difference = max(difference, float((ours - theirs).abs().max()))
            count += len(logits)
            following = rows[list(window[start + 1 : start + 1 + len(logits)])]
            here = torch.arange(len(following))[following >= 0]
            following = following[following >= 0]
            loss -= [float(log[here, following].sum()) for log in (log_ours, log_theirs)]
            scored += len(here)
            advance(done * size + start, len(windows) * size)
    perplexity, perplexity_source = (float(x) for x in np.exp(loss / max(scored, 1)))
    return Figures(perplexity, perplexity_source, kl / count, agree / count, difference, count)


def row_of(vocab: int, ids: np.ndarray | None) -> Tensor:
    """The head row of every token id, -1 where a trimmed head has none."""
    if ids is None:
        return torch.arange(vocab)
    rows = torch.full((vocab,), -1)
    rows[torch.from_numpy(ids.astype(np.int64))] = torch.arange(len(ids))
    return rows


def calls(engine: Any, tokens: Sequence[int]) -> Any:
    """Absorb tokens through the widest graph that gives every row's logits.

    Yields (first position, logits [rows,V]).
    """
    kind = "verify" if engine.widths("verify") else "draft"
    width, done = engine.widths(kind)[-1], 0
    while done < len(tokens):
        rows = min(width, len(tokens) - done, engine.free)
        logits = engine.call(kind, tokens[done : done + rows], width)["logits"][0, :rows].copy()
        engine.accept(rows)
        yield done, logits
        done += rows


def compare_evicting(
    entry: ModelEntry, engine: Any, model: Any, tokens: Sequence[int], ids: np.ndarray | None
) -> tuple[float, int]:
    """The largest |Δlogit| over a text that evicts (at most twice), against the same rule on PyTorch tensors.

    The reference keeps exactly M rows a layer, one token a call, and shares only the commit's scores with
    the graphs.
    """
    spec, cache = entry.spec, entry.cache
    tokens = list(tokens)[: min(len(tokens), cache.slots + cache.block + 8)]
    step = Step(prepare(model), spec.layers)
    caches = [torch.zeros(1, spec.kv_heads, cache.slots, spec.head_dim) for _ in range(2 * spec.layers)]
    count = evictions = 0
    want: list[Tensor] = []
    with ready(model, spec):
        for position, token in enumerate(tokens):
            one = lambda n: torch.tensor([n])  # noqa: E731
            logits, keys, values = step(one(token)[None], one(position)[None], one(0), one(count), caches)
            want.append(logits[0, 0] if ids is None else logits[0, 0, torch.from_numpy(ids.astype(np.int64))])
            for buffer, row in zip(caches, [*keys, *values], strict=True):
                buffer[:, :, count] = row[:, :, 0]
            count += 1
            if count == cache.slots:
                commit(entry, caches)
                count, evictions = cache.budget, evictions + 1
    engine.reset()
    difference = 0.0
    for start, logits in calls(engine, tokens):
        theirs = torch.stack(want[start : start + len(logits)])
        difference = max(difference, float((torch.from_numpy(logits) - theirs).abs().max()))
    return difference, evictions


def misplaced(keys: np.ndarray, kept: np.ndarray, cache: CacheSpec) -> int:
    """Rows of `kept` [KV,N] that the policy would not keep of keys [KV,M,d]; all, where they do not ascend.

    A row counts as well chosen where its score is within rounding of the last one kept.
    """
    scores = ranked(torch.from_numpy(keys), cache)
    if not (np.diff(kept) > 0).all() or kept.min() < 0 or kept.max() >= keys.shape[1]:
        return int(kept.size)
    last = scores.topk(cache.budget, -1).values[:, -1:]
    return int((scores.gather(1, torch.from_numpy(kept.astype(np.int64))) < last - ROUNDING).sum())


def commit(entry: ModelEntry, caches: list[Tensor]) -> None:
    """Evict in place: every layer keeps N rows; a sliding-window layer the newest."""
    cache, layers = entry.cache, entry.spec.layers
    for layer, window in enumerate(entry.spec.windows):
        keys, values = caches[layer], caches[layers + layer]
        newest = torch.arange(cache.block, cache.slots).expand(entry.spec.kv_heads, -1)
        kept = newest if window else keep(keys[0], cache).long()
        index = kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        for buffer in (keys, values):
            buffer[0, :, : cache.budget] = buffer[0].gather(1, index)

"""The exported graphs beside their source: perplexity, KL, argmax agreement, the largest |Δlogit|."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgespec.exporters.attention import StepCache
from edgespec.exporters.commit import PROTECTED, Turn, keep, moved, observed, ranked, reads, survivors
from edgespec.exporters.lower_codes import STEPS8
from edgespec.exporters.recognise import AngleTable
from edgespec.exporters.scores import Layer, carrying
from edgespec.exporters.step import Step, prepare, ready
from edgespec.spec import ModelEntry

WINDOW = 1024
MOST_TOKENS = 4096
ROUNDING = 1e-5  # of the largest score, between a score in a graph and the same on PyTorch tensors


@dataclass(frozen=True)
class Figures:
    """What a comparison over a text gave; logarithms are natural. `largest`: |logit| of the source."""

    perplexity: float
    perplexity_source: float
    kl: float
    agreement: float
    difference: float
    largest: float
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
    kl = agree = difference = largest = 0.0
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
            largest = max(largest, float(theirs.abs().max()))
            count += len(logits)
            following = rows[list(window[start + 1 : start + 1 + len(logits)])]
            here = torch.arange(len(following))[following >= 0]
            following = following[following >= 0]
            loss -= [float(log[here, following].sum()) for log in (log_ours, log_theirs)]
            scored += len(here)
            advance(done * size + start, len(windows) * size)
    perplexity, perplexity_source = (float(x) for x in np.exp(loss / max(scored, 1)))
    return Figures(perplexity, perplexity_source, kl / count, agree / count, difference, largest, count)


def context_tokens(tokens: Sequence[int], ids: np.ndarray, rows: int) -> np.ndarray:
    """Tokens that a head of these ids lacks, for all its context rows: a text's first ones, then low ids."""
    own = set(ids.tolist())
    lacked = dict.fromkeys(t for t in (*tokens, *range(len(own) + rows)) if t not in own)
    return np.array(list(lacked)[:rows], np.int32)


def context_likeness(engine: Any, model: Any) -> float:
    """The least cosine between a filled context row and the model's head row of its token."""
    names = engine.context["context_ids"]
    ours = torch.from_numpy(engine.context["context"].T[names >= 0])
    theirs = model.get_output_embeddings().weight.detach()[torch.from_numpy(names[names >= 0]).long()]
    return float(torch.cosine_similarity(ours, theirs, -1).min())


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
) -> tuple[float, float, int]:
    """The largest |Δlogit| over a text that evicts (at most twice), against the same rule on PyTorch tensors;
    the largest |logit| of these, and how often they evict.

    The reference keeps exactly M rows a layer, one token a call, and shares only the commit's scores with
    the graphs.
    """
    spec, cache = entry.spec, entry.cache
    tokens = list(tokens)[: min(len(tokens), cache.slots + cache.block + 8)]
    step = Step(prepare(model), spec.layers)
    state = Reference(entry, turn_of(model, cache.block) if cache.positions == "compact" else None)
    want: list[Tensor] = []
    with ready(model, spec):
        for position, token in enumerate(tokens):
            one = lambda n: torch.tensor([n])  # noqa: E731
            place = one(state.count if cache.positions == "compact" else position)[None]
            row = one(0)
            logits, made = step.run(one(token)[None], place, row, one(state.count), state.caches)
            want.append(logits[0, 0] if ids is None else logits[0, 0, torch.from_numpy(ids.astype(np.int64))])
            state.take(made)
    engine.reset()
    difference = 0.0
    for start, logits in calls(engine, tokens):
        theirs = torch.stack(want[start : start + len(logits)])
        difference = max(difference, float((torch.from_numpy(logits) - theirs).abs().max()))
    return difference, float(torch.stack(want).abs().max()), state.evictions


def turn_of(model: Any, block: int) -> Turn:
    """The angles of a prepared model whose layers all turn alike."""
    (table,) = (module for module in model.modules() if isinstance(module, AngleTable))
    return Turn.of(table.values["cos"], table.values["sin"], block, table.interleaved)


class Reference:
    """Caches of exactly M rows a layer as plain tensors, and what the policy reads beside them."""

    def __init__(self, entry: ModelEntry, turn: Turn | None) -> None:
        self.spec, self.cache, self.turn = entry.spec, entry.cache, turn
        shape = (1, self.spec.kv_heads, self.cache.slots, self.spec.head_dim)
        self.caches = [torch.zeros(shape) for _ in range(2 * self.spec.layers)]
        self.queries: list[list[Tensor]] = [[] for _ in range(self.spec.layers)]
        self.carried = torch.zeros(self.spec.layers, self.spec.heads, self.cache.slots)
        self.count = self.evictions = 0

    def take(self, made: StepCache) -> None:
        """Append the one row that a step computed in every layer; observe and evict at the block's end."""
        for layer in range(self.spec.layers):
            self.caches[layer][:, :, self.count] = made.new_keys[layer][:, :, 0]
            self.caches[self.spec.layers + layer][:, :, self.count] = made.new_values[layer][:, :, 0]
            self.queries[layer].append(made.queries[layer][0, :, 0] * made.scales[layer])
        self.count += 1
        full = self.count == self.cache.slots
        if full or (carrying(self.cache.policy) and self.count % self.cache.block == 0):
            for layer, window in enumerate(self.spec.windows):
                self._settle(layer, window, full)
            if full:
                self.count, self.evictions = self.cache.budget, self.evictions + 1

    def _settle(self, layer: int, window: int, full: bool) -> None:
        """One layer at a block's end: what it carries, and its N rows; under a sliding window the newest."""
        cache = self.cache
        keys, values = self.caches[layer], self.caches[self.spec.layers + layer]
        kept = torch.arange(cache.block, cache.slots).expand(self.spec.kv_heads, -1)
        if not window:
            queries = torch.stack(self.queries[layer][-max(cache.queries, 1) :])
            end = torch.tensor([self.count])
            seen = Layer(keys[0], end, values[0], queries, self.carried[layer], self.spec.softcap)
            seen = observed(seen, cache)
            assert seen.carried is not None
            self.carried[layer] = seen.carried
            if full:
                kept = keep(seen, cache).long()
                self.carried[layer] = survivors(seen.carried, kept, cache)
        if full:
            for buffer, turn in ((keys, self.turn), (values, None)):
                buffer[0, :, : cache.budget] = moved(buffer[0], kept, turn)


def seen(rows: np.ndarray) -> Tensor:
    """A layer's tensor as a policy sees it: codes stand for code/127 of the largest."""
    made = torch.from_numpy(rows)
    return made.float() / STEPS8 if rows.dtype == np.int8 else made


def misplaced(given: dict[str, np.ndarray], kept: np.ndarray, entry: ModelEntry) -> int:
    """Rows of `kept` [KV,N] that the policy would not keep of a layer's tensors (Engine.commits); all, where
    they do not ascend.

    A row counts as well chosen where its score is within rounding of the last one kept.
    """
    cache, parts = entry.cache, reads(entry.cache)
    given_parts = {name: seen(array) for name, array in given.items() if name in parts}
    layer = Layer(**given_parts, end=cache.slots, softcap=entry.spec.softcap)
    scores = ranked(observed(layer, cache), cache)
    if not (np.diff(kept) > 0).all() or kept.min() < 0 or kept.max() >= cache.slots:
        return int(kept.size)
    last = scores.topk(cache.budget, -1).values[:, -1:]
    rounding = ROUNDING * scores.masked_fill(scores >= PROTECTED, 0).abs().amax()
    return int((scores.gather(1, torch.from_numpy(kept.astype(np.int64))) < last - rounding).sum())

"""Absorbing the same tokens in different calls: one at a time, and as chunks, wide calls and rejected drafts.

The loop of speculative decoding at its most hostile: drafted rows are right or wrong as a list of moves says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from edgespec.runtime.engine import Engine
from edgespec.spec import STEPS
from tests.helpers.oracle import keydiff_scores, survivors


@dataclass(frozen=True)
class Move:
    """One call: which of the engine's step graphs, how many rows it should have, how many are right."""

    graph: int
    rows: int
    right: int
    seed: int


MOVES = st.lists(
    st.builds(
        Move,
        graph=st.integers(0, 9),
        rows=st.integers(1, 16),
        right=st.integers(0, 8),
        seed=st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=12,
)


@dataclass
class End:
    """What a run leaves behind: the text, the filled rows of every layer, how many, and the position.

    `margin` is the narrowest gap by which a token won or a row was kept: where it is near the rounding of
    fp32, two correct runs may differ.
    """

    text: list[int]
    rows: list[np.ndarray]
    count: int
    position: int
    margin: float


def end(engine: Engine, text: list[int], margin: float = float("inf")) -> End:
    """The engine's state after a run."""
    buffers = [*engine.caches["keys"], *engine.caches["values"]]
    rows = [buffer[0, :, : engine.count].copy() for buffer in buffers]
    return End(text, rows, engine.count, engine.position, margin)


def kinds(engine: Engine) -> list[tuple[str, int]]:
    """The engine's step graphs, narrowest first."""
    return sorted({(g.kind, g.width) for g in engine.entry.graphs if g.kind in STEPS}, key=lambda g: g[1])


def gap(logits: np.ndarray) -> float:
    """By how much the best token leads."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def one_by_one(engine: Engine, prompt: Sequence[int], length: int) -> End:
    """Plain decoding: every call absorbs one token through the narrowest graph."""
    kind, width = kinds(engine)[0]
    engine.reset()
    queue, text, margin = list(prompt), [], float("inf")
    while engine.position < len(prompt) + length:
        token = queue.pop(0)
        out = engine.call(kind, [token], width)
        logits, best = out["logits"][0, 0].copy(), int(out["argmax"][0, 0])
        if engine.free == 1 and engine.cache.policy == "keydiff":
            margin = min(margin, after_commit(engine, token))
        engine.accept(1)
        if not queue:
            text.append(best)
            queue.append(best)
            margin = min(margin, gap(logits))
    return end(engine, text, margin)


def after_commit(engine: Engine, token: int) -> float:
    """The narrowest margin of the commit that the pending row brings about."""
    cache, narrowest = engine.cache, float("inf")
    for layer, window in enumerate(engine.spec.windows):
        if window:
            continue
        keys = engine.caches["keys"][layer][0, :, : cache.slots].copy()
        if cache.contract == "rows":
            keys[:, engine.count] = engine.pending["new_keys"][layer][:, 0]
        for scores in keydiff_scores(_tensor(keys)).tolist():
            narrowest = min(narrowest, survivors(scores, cache.budget, cache.sinks, cache.recent)[1])
    return narrowest


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def by_moves(engine: Engine, prompt: Sequence[int], truth: Sequence[int], moves: Sequence[Move]) -> End:
    """The prompt in chunks and then speculation, each call as the next move says, as far as plain decoding.

    Drafted tokens are `right` of the truth and then random ones; a row is accepted while the graph's own
    argmax is the drafted token, as in greedy speculative decoding. Prompt calls carry wrong rows too, and
    never accept them.
    """
    engine.reset()
    graphs, done, turn, text = kinds(engine), 0, 0, []
    stop = len(prompt) + len(truth)
    last = -1
    while engine.position < stop:
        move, turn = moves[turn % len(moves)], turn + 1
        noise = np.random.default_rng(move.seed).integers(0, engine.spec.vocab, 16).tolist()
        in_prompt = done < len(prompt)
        choice = graphs if in_prompt else [g for g in graphs if g[0] != "prefill"]
        kind, width = choice[move.graph % len(choice)]
        rows = min(width, move.rows, engine.free)
        if in_prompt:
            valid = min(rows, len(prompt) - done)
            tokens = [*prompt[done : done + valid], *noise][: rows if kind != "prefill" else valid]
            best = engine.call(kind, tokens, width)["argmax"][0]
            engine.accept(valid)
            done += valid
            if done == len(prompt):
                last = int(best[0 if kind == "prefill" else valid - 1])
                text.append(last)
            continue
        drafted = [*truth[len(text) : len(text) + move.right], *noise][: rows - 1]
        best = engine.call(kind, [last, *drafted], width)["argmax"][0].tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == best[accepted]:
            accepted += 1
        emitted = [*drafted[:accepted], best[accepted]][: stop - engine.position]
        engine.accept(len(emitted))
        text += emitted
        last = text[-1]
    return end(engine, text)


def absorbed_as_wanted(
    engine: Engine,
    want: np.ndarray,
    tokens: Sequence[int],
    calls: Sequence[tuple[str, int, int]],
    close: float,
) -> None:
    """Absorb tokens by calls (kind, width, valid rows): each row's logits are the wanted ones, [n,V]."""
    done = 0
    engine.reset()
    for kind, width, rows in calls:
        here = want[done : done + rows]
        out = engine.call(kind, tokens[done : done + rows], width)
        logits, best = (out[name][0][:rows] for name in ("logits", "argmax"))
        here = here[-1:] if kind == "prefill" else here
        assert logits.shape == here.shape
        np.testing.assert_allclose(logits, here, rtol=0, atol=close, err_msg=f"{kind} at {done}")
        assert best.tolist() == logits.argmax(-1).tolist()
        engine.accept(rows)
        done += rows
    assert done == engine.count == engine.position

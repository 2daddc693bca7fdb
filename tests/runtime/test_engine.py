"""The engine's rules: it evicts as a plain PyTorch cache does, re-lays to grow, refuses what it must."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.policy import NAMES, queries
from edgespec.runtime.engine import Engine
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.oracle import EvictingModel, layer_windows

BUDGET, BLOCK, SINKS, RECENT, WINDOW = 24, 8, 2, 4, 3
TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, 288, 150)]
# kind, width, rows absorbed; a call is clamped to the free rows
CALLS = [
    ("prefill", 8, 8),
    ("verify", 4, 3),
    ("decode", 1, 1),
    ("verify", 2, 2),
    ("prefill", 8, 5),
    ("verify", 4, 4),
]
CONTRACTS, BY_ROWS = ("append", "rows"), ("keydiff", "sinks")
EVICTIONS = [
    (f, c, p) for f in ("llama", "gemma3", "mistral") for c in CONTRACTS for p in ("keydiff", "sinks")
]
# Packed projections, and what is not: a norm on queries, a capped score, layers without rotary angles.
EVICTIONS += [("llama", "append", p) for p in NAMES if queries(p, BLOCK, WINDOW)]
EVICTIONS += [("llama", "rows", "h2o"), ("gemma3", "rows", "caote(tova)"), ("gemma2", "append", "snapkv")]
EVICTIONS += [("gemma2", "rows", "lru"), ("qwen3", "append", "caote(h2o)"), ("smollm3", "append", "h2o")]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("sources")
    names = ("llama", "gemma2", "gemma3", "mistral", "qwen2", "qwen3", "smollm3")
    return {name: tiny.checkpoint(folder / name, tiny.model(name)) for name in names}


def cache(contract: str, policy: str = "keydiff", budget: int = BUDGET, **more: Any) -> CacheSpec:
    sizes = {"buckets": (budget,), **more}
    seen = queries(policy, BLOCK, WINDOW)
    return CacheSpec(contract, budget, BLOCK, policy, SINKS, RECENT, sizes["buckets"], BLOCK, seen)


def absorb(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Logits [n,V] of the rows that every call gave (of the last one in prefill; NaN for the others)."""
    done, out, turn = 0, np.full((len(tokens), engine.entry.head_rows), np.nan, np.float32), 0
    while done < len(tokens):
        kind, width, rows = CALLS[turn % len(CALLS)]
        rows = min(rows, len(tokens) - done, engine.free)
        logits = engine.call(kind, tokens[done : done + rows], width)["logits"][0]
        if kind == "prefill":
            out[done + rows - 1] = logits[0]
        else:
            out[done : done + rows] = logits[:rows]
        engine.accept(rows)
        done, turn = done + rows, turn + 1
    return out


def filled(engine: Engine) -> list[np.ndarray]:
    """Copies of the filled rows, keys of every layer and then values, [KV,n,d] each."""
    buffers = [*engine.caches["keys"], *engine.caches["values"]]
    return [buffer[0, :, : engine.count].copy() for buffer in buffers]


def recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """What every commit of every full-attention layer kept, as the engine goes."""
    choices, run = [], engine._run_policy

    def note(kind: str, layer: int) -> dict[str, np.ndarray]:
        made = run(kind, layer)
        if kind == "commit":
            choices.append(made["keep"].tolist())
        return made

    monkeypatch.setattr(engine, "_run_policy", note)
    return choices


@pytest.mark.parametrize(("family", "contract", "policy"), EVICTIONS)
def test_evicting_many_times_equals_the_plain_cache(
    sources: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, contract: str, policy: str,
) -> None:  # fmt: skip
    rounding = 1e-5 if policy in BY_ROWS else 1e-6  # shares of attention are small
    for seed in range(40):  # a margin below it would let another correct implementation keep another row
        tokens = [int(i) for i in np.random.default_rng(seed).integers(0, 288, 150)]
        oracle = EvictingModel(tiny.model(family), BUDGET, BLOCK, policy, SINKS, RECENT, WINDOW)
        want = oracle.feed(tokens, chunk=5).numpy()
        if oracle.narrowest > rounding:
            break
    assert oracle.narrowest > rounding
    assert oracle.commits == (len(tokens) - BUDGET) // BLOCK

    engine = tiny.export_tiny(sources[family], cache(contract, policy), tmp_path)
    choices = recorded(engine, monkeypatch)
    got = absorb(engine, tokens)
    given = ~np.isnan(got[:, 0])
    assert given.sum() > 80
    np.testing.assert_allclose(got[given], want[given], rtol=0, atol=1e-4)
    assert choices == oracle.choices
    assert (engine.count, engine.position) == (oracle.count, oracle.position)
    rows = [layer.keys for layer in oracle.layers] + [layer.values for layer in oracle.layers]
    for ours, theirs in zip(filled(engine), rows, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("contract", "policy"), [("append", "keydiff"), ("rows", "caote(h2o)")])
def test_compact_positions_equal_a_cache_whose_keys_are_turned_by_the_model(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str, policy: str, family: str
) -> None:
    """Every key back to no position at all and forth to its place, by the model's own angles."""
    for seed in range(40):
        tokens = [int(i) for i in np.random.default_rng(seed).integers(0, 288, 150)]
        oracle = EvictingModel(tiny.model(family), BUDGET, BLOCK, policy, SINKS, RECENT, WINDOW, compact=True)
        want = oracle.feed(tokens, chunk=5).numpy()
        if oracle.narrowest > 1e-5:
            break
    compact = dataclasses.replace(cache(contract, policy), positions="compact")
    engine = tiny.export_tiny(sources[family], compact, tmp_path)
    got = absorb(engine, tokens)
    given = ~np.isnan(got[:, 0])
    np.testing.assert_allclose(got[given], want[given], rtol=0, atol=2e-4)
    absolute = EvictingModel(tiny.model(family), BUDGET, BLOCK, policy, SINKS, RECENT, WINDOW)
    assert np.abs(absolute.feed(tokens, chunk=5).numpy() - want).max() > 0.01


def test_eviction_changes_the_logits_and_the_oracle_sees_it(sources: dict[str, Checkpoint]) -> None:
    """Without this the tests above could pass on a model to which the dropped rows mean nothing."""
    model = tiny.model("llama")
    whole = EvictingModel(model, 512, BLOCK, "none").feed(TOKENS, chunk=16)
    for policy in ("keydiff", "sinks"):
        less = EvictingModel(model, BUDGET, BLOCK, policy, SINKS, RECENT).feed(TOKENS, chunk=16)
        assert (whole - less)[: BUDGET + BLOCK].abs().max() < 1e-5
        assert (whole - less)[BUDGET + BLOCK :].abs().max() > 0.1


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize(
    ("family", "budget"), [("gemma3", BUDGET), ("mistral", 10)], ids=["mixed", "truncated"]
)
def test_sliding_layers_keep_the_newest_whatever_the_policy(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str, family: str, budget: int
) -> None:
    """A budget below the window (which the user allowed) shortens it to what the cache holds."""
    engine = tiny.export_tiny(sources[family], cache(contract, budget=budget), tmp_path)
    everything = tiny.export_tiny(sources[family], cache(contract, "none", 64), tmp_path / "whole")
    absorb(engine, TOKENS[: budget + BLOCK])
    absorb(everything, TOKENS[: budget + BLOCK])
    assert engine.count == budget
    windows = layer_windows(tiny.model(family).config)
    for part in ("keys", "values"):
        for layer, window in enumerate(windows):
            newest = everything.caches[part][layer][0, :, BLOCK : budget + BLOCK]
            same = np.allclose(engine.caches[part][layer][0, :, :budget], newest, atol=1e-5)
            assert same == bool(window)
    oracle = EvictingModel(tiny.model(family), budget, BLOCK, "keydiff", SINKS, RECENT)
    want = oracle.feed(TOKENS, chunk=3).numpy()
    engine.reset()
    got = absorb(engine, TOKENS)
    given = ~np.isnan(got[:, 0])
    np.testing.assert_allclose(got[given], want[given], rtol=0, atol=1e-4)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_buckets_change_no_bit_and_grow_only_when_they_must(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str
) -> None:
    whole = tiny.export_tiny(sources["llama"], cache(contract, budget=32), tmp_path / "one")
    parts = tiny.export_tiny(
        sources["llama"], cache(contract, budget=32, buckets=(8, 16, 32)), tmp_path / "three"
    )
    assert (whole.bucket, parts.bucket) == (32, 8)
    sizes = []
    for token in TOKENS[:70]:
        a, b = (engine.call("verify", [token], 2)["logits"][0, 0].copy() for engine in (whole, parts))
        if contract == "append":
            assert np.array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        for engine in (whole, parts):
            engine.accept(1)
        sizes.append(parts.bucket)
        assert parts.caches["keys"][0].shape[2] == parts.cache.rows(parts.bucket)
    for a, b in zip(filled(whole), filled(parts), strict=True):
        if contract == "append":
            assert np.array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert [sizes.index(bucket) for bucket in (8, 16, 32)] == [0, 16, 24]
    assert sizes == sorted(sizes)
    parts.reset()
    assert (parts.bucket, parts.count, parts.position) == (8, 0, 0)
    assert parts.caches["keys"][0].shape[2] == parts.cache.rows(8)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_rejected_row_leaves_no_trace(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str
) -> None:
    engine = tiny.export_tiny(sources["llama"], cache(contract), tmp_path)

    def run(wrong: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
        engine.reset()
        engine.prefill(TOKENS[:10])
        engine.call("verify", [TOKENS[10], *wrong], 4)
        engine.accept(1)
        logits = engine.call("verify", TOKENS[11:13], 4)["logits"][0, :2].copy()
        engine.accept(2)
        return filled(engine), logits

    plain, drafted = run([]), run([7, 8, 9])
    assert np.array_equal(plain[1], drafted[1])
    assert all(np.array_equal(a, b) for a, b in zip(plain[0], drafted[0], strict=True))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_snapshot_is_gone_back_to_after_an_eviction(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str
) -> None:
    """And an engine over the same graphs with another cache leaves it alone."""
    engine = tiny.export_tiny(sources["llama"], cache(contract), tmp_path)
    engine.prefill(TOKENS[: BUDGET + BLOCK - 2])
    before, snapshot = filled(engine), engine.snapshot()
    first = engine.prefill(TOKENS[50:60])
    assert engine.count != engine.position
    other = engine.over(dataclasses.replace(engine.entry, cache=cache(contract, "none")))
    other.prefill(TOKENS[:20])
    assert (other.count, other.sessions is engine.sessions) == (20, True)
    for _ in range(2):
        engine.restore(snapshot)
        assert (engine.count, engine.position) == (BUDGET + BLOCK - 2, BUDGET + BLOCK - 2)
        assert all(map(np.array_equal, filled(engine), before))
        assert np.array_equal(engine.prefill(TOKENS[50:60]), first)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_cache_without_eviction_refuses_what_overflows(
    sources: dict[str, Checkpoint], tmp_path: Path, contract: str
) -> None:
    engine = tiny.export_tiny(sources["llama"], cache(contract, "none"), tmp_path)
    assert all(graph.kind != "commit" for graph in engine.entry.graphs)
    with pytest.raises(InputError, match="33 tokens are more than the 32 slots of a cache without eviction"):
        engine.prefill(TOKENS[:33])
    assert (engine.count, engine.position) == (0, 0)
    engine.prefill(TOKENS[:32])
    assert (engine.count, engine.free) == (32, 0)
    before = filled(engine)
    for attempt in (
        lambda: engine.step(5),
        lambda: engine.prefill([5]),
        lambda: engine.call("verify", [5, 6]),
    ):
        with pytest.raises(InputError):
            attempt()
    assert engine.count == 32 and all(map(np.array_equal, filled(engine), before))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_positions_end_where_the_model_was_trained_to(tmp_path: Path, contract: str) -> None:
    """Bug: the padding of a wide call looked up angles beyond the table, so that the last rows were lost."""
    config = tiny.family_config("llama", max_position_embeddings=46)
    model = tiny.trained_like(config)
    want = EvictingModel(model, BUDGET, BLOCK, "keydiff", SINKS, RECENT).feed([*TOKENS[:42], 1, 2, 3, 4])
    source = tiny.checkpoint(tmp_path / "source", model)
    engine = tiny.export_tiny(source, cache(contract), tmp_path / "graphs")
    with pytest.raises(InputError, match="47 tokens are more than the 46 positions"):
        engine.prefill(TOKENS[:47])
    assert engine.position == 0
    engine.prefill(TOKENS[:42])
    engine.call("verify", [1, 2, 3])
    engine.accept(3)
    with pytest.raises(InputError, match="position 47 is beyond the 46"):
        engine.call("verify", [1, 2])
    last = engine.call("verify", [4], 4)["logits"][0, 0]
    np.testing.assert_allclose(last, want[-1].numpy(), rtol=0, atol=1e-4)
    engine.accept(1)
    with pytest.raises(InputError, match="position 47 is beyond the 46"):
        engine.step(1)
    assert engine.position == 46


@pytest.mark.parametrize("contract", CONTRACTS)
def test_compact_positions_never_end(tmp_path: Path, contract: str) -> None:
    """Four times the positions that the model was trained on, every one of them within the cache."""
    model = tiny.trained_like(tiny.family_config("llama", max_position_embeddings=40))
    source = tiny.checkpoint(tmp_path / "source", model)
    compact = dataclasses.replace(cache(contract), positions="compact")
    engine = tiny.export_tiny(source, compact, tmp_path / "graphs")
    want = EvictingModel(model, BUDGET, BLOCK, "keydiff", SINKS, RECENT, compact=True).feed(TOKENS)
    engine.prefill(TOKENS[:-1])
    last = engine.call("decode", TOKENS[-1:])["logits"][0, 0]
    np.testing.assert_allclose(last, want[-1].numpy(), rtol=0, atol=1e-3)
    assert engine.position == 149 and engine._place == engine.count < 32


def test_calls_that_no_graph_can_take_are_refused(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    engine = tiny.export_tiny(sources["llama"], cache("append"), tmp_path)
    engine.prefill(TOKENS[:30])
    assert engine.free == 2
    for kind, tokens, width in (("verify", [1, 2, 3], 4), ("verify", [], 4), ("verify", [1, 2, 3], 2)):
        with pytest.raises(InputError, match="tokens in a call of width"):
            engine.call(kind, tokens, width)
    for kind, tokens, width in (("verify", [1] * 5, None), ("verify", [1], 3), ("draft", [1], None)):
        with pytest.raises(InputError, match=r"target has no (verify|draft) graph of width"):
            engine.call(kind, tokens, width)
    with pytest.raises(InputError, match="prompt is empty"):
        engine.prefill([])

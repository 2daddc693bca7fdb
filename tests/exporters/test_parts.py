"""A model in parts gives, bit for bit, what it gives whole: logits, new rows, queries and evicted caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.spans import spans_of
from edgespec.policy import queries
from edgespec.runtime.engine import Engine
from edgespec.spec import CODED, CacheSpec
from tests.helpers import tiny

TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 264, 70)]
CALLS = [("prefill", 8), ("verify", 4), ("decode", 1), ("verify", 3), ("prefill", 5), ("decode", 1)]
POLICIES = ("none", "keydiff", "h2o")
CASES = [(contract, "fp32", policy) for policy in POLICIES for contract in ("rows", "append")]
CASES += [("append", form, "keydiff") for form in ("int8", "int4", "fp16")]
CASES += [("rows", "w8a16", "h2o")]


def absorbed(engine: Engine) -> list[np.ndarray]:
    """Everything that calls of every kind give while the caches grow over buckets and evict."""
    engine.reset()
    found, done, i = [], 0, 0
    while done < len(TOKENS):
        kind, wanted = CALLS[i % len(CALLS)]
        rows, i = min(wanted, engine.free, len(TOKENS) - done), i + 1
        made = engine.call(kind, TOKENS[done : done + rows])
        found += [made[name].copy() for name in ("logits", "argmax", "new_queries") if name in made]
        engine.accept(rows)
        done += rows
    if engine.widths("embeds"):
        features = np.random.default_rng(1).standard_normal((3, engine.spec.hidden)).astype(np.float32)
        found.append(engine.call("embeds", [-1, 7, -3], features=features)["logits"].copy())
    return found + [b[:, :, : engine.count].copy() for part in engine.caches.values() for b in part]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.checkpoint(tmp_path_factory.mktemp("parts"), tiny.model("llama"))


@pytest.mark.parametrize(("contract", "form", "policy"), CASES, ids=map("-".join, CASES))
def test_parts_give_the_bits_of_the_whole(
    source: Checkpoint, contract: str, form: str, policy: str, tmp_path: Path
) -> None:
    """That of every family: test_step_graphs."""
    buckets = (96,) if policy == "none" else (16, 32)
    cache = CacheSpec(contract, buckets[-1], 8, policy, 1, 2, buckets, 8, queries(policy, 8, 3))
    spans = None
    if form in CODED:
        cache, texts = replace(cache, dtype="int8"), torch.tensor([TOKENS[:35], TOKENS[35:]])
        spans = spans_of(source, texts, lambda done, total: None)
    precision = dict.fromkeys(("linear", "head", "embedding"), form)
    whole, parts = (
        tiny.export_tiny(
            source,
            cache,
            tmp_path / str(len(counts)),
            precision=precision,
            counts=counts,
            spans=spans,
            reads_images=policy == "none",
        )
        for counts in ((2,), (1, 1))
    )
    assert whole.entry.parts == (2,) and parts.entry.parts == (1, 1)
    assert len([g for g in parts.entry.graphs if g.kind == "verify" and g.bucket == buckets[0]]) == 4
    for ours, theirs in zip(absorbed(parts), absorbed(whole), strict=True):
        assert np.array_equal(ours, theirs)
    assert (whole.count, whole.position) == (parts.count, parts.position)
    assert policy == "none" or whole.count < whole.position

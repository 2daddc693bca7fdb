"""Greedy speculative text is plain text under every policy, on SmolLM2 as it ships, past the budget.

One export serves all: a policy is its commit graphs and what the manifest says of the cache.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from edgespec.bundle import Bundle, creating, open_bundle
from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.commit import policy_graphs
from edgespec.policy import NAMES, queries
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from edgespec.spec import STEPS, ModelEntry
from tests.test_lossless_grid import ARTICLE, PROMPTS

BUDGET, BLOCK, WINDOW, TOKENS = 256, 64, 16, 12
KEPT = (*STEPS, "context")  # the graphs that know nothing of the policy
POLICIES = [name for name in NAMES if queries(name, BLOCK, WINDOW)]
# Long enough to evict twice before the answer.
TEXTS = (*PROMPTS[2:], f"Write the next paragraph.\n{ARTICLE}\n{ARTICLE[:600]}", PROMPTS[0])
DRAFTERS = (("ngram", "cost"), ("draft", "fixed"), ("both", "adaedl"), ("draft", "confidence"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = ExportConfig(
        "demo", str(tmp_path_factory.mktemp("demo") / "bundle"), draft="demo", weights="int8", budget=BUDGET,
        block=BLOCK, draft_budget=64, policy="h2o", draft_policy="h2o",
    )  # fmt: skip
    return export(config, Progress(quiet=True), Engine)


def with_policy(bundle: Bundle, policy: str, folder: Path) -> Bundle:
    """The same bundle with another policy in both models; its other files are the same ones."""

    def changed(entry: ModelEntry, into: Path) -> ModelEntry:
        cache = replace(entry.cache, policy=policy, queries=queries(policy, BLOCK, WINDOW))
        graphs = [g for g in entry.graphs if g.kind in KEPT]
        for model, graph in policy_graphs(entry.name, entry.spec, cache):
            ir.save(model, into / graph.file)
            graphs.append(graph)
        return replace(entry, cache=cache, graphs=tuple(graphs))

    with creating(folder) as staging:
        policies = {g.file for m in bundle.manifest.models for g in m.graphs if g.kind not in KEPT}
        for name in set(bundle.manifest.files) - policies:
            os.link(bundle.file(name), staging.path / name)
        models = tuple(changed(entry, staging.path) for entry in bundle.manifest.models)
        staging.finish(replace(bundle.manifest, models=models, files={}))
    return open_bundle(folder, verify=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_text_is_that_of_plain_decoding(whole: Bundle, policy: str, tmp_path: Path) -> None:
    bundle = with_policy(whole, policy, tmp_path / "bundle")
    with Runtime.open(bundle.path, 1) as runtime:
        for text, (drafter, rule) in zip(TEXTS, DRAFTERS, strict=True):
            ids = runtime.encode([{"role": "user", "content": text}])
            assert len(ids) > BUDGET + BLOCK or text == PROMPTS[0]
            plain = say(runtime, ids, drafter="none")
            assert say(runtime, ids, drafter=drafter, stop_rule=rule) == plain, text[:40]


def say(runtime: Runtime, ids: list[int], **how: Any) -> list[int]:
    session = runtime.session()
    session.generate(ids, Settings(TOKENS, **how))
    session.close()
    return session.tokens[len(ids) :]

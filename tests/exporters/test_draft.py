"""A bundle with a draft: its trimmed head, the ids it maps back, its entropy, and the table it shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory
from tests.helpers.oracle import EvictingModel, own_logits

ROWS, LAYERS = 262, 3
TOKENS = [int(i) for i in np.random.default_rng(2).integers(0, 288, 60)]
FLAGS: dict[str, Any] = dict(
    draft="layers", weights="fp32", widths=(2, 4), budget=32, block=8, sinks=2, recent=4
)
FLAGS |= dict(draft_rows=ROWS, draft_budget=16)


def two_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The draft as Transformers runs it: the same model without its third layer."""
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, PreTrainedModel]:
    """A bundle of a three-layer model with its own first two layers as the draft."""
    folder = tmp_path_factory.mktemp("draft")
    config = tiny.family_config("llama", num_hidden_layers=LAYERS, tie_word_embeddings=request.param)
    model = tiny.trained_like(config)
    source = write_directory(folder / "source", model)
    bundle = export(ExportConfig(str(source), str(folder / "bundle"), **FLAGS), Progress(quiet=True), Engine)
    return bundle, model


def engine(bundle: Bundle, name: str) -> Engine:
    entry = next(m for m in bundle.manifest.models if m.name == name)
    return Engine(bundle.path, entry, threads=1)


def head_ids(bundle: Bundle) -> np.ndarray:
    return np.fromfile(bundle.path / engine(bundle, "draft").entry.head_ids, "<i4")


@pytest.mark.parametrize(("weights", "own", "device"), [("int8", "int4", "cpu"), ("w8a16", "w4a16", "npu")])
def test_a_draft_may_have_weights_in_a_form_of_its_own(
    made: tuple[Bundle, PreTrainedModel], tmp_path: Path, weights: str, own: str, device: str
) -> None:
    """Its head stays in the form of the target's, whose rows the context rows are."""
    source = made[0].path.parent / "source"
    read = {}
    for form in (None, own):
        flags = FLAGS | {"weights": weights, "draft_weights": form, "device": device, "context_rows": 8}
        bundle = export(
            ExportConfig(str(source), str(tmp_path / f"{form}"), **flags), Progress(quiet=True), Engine
        )
        assert bundle.model("target").precision["linear"] == weights
        assert bundle.model("draft").precision == bundle.model("target").precision | {
            "linear": form or weights
        }
        read[form] = (bundle.path / bundle.model("draft").weights).stat().st_size
    assert read[own] != read[None]  # of so small a matrix a block of 4-bit codes is mostly padding


def test_every_output_of_the_draft_against_a_softmax_by_hand(made: tuple[Bundle, PreTrainedModel]) -> None:
    bundle, model = made
    draft, ids = engine(bundle, "draft"), head_ids(bundle)
    assert draft.entry.head_rows == len(ids) == ROWS and ids.tolist() == sorted(set(ids.tolist()))
    whole = model.model.layers
    want = own_logits(two_layers(model), TOKENS[:14]).numpy()[:, ids].astype(np.float64)
    model.model.layers, model.config.num_hidden_layers = whole, LAYERS
    p = np.exp(want - want.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    assert entropy.min() > 0.5 and entropy.max() < np.log(ROWS)

    first = draft.call("prefill", TOKENS[:8])
    np.testing.assert_allclose(first["logits"][0, 0], want[7], rtol=0, atol=2e-5)
    assert first["argmax"][0, 0] == ids[want[7].argmax()]
    draft.accept(8)
    for done in (8, 10, 12):
        out = {name: array[0].copy() for name, array in draft.call("draft", TOKENS[done : done + 2]).items()}
        rows = slice(done, done + 2)
        np.testing.assert_allclose(out["logits"], want[rows], rtol=0, atol=2e-5)
        np.testing.assert_allclose(out["entropy"], entropy[rows], rtol=0, atol=1e-4)
        order = np.argsort(-want[rows], axis=-1)[:, :8]
        assert out["argmax"].tolist() == ids[order[:, 0]].tolist()
        assert out["top_ids"].tolist() == ids[order].tolist()
        best = np.take_along_axis(p[rows], order, -1)
        np.testing.assert_allclose(out["top_probabilities"], best, rtol=0, atol=1e-5)
        draft.accept(2)


def test_the_draft_evicts_by_its_own_budget(made: tuple[Bundle, PreTrainedModel]) -> None:
    bundle, model = made
    target, draft = engine(bundle, "target"), engine(bundle, "draft")
    assert (target.cache.slots, draft.cache.slots) == (40, 24)
    oracle = EvictingModel(model, 32, 8, "keydiff", 2, 4)
    want = oracle.feed(TOKENS, 7)[-1].numpy()
    assert oracle.narrowest > 1e-5
    np.testing.assert_allclose(target.prefill(TOKENS), want, rtol=0, atol=1e-4)
    whole = model.model.layers
    oracle = EvictingModel(two_layers(model), 16, 8, "keydiff", 2, 4)
    want = oracle.feed(TOKENS, 7)[-1].numpy()[head_ids(bundle)]
    model.model.layers, model.config.num_hidden_layers = whole, LAYERS
    assert oracle.narrowest > 1e-5
    np.testing.assert_allclose(draft.prefill(TOKENS), want, rtol=0, atol=1e-4)


def test_the_tables_are_the_target_s_and_only_the_draft_s_head_is_new(
    made: tuple[Bundle, PreTrainedModel],
) -> None:
    bundle, model = made
    entries = {m.name: m for m in bundle.manifest.models}
    used: dict[str, set[str]] = {}
    for spec in entries["draft"].graphs:
        graph = onnx.load(bundle.path / spec.file, load_external_data=False).graph
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    used.setdefault(entry.value, set()).add(tensor.name)
    assert set(used) == {"target.data", "draft.data"}
    embedding, angles = "model.embed_tokens.weight.weight", "model.rotary_emb"
    looked_up = embedding if model.config.tie_word_embeddings else "lm_head.weight.weight"  # context rows
    assert used["target.data"] == {embedding, looked_up, f"{angles}.cos", f"{angles}.sin"}
    layers = sum(p.numel() for layer in model.model.layers[:2] for p in layer.parameters())
    rest = model.config.hidden_size * (1 + ROWS)
    stored = (bundle.path / entries["draft"].weights).stat().st_size
    assert 4 * (layers + rest) <= stored <= 4 * (layers + rest) + 64 * 40


def test_kinds_and_widths_are_those_of_the_design(made: tuple[Bundle, PreTrainedModel]) -> None:
    bundle, _ = made
    kinds = {m.name: [(g.kind, g.width) for g in m.graphs] for m in bundle.manifest.models}
    assert kinds["target"] == [("prefill", 8), ("verify", 2), ("verify", 4), ("decode", 1), ("commit", 8)]
    assert kinds["draft"] == [("prefill", 8), ("draft", 2), ("commit", 8), ("context", 4)]


def test_a_head_of_listed_ids(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source", tiny.model("llama"))
    (tmp_path / "ids").write_text("263\n260\n")
    flags = {**FLAGS, "draft_vocab": str(tmp_path / "ids")}
    bundle = export(
        ExportConfig(str(source), str(tmp_path / "bundle"), **flags), Progress(quiet=True), Engine
    )
    ids = head_ids(bundle)
    assert ids.tolist() == [*range(259), 260, 263]
    out = engine(bundle, "draft").call("draft", [5, 6])
    with torch.no_grad():
        want = tiny.model("llama")(torch.tensor([[5, 6]])).logits[0].numpy()[:, ids]
    np.testing.assert_allclose(out["logits"][0], want, rtol=0, atol=2e-5)
    assert out["argmax"][0].tolist() == ids[want.argmax(-1)].tolist()

"""The form with coded activations: spans are what Transformers' own modules reach, graphs of every family
stay close to its logits, and caches hold the codes of its own keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import DynamicCache

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import export, plan
from edgespec.exporters.commit import policy_graphs
from edgespec.exporters.lower_codes import HEAD, Spans
from edgespec.exporters.spans import spans_of
from edgespec.exporters.step import model_spec
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from edgespec.runtime.text import render
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

QUIET = Progress(quiet=True)
TEXTS = torch.randint(0, 288, (4, 40), generator=torch.Generator().manual_seed(0))
FIRST = (0, 328, 656, 984)  # the four texts begin all over the 1,024 positions
TOKENS = [int(token) for token in TEXTS[0]]
CODES = CacheSpec("rows", 64, 8, "none", 0, 0, (64,), 8, dtype="int8")
W8 = dict.fromkeys(("linear", "head", "embedding"), "w8a16")


def looked(source: Any) -> Spans:
    return spans_of(source, TEXTS, lambda done, total: None)


def own_cache(
    model: Any, texts: torch.Tensor, first: tuple[int, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Transformers' own keys and values, layer by layer [B,KV,T,d], of texts that begin there."""
    cache, positions = DynamicCache(), torch.tensor(first)[:, None] + torch.arange(texts.shape[1])
    with torch.no_grad():
        model(texts, position_ids=positions, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen2"])
def test_spans_are_what_the_model_reaches(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    spans = looked(tiny.checkpoint(tmp_path / "source", model))
    for layer, (keys, values) in enumerate(own_cache(model, TEXTS, FIRST)):
        for mine, theirs in ((spans.keys[layer], keys), (spans.values[layer], values)):
            assert np.allclose(mine, theirs.abs().amax((0, 2, 3)).numpy(), rtol=1e-4)
    seen: dict[str, list[torch.Tensor]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    handles = [
        m.register_forward_hook(lambda m, given, made, n=n: seen.update({n: [given[0], made]}))
        for n, m in linears.items()
    ]
    with torch.no_grad():
        model(TEXTS)
    for handle in handles:
        handle.remove()
    head = next(n for n, m in linears.items() if m is model.get_output_embeddings())
    assert {HEAD, *(f"{n}.weight" for n in linears if n != head)} == set(spans.linears)
    for name, (given, made) in seen.items():
        made = made if linears[name].bias is None else made - linears[name].bias
        for span, x in zip(spans.of(HEAD if name == head else f"{name}.weight"), (given, made), strict=True):
            assert np.allclose(
                span, (min(0.0, float(x.min())), max(0.0, float(x.max()))), rtol=1e-3, atol=1e-4
            )


def test_scores_and_queries_are_those_of_eager_attention(tmp_path: Path) -> None:
    """From attention's own probabilities: a score less another is the difference of their logarithms."""
    model = tiny.model("llama")
    spans = looked(tiny.checkpoint(tmp_path / "source", model))
    with torch.no_grad():
        probabilities = model(TEXTS, output_attentions=True).attentions
    for layer, p in enumerate(probabilities):
        seen = torch.ones(p.shape[-1], p.shape[-1]).tril().bool()
        apart = (
            p.clamp_min(1e-30).log().amax(-1) - p.masked_fill(~seen, 1).clamp_min(1e-30).log().amin(-1)
        ).max()
        assert 0 < float(apart) <= 2 * spans.scores[layer] * (1 + 1e-3)
        assert spans.scores[layer] <= spans.queries[layer] * spans.keys[layer].max() * model.config.head_dim


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_stay_close_and_caches_hold_codes(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    source = tiny.checkpoint(tmp_path / "source", model)
    spans = looked(source)
    engine = tiny.export_tiny(source, CODES, tmp_path / "graphs", precision=W8, spans=spans)
    with torch.no_grad():
        want = model(TEXTS[:1]).logits[0].numpy()
    engine.prefill(TOKENS[:8])
    got = []
    for kind, width in (("verify", 4), ("decode", 1), ("verify", 2), ("prefill", 8)):
        start = engine.count
        logits = engine.call(kind, TOKENS[start : start + width], width)["logits"][0].copy()
        got.append(
            (
                logits,
                want[start + width - 1 : start + width] if kind == "prefill" else want[start : start + width],
            )
        )
        engine._append(width)
    mine, theirs = (np.concatenate(part) for part in zip(*got, strict=True))
    assert np.abs(mine - theirs).max() < 0.2 * np.abs(theirs).max()
    assert np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > 0.995
    for part, most in (("keys", spans.keys), ("values", spans.values)):
        assert engine.caches[part][0].dtype == np.int8
        own = dict(zip(("keys", "values"), own_cache(model, TEXTS[:1], (0,))[0], strict=True))[part][0]
        seen = engine.caches[part][0][0, :, : engine.count] * (most[0][:, None, None] / 127)
        step = most[0].max() / 127
        assert np.abs(seen - own[:, : engine.count].numpy()).max() < 2.5 * step  # layer 0: weights round, too


@pytest.mark.parametrize("policy", ["keydiff", "caote(h2o)"])
def test_a_commit_on_codes_keeps_what_their_floats_keep(policy: str, tmp_path: Path) -> None:
    """The graph of float caches, fed what the codes stand for, chooses the same rows."""
    rng = np.random.default_rng(0)
    spec = model_spec(tiny.model("llama").config)
    kept = []
    codes = {
        part: rng.integers(-127, 128, (1, spec.kv_heads, 24, spec.head_dim)).astype(np.int8)
        for part in ("keys", "values")
    }
    beside = {
        "queries": rng.standard_normal((8, spec.heads, spec.head_dim)).astype(np.float32),
        "carried": rng.random((spec.heads, 24)).astype(np.float32),
    }
    for dtype in ("int8", "float32"):
        cache = CacheSpec("rows", 16, 8, policy, 1, 2, (16,), 8, 8 if "h2o" in policy else 0, dtype=dtype)
        model, graph = next((m, g) for m, g in policy_graphs("target", spec, cache) if g.kind == "commit")
        ir.save(model, tmp_path / f"{dtype}.onnx")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(tmp_path / f"{dtype}.onnx", options)
        rows = codes if dtype == "int8" else {part: (x / 127).astype(np.float32) for part, x in codes.items()}
        given = {**rows, **beside}
        kept.append(session.run(["keep"], {t.name: given[t.name] for t in graph.inputs})[0])
        assert [t.dtype for t in graph.inputs if t.name == "keys"] == [dtype]
    assert np.array_equal(*kept) and kept[0].shape == (spec.kv_heads, 16)


def test_every_other_text_begins_as_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template's own tokens may reach furthest; a span that lacks them would cut them off."""
    source = write_directory(tmp_path / "model", tiny.model("llama"))
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 400, encoding="utf-8")
    config = ExportConfig(
        str(source), str(tmp_path / "bundle"), device="npu", weights="w8a16", budget=32, block=8, widths=(2,),
        text=str(text),
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(plan, "spans_of", lambda checkpoint, windows, advance: seen.append(windows))
    (job,) = plan.plan(config)
    plan.with_spans(config, job, None, lambda done, total: None)
    plan.with_spans(config, job, render, lambda done, total: None)
    plain, mixed = seen
    assert plain.shape == mixed.shape and len(plain) > 2
    assert torch.equal(plain[1::2], mixed[1::2])
    decode = job.checkpoint.tokenizer.encoder.decode
    for before, after in zip(plain[::2], mixed[::2], strict=True):
        words = decode(before.tolist()[: len(before) // 2])
        turn = render(job.checkpoint.tokenizer.chat_template, [{"role": "user", "content": words}], "", "")
        said = decode(after.tolist(), skip_special_tokens=False)
        assert said.startswith(turn[:40]) and not decode(before.tolist()).startswith(turn[:40])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("codes")
    source = write_directory(folder / "model", tiny.trained_like(tiny.family_config("llama")))
    text = folder / "text.txt"
    text.write_text("one two three four five six seven " * 60, encoding="utf-8")
    config = ExportConfig(
        str(source), str(folder / "bundle"), draft="layers", draft_budget=16, draft_rows=200, context_rows=16,
        budget=32, block=8, widths=(2, 4), sinks=2, recent=4, device="npu", weights="w8a16", policy="h2o",
        text=str(text),
    )  # fmt: skip
    return export(config, QUIET, Engine)


def test_the_native_loop_says_the_same_with_and_without_drafts(bundle: Bundle, tmp_path: Path) -> None:
    """Past the budget, from a snapshot, too; a snapshot holds a byte for each number of a cache."""
    prompt, more = list(range(5, 55)), 30
    texts = {}
    with Runtime.open(bundle.path, 1) as runtime:
        for drafter in ("none", "ngram", "draft"):
            session = runtime.session()
            session.generate(prompt, Settings(more, drafter=drafter, stop_rule="fixed"))
            texts[drafter] = session.tokens[len(prompt) :]
        session.snapshot(str(tmp_path / "state"))
        session.generate([], Settings(8, drafter="none"))
        straight = session.tokens[-8:]
        other = runtime.session()
        other.restore(str(tmp_path / "state"))
        other.generate([], Settings(8, drafter="draft"))
        assert other.tokens[-8:] == straight
    assert texts["none"] == texts["ngram"] == texts["draft"] and len(texts["none"]) == more


def test_the_native_text_is_the_python_engines(bundle: Bundle) -> None:
    prompt = list(range(7, 40))
    engine = Engine(bundle.path, bundle.model("target"), 1)
    width = engine.widths("verify")[0]
    text = [*prompt]
    for i in range(len(prompt) + 11):
        best = int(engine.call("verify", [text[i]], width)["argmax"][0, 0])
        engine.accept(1)
        text += [best] if i + 1 == len(text) else []
    with Runtime.open(bundle.path, 1) as runtime:
        session = runtime.session()
        session.generate(prompt, Settings(12, drafter="none"))
        assert session.tokens == text


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        ({"block": 16}, "weights w8a16 cannot have calls of 16 rows", "use another --block"),
        ({"widths": (2, 16)}, "weights w8a16 cannot have calls of 16 rows", "use another --widths"),
        ({"positions": "compact"}, "weights w8a16 keep rows as codes", "leave --positions out"),
        ({"embedding": "w4a16"}, "embedding w4a16 cannot run on device npu", "use --embedding fp16 or w8a16"),
        ({"device": "cpu"}, "weights w8a16 cannot run on device cpu", "use --weights int4"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], message: str, hint: str, tmp_path: Path) -> None:
    given = {"device": "npu", "weights": "w8a16", "block": 32, "widths": (2,), **more}
    with pytest.raises(InputError, match=message) as refused:
        ExportConfig("demo", str(tmp_path / "bundle"), **given).check()
    assert refused.value.hint.startswith(hint)
    assert not (tmp_path / "bundle").exists()

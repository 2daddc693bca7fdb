"""Context rows of a draft's head: their logits are the target's own, and proposals are over the union."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgespec.bundle import Bundle, open_bundle
from edgespec.config import ExportConfig
from edgespec.errors import BundleError, InputError
from edgespec.exporters import export
from edgespec.exporters.check import check
from edgespec.profiles import operators
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

CONTEXT, ROWS = 12, 262
FLAGS: dict[str, Any] = dict(draft="layers", widths=(2,), budget=32, block=8, sinks=2, recent=4)
FLAGS |= dict(draft_rows=ROWS, draft_budget=16, context_rows=CONTEXT)
TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 288, 12)]
GIVEN = [287, 270, 281, 266, 279]  # in slots that are not in the order of ids
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 30.0},
    "granite": {},
    "hyperclovax": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint, written once; a model of two layers is its own draft."""
    folder = tmp_path_factory.mktemp("context")

    def get(family: str = "llama") -> Path:
        if not (folder / family).exists():
            config = tiny.family_config(family, **FAMILIES[family])
            write_directory(folder / family, tiny.trained_like(config))
        return folder / family

    return get


def made(source: Path, folder: Path, **more: Any) -> Bundle:
    config = ExportConfig(str(source), str(folder), **{"weights": "fp32", **FLAGS, **more})
    return export(config, Progress(quiet=True), Engine)


def parts(bundle: Bundle) -> tuple[Engine, np.ndarray]:
    entry = bundle.model("draft")
    return Engine(bundle.path, entry, threads=1), np.fromfile(bundle.file(entry.head_ids), "<i4")


@pytest.mark.parametrize(
    ("family", "device"),
    [("llama", "cpu"), ("llama", "npu"), ("gemma2", "cpu"), ("granite", "npu"), ("hyperclovax", "cpu")],
)
def test_what_is_proposed_is_the_law_over_the_union(
    source: Callable[[str], Path], tmp_path: Path, family: str, device: str
) -> None:
    form = {"weights": "fp32"} if device == "cpu" else {"weights": "fp16", "device": "npu"}
    bundle = made(source(family), tmp_path / "b", **form)
    draft, ids = parts(bundle)
    with torch.no_grad():
        model = tiny.trained_like(tiny.family_config(family, **FAMILIES[family]))
        if device == "npu":
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(parameter.half().float())
        whole = model(torch.tensor([TOKENS])).logits[0].double()
    draft.call("prefill", TOKENS[:8])
    draft.accept(8)
    lacked = [i for i in range(288) if i not in ids]
    likely = sorted(lacked, key=lambda i: -float(whole[8:, i].max()))[:5]
    best = set()
    for done, given in ((8, likely), (10, [*likely[::-1], GIVEN[0]]), (10, [])):
        union = torch.tensor([*ids.tolist(), *given])
        draft.fill_context(given)
        out = {name: array[0].copy() for name, array in draft.call("draft", TOKENS[done : done + 2]).items()}
        if done == 8:
            draft.accept(2)
        logits = whole[done : done + 2][:, union]
        p = logits.softmax(-1)
        np.testing.assert_allclose(out["logits"], logits, rtol=0, atol=1e-4)
        assert out["argmax"].tolist() == union[logits.argmax(-1)].tolist()
        top = logits.topk(8)
        assert out["top_ids"].tolist() == union[top.indices].tolist()
        np.testing.assert_allclose(out["top_probabilities"], p.gather(1, top.indices), rtol=0, atol=1e-5)
        entropy = -(p * p.log()).sum(-1)
        np.testing.assert_allclose(out["entropy"], entropy, rtol=0, atol=1e-4)
        best |= set(out["top_ids"].ravel().tolist())
    assert best & set(likely)


@pytest.mark.parametrize(
    ("form", "tied"), [("int4", True), ("int8", True), ("int8", False), ("fp16", False), ("fp32", True)]
)
def test_a_row_is_the_target_s_stored_head_row_in_every_form(tmp_path: Path, form: str, tied: bool) -> None:
    model = tiny.trained_like(tiny.family_config("qwen2", tie_word_embeddings=tied, hidden_size=80))
    source = write_directory(tmp_path / "s", model)
    text = tmp_path / "t"
    text.write_text("hello world " * 40)
    bundle = made(source, tmp_path / "b", weights=form, head=form, text=str(text), embedding="fp32")
    draft, _ = parts(bundle)
    head = model.get_output_embeddings().weight.detach().numpy()
    draft.fill_context(GIVEN)
    found = draft.context["context"].T
    step = {"int4": 1 / 15, "int8": 1 / 127, "fp16": 2**-10, "fp32": 0}[form]
    for i, token in enumerate(GIVEN):
        spread = np.abs(head[token]).max() * 2 * step
        np.testing.assert_allclose(found[i], head[token], rtol=0, atol=spread + 1e-12)
    assert not found[len(GIVEN) :].any()
    assert draft.context["context_ids"].tolist() == [*GIVEN, *[-1] * (CONTEXT - len(GIVEN))]
    files = {t.name for g in bundle.manifest.models[1].graphs for t in g.inputs if g.kind == "context"}
    assert files == {"tokens"}


def test_check_proves_them_and_finds_another_token_s_row(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = made(source(), tmp_path / "b")

    class Shifted(Engine):
        def fill_context(self, ids: Any) -> None:
            super().fill_context(ids)
            self.context["context"][:] = np.roll(self.context["context"], 1, axis=1)

    text = tmp_path / "t"
    text.write_text("hello  world, where  words  are " * 20)
    for engine, passes in ((Engine, True), (Shifted, False)):
        result = check(
            bundle, engine, operators("cpu"), str(source()), str(text), progress=Progress(quiet=True)
        )
        found = {f.name: f for f in result.findings}
        assert found["draft context rows"].passed is passes
        assert found["draft numbers"].passed is passes, found["draft numbers"].detail
        assert result.passed is passes
    assert found["draft context rows"].detail.startswith("12 are the checkpoint's, least cosine")


def test_defaults(source: Callable[[str], Path], tmp_path: Path) -> None:
    rows = lambda name, **more: made(source(), tmp_path / name, **more).model("draft").context_rows  # noqa: E731
    assert rows("a", context_rows=None) == 288 - ROWS  # 256, and no more than the head lacks
    assert rows("b", context_rows=0) == 0
    assert rows("c", context_rows=None, draft_rows=288) == 0
    assert rows("d", context_rows=None, device="npu", weights="int4", head="int4", embedding="fp16") == 0


def test_refusals(source: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(**more: Any) -> str:
        with pytest.raises(InputError) as caught:
            made(source(), tmp_path / "b", **more)
        assert not (tmp_path / "b").exists()
        return str(caught.value)

    assert refused(draft_rows=288) == (
        "error: context_rows 12 cannot be: the draft's head is not trimmed\n"
        "hint:  use fewer --draft-rows, or --context-rows 0"
    )
    npu = refused(device="npu", weights="int4", head="int4", embedding="fp16")
    assert "an npu looks nothing up in an int4 head" in npu and "use --head fp16" in npu
    other = write_directory(tmp_path / "other", tiny.trained_like(tiny.family_config("llama"), seed=7))
    assert "the head of other is not the target's" in refused(draft=str(other))
    narrow = tiny.trained_like(tiny.family_config("llama", hidden_size=32))
    assert "the head of narrow is not" in refused(draft=str(write_directory(tmp_path / "narrow", narrow)))
    with pytest.raises(InputError, match="--context-rows is given without a draft"):
        ExportConfig(str(source()), str(tmp_path / "b"), context_rows=4).check()
    with pytest.raises(InputError, match="context_rows -1 is not 0 to"):
        ExportConfig(str(source()), str(tmp_path / "b"), draft="layers", context_rows=-1).check()


def test_another_draft_with_the_target_s_head_has_them(source: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny.trained_like(tiny.family_config("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    bundle = made(source(), tmp_path / "b", draft=str(write_directory(tmp_path / "own", model)))
    assert bundle.model("draft").context_rows == CONTEXT


def test_too_many_or_double_tokens(source: Callable[[str], Path], tmp_path: Path) -> None:
    draft, _ = parts(made(source(), tmp_path / "b"))
    for ids in (range(262, 275), [270, 270]):
        with pytest.raises(InputError, match="tokens for 12 context rows"):
            draft.fill_context(list(ids))


SENSE = [
    (lambda d, t: d.update(context_rows=0), "context, and the head has no context rows|inputs: are"),
    (lambda d, t: d.update(context_rows=13), r"'float32' \[64, 12\] where context float32 \[64, 13\]"),
    (lambda d, t: d.update(context_rows=27), "context_rows: are 27, and the head lacks 26 tokens"),
    (lambda d, t: d.update(context_rows="12"), "context_rows: is a text, not int"),
    (lambda d, t: d.pop("context_rows"), "field 'context_rows' is missing"),
    (lambda d, t: t.update(context_rows=1), "context_rows: are 1, and only a draft's trimmed head has any"),
    (lambda d, t: d["graphs"].pop(), "hold 0 context graphs for 12 context rows"),
    (lambda d, t: d["graphs"][-1].update(width=9), "width: is 9, not 1 to the widest 8"),
    (lambda d, t: d["graphs"][-1]["outputs"][0].update(shape=[1, 4, 65]), r"hold 'rows' 'float32'"),
    (lambda d, t: t["spec"].update(hidden=65), "the target's head rows, and the two have other widths"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SENSE, ids=[s[1][:30] for s in SENSE])
def test_manifests_that_make_no_sense(
    source: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    change: Callable[[dict, dict], Any],
    message: str,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared.bundle"
    if not folder.exists():
        made(source(), folder)
    whole = (folder / "manifest.json").read_text()
    data = json.loads(whole)
    change(data["models"][1], data["models"][0])
    try:
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(BundleError, match=message):
            open_bundle(folder)
    finally:
        (folder / "manifest.json").write_text(whole)

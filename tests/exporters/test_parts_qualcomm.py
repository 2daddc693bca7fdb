"""A model in parts for Qualcomm's NPU: a context each, the whole model's text, and as many as are needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.config import ExportConfig
from edgespec.count import count
from edgespec.errors import InputError
from edgespec.exporters import export, plan
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from edgespec.soc import SOCS
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

QUIET = Progress(quiet=True)
FP16 = dict.fromkeys(("linear", "head", "embedding"), "fp16")
SMALL: dict[str, Any] = dict(device="npu", weights="fp16", budget=16, block=8, widths=(2,), sinks=2, recent=4)
TOKENS = list(range(5, 25))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.trained_like(tiny.family_config("qwen2", max_position_embeddings=64))
    return write_directory(tmp_path_factory.mktemp("parts") / "model", model)


@pytest.fixture
def soc() -> Any:
    pytest.importorskip(
        "onnxruntime_qnn", reason="Qualcomm's compiler is not installed (EDGESPEC_QNN=1 scripts/setup)"
    )
    return SOCS["8-elite"]


def test_each_part_has_its_context_and_drafts_change_no_text(source: Path, soc: Any) -> None:
    from edgespec.exporters.check_qualcomm import check_qualcomm

    config = ExportConfig(str(source), str(source.parent / "x.bundle"), **SMALL, parts=2, soc=(soc.name,))
    bundle = export(config.check(), QUIET, Engine)
    (compiled,) = bundle.manifest.compiled
    assert set(compiled.contexts) == {"target-part1", "target-part2"}
    assert {c.model for c in count(bundle).compiled} == set(compiled.contexts)
    found = {f.name: f for f in check_qualcomm(bundle, Engine, (), None, QUIET)}
    assert all(f.passed for f in found.values()), found
    assert found["compiled for 8-elite"].detail.startswith(f"{len(compiled.graphs)} graphs in 2 contexts of ")
    texts = []
    with Runtime.open(bundle.path, 1, soc=soc.name) as runtime:
        for drafter in ("none", "ngram"):
            session = runtime.session()
            for _ in session.stream(TOKENS, Settings(max_new_tokens=10, drafter=drafter, stop_rule="fixed")):
                pass
            texts.append(session.answer.tokens)
    assert texts[0] == texts[1] and len(texts[0]) == 10


def test_emulated_parts_give_the_bits_of_the_whole(source: Path, soc: Any, tmp_path: Path) -> None:
    from edgespec.exporters import qualcomm

    cache = CacheSpec("rows", 16, 8, "none", 0, 0, (16,), 8)
    made = []
    for counts in ((2,), (1, 1)):
        written = tiny.export_tiny(
            open_checkpoint(str(source)),
            cache,
            tmp_path / str(len(counts)),
            (2,),
            precision=FP16,
            counts=counts,
        )
        npu = Engine(written.folder, written.entry, opener=lambda path: qualcomm.opened(path, soc))
        npu.prefill(TOKENS[:6])
        made.append([npu.call("verify", TOKENS[6:8])["logits"], npu.pending["new_keys"]])
    for ours, theirs in zip(*made, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_soc_gets_as_many_parts_as_its_contexts_need(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportConfig(
        str(source), str(source.parent / "y.bundle"), **SMALL, draft="layers", draft_budget=16
    )
    target, draft = plan.plan(config)
    sizes = plan.bytes_of_layers(target)
    model, table = open_checkpoint(str(source)).load_model(), target.spec.vocab * target.spec.hidden
    for layer, size in zip(model.model.layers, sizes, strict=True):  # in fp16; the ends hold a table each
        assert size == 2 * (sum(p.numel() for p in layer.parameters() if p.dim() == 2) + table)
    assert (target.counts, draft.counts) == ((), ())
    for limit, counts in ((sum(sizes), (2,)), (sum(sizes) - 1, (1, 1)), (max(sizes), (1, 1))):
        monkeypatch.setattr(plan, "LARGEST_WEIGHTS", limit)
        target, draft = plan.plan(dataclasses.replace(config, soc=("8-elite",)))
        assert target.counts == counts and sum(draft.counts) == draft.spec.layers
    monkeypatch.setattr(plan, "LARGEST_WEIGHTS", max(sizes) - 1)
    with pytest.raises(InputError, match="more than a compiled context may hold"):
        plan.plan(dataclasses.replace(config, soc=("8-elite",)))
    with pytest.raises(InputError, match="parts 3 are more than the 2 layers of ") as caught:
        plan.plan(dataclasses.replace(config, parts=3))
    assert caught.value.hint == "use --parts 2 or fewer"

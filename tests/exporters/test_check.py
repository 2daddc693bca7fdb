"""check says yes to what the exporter made and no, with the reason, to every way of spoiling it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgespec.bundle import Bundle, creating, open_bundle
from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import export
from edgespec.exporters.check import CheckResult, check
from edgespec.exporters.compare import row_of
from edgespec.profiles import operators
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

QUIET = Progress(quiet=True)
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("check") / "model", tiny.model("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def bundles(source: Path) -> Callable[..., Bundle]:
    made: dict[str, Bundle] = {}

    def make(weights: str, **more: Any) -> Bundle:
        key = json.dumps([weights, more], sort_keys=True)
        if key not in made:
            given: dict[str, Any] = {
                "budget": 32,
                "block": 16,
                "widths": (2, 4),
                "sinks": 2,
                "recent": 4,
                **more,
            }
            output = str(source.parent / f"{len(made)}.bundle")
            made[key] = export(ExportConfig(str(source), output, weights=weights, **given), QUIET, Engine)
        return made[key]

    return make


def run(bundle: Bundle, source: Path | None, text: str, **more: Any) -> CheckResult:
    allowed = operators(bundle.manifest.device)
    return check(bundle, Engine, allowed, str(source) if source else None, text, progress=QUIET, **more)


def finding(result: CheckResult, name: str) -> Any:
    (found,) = [f for f in result.findings if f.name == name]
    return found


def test_fp32_matches_transformers_and_the_evicting_cache(bundles: Any, source: Path, text: str) -> None:
    result = run(bundles("fp32"), source, text)
    assert result.passed, result.lines()
    assert finding(result, "target numbers").figures["difference"] < 2e-5
    assert finding(result, "target eviction").figures["difference"] < 1e-4
    assert "over 2 evictions" in finding(result, "target eviction").detail


def test_npu_fp16_is_near_and_uses_its_own_operators(bundles: Any, source: Path, text: str) -> None:
    result = run(bundles("fp16", device="npu"), source, text)
    assert finding(result, "graphs").passed
    assert finding(result, "target numbers").figures["kl"] < 1e-4
    assert finding(result, "target widths").passed, "a bundle whose widths differ says so, and that is right"


def test_a_draft_is_compared_over_its_own_head(bundles: Any, source: Path, text: str) -> None:
    bundle = bundles("fp32", draft="layers", draft_budget=32, draft_rows=280)
    assert bundle.model("draft").head_rows == 280
    result = run(bundle, source, text)
    assert result.passed, result.lines()
    assert finding(result, "draft numbers").figures["difference"] < 2e-5


def test_a_quantised_target_is_judged_by_its_perplexity(bundles: Any, source: Path, text: str) -> None:
    found = finding(run(bundles("int8"), source, text), "target numbers")
    rise = found.figures["perplexity"] / found.figures["perplexity_source"] - 1
    assert found.passed == (rise <= 0.03)
    assert 0 < found.figures["kl"] < 0.5


def test_self_tests_the_widths_alone(bundles: Any, text: str) -> None:
    result = run(bundles("int8"), None, text, self_only=True)
    assert [f.name for f in result.findings] == ["target widths"]
    assert result.passed and "5 graphs" not in result.findings[0].detail


def test_without_a_source_nothing_counts_as_proven(bundles: Any, text: str) -> None:
    found = finding(run(bundles("int8"), None, text), "target numbers")
    assert not found.passed
    assert "name it with --source" in found.detail


def test_another_checkpoint_is_refused(bundles: Any, text: str, tmp_path: Path) -> None:
    other = write_directory(tmp_path / "other", tiny.model("llama", seed=1))
    with pytest.raises(InputError, match="is not the checkpoint that this bundle's target came from"):
        run(bundles("int8"), other, text)


def spoiled(bundle: Bundle, path: Path, spoil: Callable[[Path], None], **manifest: Any) -> Bundle:
    """A copy of a bundle with something changed, sealed again, so that checksums do not give it away."""
    with creating(path) as staging:
        for name in bundle.manifest.files:
            shutil.copy(bundle.file(name), staging.path / name)
        spoil(staging.path)
        staging.finish(dataclasses.replace(bundle.manifest, files={}, **manifest))
    return open_bundle(path)


def test_spoiled_weights_fail_the_numbers(bundles: Any, source: Path, text: str, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        data = np.fromfile(folder / "target.data", np.uint8)
        data[1000:2000] ^= 0x40
        data.tofile(folder / "target.data")

    bad = spoiled(bundles("fp32"), tmp_path / "bad.bundle", spoil)
    found = finding(run(bad, source, text), "target numbers")
    assert not found.passed
    assert not found.figures["difference"] <= 1e-4


def test_a_foreign_operator_is_named(bundles: Any, source: Path, text: str, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "target-decode.onnx", load_external_data=False)
        node = next(n for n in model.graph.node if n.op_type == "ArgMax")
        node.op_type = "ArgMin"
        onnx.save(model, folder / "target-decode.onnx")

    bad = spoiled(bundles("int8"), tmp_path / "bad.bundle", spoil)
    found = finding(run(bad, source, text), "target-decode.onnx")
    assert not found.passed
    assert found.detail == "has operators that the device lacks: ArgMin"


def test_a_dimension_that_is_not_fixed_is_named(
    bundles: Any, source: Path, text: str, tmp_path: Path
) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "target-verify-2.onnx", load_external_data=False)
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
        onnx.save(model, folder / "target-verify-2.onnx")

    bad = spoiled(bundles("int8"), tmp_path / "bad.bundle", spoil)
    found = finding(run(bad, source, text), "target-verify-2.onnx")
    assert found.detail == "tokens has a dimension that is not fixed"


def test_widths_that_differ_against_the_manifest_fail(
    bundles: Any, source: Path, text: str, tmp_path: Path
) -> None:
    """The npu graphs differ on this runtime; a manifest that claims otherwise is found out."""
    good = bundles("fp16", device="npu")
    (entry,) = good.manifest.models
    if entry.widths_agree:
        pytest.skip("the npu graphs agree on this machine")
    lie = dataclasses.replace(entry, widths_agree=True)
    bad = spoiled(good, tmp_path / "bad.bundle", lambda folder: None, models=(lie,))
    found = finding(run(bad, source, text), "target widths")
    assert not found.passed
    assert "claims they agree" in found.detail


def negate(file: str, output: str) -> Callable[[Path], None]:
    """Turn the sign of what a graph gives."""

    def spoil(folder: Path) -> None:
        model = onnx.load(folder / file, load_external_data=False)
        for node in model.graph.node:
            node.output[:] = [f"{o}.right" if o == output else o for o in node.output]
            node.input[:] = [f"{i}.right" if i == output else i for i in node.input]
        model.graph.node.append(onnx.helper.make_node("Neg", [f"{output}.right"], [output]))
        onnx.save(model, folder / file)

    return spoil


@pytest.mark.parametrize("kind", ["prefill", "decode", "verify-2"])
def test_every_npu_graph_is_near_the_one_that_is_compared(
    bundles: Any, source: Path, text: str, tmp_path: Path, kind: str
) -> None:
    """Widths that differ in their last bits are no licence for a graph that computes something else."""
    spoil = negate(f"target-{kind}.onnx", "logits")
    bad = spoiled(bundles("fp16", device="npu"), tmp_path / "bad.bundle", spoil)
    found = finding(run(bad, source, text), "target widths")
    assert not found.passed
    assert found.figures["kl"] > 0.1


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_a_commit_graph_that_keeps_other_rows_fails(
    bundles: Any, source: Path, text: str, tmp_path: Path, device: str
) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "target-commit.onnx", load_external_data=False)
        first = next(n for n in model.graph.node if n.op_type == "TopK")
        largest = next(a for a in first.attribute if a.name == "largest")
        largest.i = 1 - largest.i
        onnx.save(model, folder / "target-commit.onnx")

    good = bundles("fp16" if device == "npu" else "int8", device=device)
    assert finding(run(good, source, text), "target commit").passed
    bad = spoiled(good, tmp_path / "bad.bundle", spoil)
    assert not finding(run(bad, source, text), "target commit").passed


def test_a_draft_of_its_own_is_compared_or_the_check_fails(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = write_directory(tmp_path / "draft", tiny.model("llama", seed=1))
    given = dict(budget=32, block=16, widths=(2,), weights="fp32", sinks=2, recent=4, draft_budget=32)
    config = ExportConfig(
        str(source), str(tmp_path / "two.bundle"), draft=str(draft), draft_rows=100, **given
    )
    bundle = export(config, QUIET, Engine)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = finding(run(bundle, source, text), "draft numbers")
    assert not found.passed
    assert "name it with --draft-source" in found.detail
    assert finding(run(bundle, source, text, draft_source=str(draft)), "draft numbers").passed
    with pytest.raises(InputError, match="draft came from") as caught:
        run(bundle, source, text, draft_source=str(source))
    assert "--draft-source" in caught.value.hint


def test_head_rows_of_a_trimmed_head() -> None:
    assert row_of(5, np.array([1, 4])).tolist() == [-1, 0, -1, -1, 1]
    assert row_of(3, None).tolist() == [0, 1, 2]

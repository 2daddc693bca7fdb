"""check --npu qualcomm and export --soc, with Qualcomm's own compiler and emulator on two-layer models."""

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
import torch
from onnx import TensorProto, helper

from edgespec.bundle import Bundle, creating, open_bundle
from edgespec.cli import main
from edgespec.config import MISCOMPILED, ExportConfig
from edgespec.errors import BundleError, InputError
from edgespec.exporters import assemble, export
from edgespec.exporters.build import Builder
from edgespec.exporters.spans import spans_of
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.soc import NAMES, SOCS
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.bundles import make
from tests.helpers.checkpoints import write_directory

pytest.importorskip(
    "onnxruntime_qnn", reason="Qualcomm's compiler is not installed (EDGESPEC_QNN=1 scripts/setup)"
)

from edgespec.exporters import qualcomm
from edgespec.exporters.check_qualcomm import (
    check_compiled,
    check_qualcomm,
    check_steps,
    emulated,
)

QUIET = Progress(quiet=True)
FREQUENCIES = 10000.0 ** (-np.arange(0, 16, 2) / 16)  # of the tiny models, 16 dimensions a head
SMALL: dict[str, Any] = dict(
    device="npu", weights="fp16", budget=32, block=16, widths=(2,), sinks=2, recent=4
)
FP16 = dict.fromkeys(("linear", "head", "embedding"), "fp16")
DRAFT = dict(draft="layers", draft_budget=32, draft_rows=200, context_rows=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.trained_like(tiny.family_config("qwen2", max_position_embeddings=2048))
    return write_directory(tmp_path_factory.mktemp("qualcomm") / "model", model)


@pytest.fixture(scope="module")
def plain(source: Path) -> Bundle:
    """A target and its draft with context rows, compiled for no SoC."""
    return export(
        ExportConfig(str(source), str(source.parent / "plain.bundle"), **SMALL, **DRAFT), QUIET, Engine
    )


@pytest.fixture(scope="module")
def compiled(source: Path) -> Bundle:
    """The same target alone, compiled for two SoCs."""
    config = ExportConfig(str(source), str(source.parent / "two.bundle"), **SMALL, soc=("8-elite", "8-gen-3"))
    return export(config, QUIET, Engine)


def spoiled(bundle: Bundle, path: Path, spoil: Callable[[Path], None]) -> Bundle:
    """A copy of a bundle with something changed, sealed again, so that checksums do not give it away."""
    with creating(path) as staging:
        for name in bundle.manifest.files:
            (staging.path / name).parent.mkdir(exist_ok=True)
            shutil.copy(bundle.file(name), staging.path / name)
        spoil(staging.path)
        staging.finish(dataclasses.replace(bundle.manifest, files={}))
    return open_bundle(path)


def findings(bundle: Bundle, *socs: str) -> dict[str, Any]:
    return {f.name: f for f in check_qualcomm(bundle, Engine, socs, None, QUIET)}


def test_a_bundle_compiles_whole_for_every_soc_and_its_steps_are_the_cpus(plain: Bundle) -> None:
    found = findings(plain)
    assert all(f.passed for f in found.values()), found
    graphs = sum(len(entry.graphs) for entry in plain.manifest.models)
    assert found["qualcomm graphs"].detail.startswith(f"{graphs} compile whole for {', '.join(NAMES)} by ")
    for name in ("target", "draft"):
        for position in (0, 1000, 2047):
            far = found[f"{name} emulated at {position}"].figures
            assert 0 < far["logits"] < 0.01 and 0 < far["rows"] < 0.01 and far["agreement"] == 1.0
        assert found[f"{name} commit emulated"].figures["kept"] > 0.99
    assert found["draft context rows emulated"].figures["rows"] < 1e-3


def test_the_emulated_socs_give_the_same_bits(plain: Bundle) -> None:
    """So a check emulates one of them."""
    graph = plain.graph("target", "verify")
    rng = np.random.default_rng(0)
    feed = {
        t.name: np.full(t.shape, 7, np.int32)
        if t.dtype == "int32"
        else rng.standard_normal(t.shape, np.float32)
        for t in graph.inputs
    }
    made = [qualcomm.opened(plain.file(graph.file), soc).run(None, feed) for soc in SOCS.values()]
    for other in made[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_the_command_adds_them_to_what_check_finds(plain: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Bug: the compiler's libraries print to stdout, in the middle of the result."""
    argv = ["check", str(plain.path), "--npu", "qualcomm", "--soc", "8-elite", "--self", "-q", "--json"]
    assert main(argv) == 0
    names = [f["name"] for f in json.loads(capfd.readouterr().out)["findings"]]
    assert names[:3] == ["target widths", "draft widths", "qualcomm graphs"]
    assert "target emulated at 1000" in names and "draft commit emulated" in names


def test_a_refused_node_is_named_with_its_module(plain: Bundle, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "target-decode.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "Sigmoid":
                node.op_type = "Erf"
        onnx.save(model, folder / "target-decode.onnx")

    bad = spoiled(plain, tmp_path / "bad.bundle", spoil)
    found = findings(bad, "8-gen-2", "8-elite")
    refused = found["target-decode.onnx for 8-gen-2, 8-elite"]
    where = "layers.0.mlp.act_fn, model.layers.1.mlp.act_fn"
    assert refused.detail == f"the compiler leaves to the CPU: Erf at model.{where}"
    assert found["qualcomm graphs"].detail.startswith("7 compile whole") and not refused.passed
    assert "target emulated at 0" not in found and found["draft emulated at 0"].passed


def test_angles_computed_in_the_graph_fail_far_into_a_text(plain: Bundle, tmp_path: Path) -> None:
    """The bug that positions are emulated for: fp16 holds no position x frequency (design, section 3)."""

    def spoil(folder: Path) -> None:
        for file in ("target-decode.onnx", "target-verify-2.onnx"):
            model = onnx.load(folder / file, load_external_data=False)
            graph = model.graph
            tables = [n for n in graph.node if "rotary_emb/Gather" in n.name]
            frequencies = FREQUENCIES.astype(np.float32)[None, None]
            graph.initializer.append(onnx.numpy_helper.from_array(frequencies, "frequencies"))
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "last"))
            at = list(graph.node).index(tables[0])
            steps = [
                helper.make_node("Cast", [tables[0].input[1]], ["places"], to=TensorProto.FLOAT),
                helper.make_node("Unsqueeze", ["places", "last"], ["column"]),
                helper.make_node("Mul", ["column", "frequencies"], ["angles"]),
                helper.make_node("Cos", ["angles"], tables[0].output),
                helper.make_node("Sin", ["angles"], tables[1].output),
            ]
            for node in tables:
                graph.node.remove(node)
            for i, step in enumerate(steps):
                graph.node.insert(at + i, step)
            onnx.save(model, folder / file)

    found = findings(spoiled(plain, tmp_path / "bad.bundle", spoil), "8-elite")
    assert found["qualcomm graphs"].passed and found["target emulated at 0"].passed
    assert not found["target emulated at 1000"].passed and not found["target emulated at 2047"].passed


def test_a_commit_that_keeps_other_rows_fails(plain: Bundle, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "target-commit.onnx", load_external_data=False)
        first = next(n for n in model.graph.node if n.op_type == "TopK")
        largest = next(a for a in first.attribute if a.name == "largest")
        largest.i = 1 - largest.i
        onnx.save(model, folder / "target-commit.onnx")

    found = findings(spoiled(plain, tmp_path / "bad.bundle", spoil), "8-elite")
    assert not found["target commit emulated"].passed


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_norms_of_heads_are_the_cpus(family: str, tmp_path: Path) -> None:
    """Bug: the compiler took norms of four dimensions beside a Transpose, and gave other numbers."""
    source = tiny.checkpoint(tmp_path / "source", tiny.model(family))
    cache = CacheSpec("rows", 32, 16, "none", 0, 0, (32,), 16)
    cpu = tiny.export_tiny(source, cache, tmp_path / "graphs", (2,), precision=FP16)
    npu = emulated(Engine, cpu.folder, cpu.entry, SOCS["8-elite"])
    found = check_steps(cpu.entry, cpu, npu, [3 + i * 37 % 285 for i in range(99)], lambda *_: None)
    assert len(found) == 3 and all(f.figures["logits"] < 0.02 for f in found), found


@pytest.mark.parametrize(
    ("family", "form", "policy"),
    [("llama", "w8a16", "keydiff"), ("gemma2", "w8a16", "h2o"), ("qwen3", "w4a16", "sinks")],
)
def test_coded_graphs_compile_whole_and_are_the_cpus(
    family: str, form: str, policy: str, tmp_path: Path
) -> None:
    model = tiny.trained_like(tiny.family_config(family, max_position_embeddings=2048))
    source = write_directory(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text("one two three four five six seven " * 60)
    coded = SMALL | {"weights": form, "block": 8, "policy": policy, "text": str(tmp_path / "text.txt")}
    bundle = export(
        ExportConfig(str(source), str(tmp_path / "coded.bundle"), **coded, **DRAFT), QUIET, Engine
    )
    found = findings(bundle, "8-gen-2", "8-elite")
    assert all(f.passed for f in found.values()), found
    for name in ("target", "draft"):
        for position in (0, 1000, 2047):  # a rounded code of 127 is 0.8 %
            assert found[f"{name} emulated at {position}"].figures["logits"] < 0.02
    codes = [t for t in bundle.graph("target", "verify").inputs if t.name.startswith(("keys", "values"))]
    assert {t.dtype for t in codes} == {"int8"} and len(codes) == 4


def test_sixteen_rows_of_codes_are_refused_because_the_compiler_gets_them_wrong(tmp_path: Path) -> None:
    """Bug of onnxruntime-qnn 2.7.0: where this fails, take config.MISCOMPILED away."""
    source = tiny.checkpoint(tmp_path / "source", tiny.model("llama"))
    tokens = [3 + i * 37 % 285 for i in range(99)]
    spans = spans_of(source, torch.tensor([tokens]), lambda done, total: None)
    worst = {}
    for block in (8, MISCOMPILED):
        cache = CacheSpec("rows", 32, block, "none", 0, 0, (32,), block, dtype="int8")
        cpu = tiny.export_tiny(
            source, cache, tmp_path / str(block), (2,), precision=dict.fromkeys(FP16, "w8a16"), spans=spans
        )
        npu = emulated(Engine, cpu.folder, cpu.entry, SOCS["8-elite"])
        found = check_steps(cpu.entry, cpu, npu, tokens, lambda *_: None)
        worst[block] = max(f.figures["logits"] for f in found)
    assert worst[8] < 0.03 and worst[MISCOMPILED] > 0.1, worst


# Compiled bundles.


def test_a_compiled_bundle_holds_one_context_a_model_and_its_log(compiled: Bundle) -> None:
    for name in ("8-elite", "8-gen-3"):
        entry = compiled.compiled(name)
        assert set(entry.graphs) == {g.file for g in compiled.model("target").graphs}
        context = compiled.manifest.files[entry.contexts["target"]].bytes
        weights = compiled.manifest.files["target.data"].bytes
        assert context < 2.5 * weights, "four graphs, weights once"
        log = compiled.file(entry.log).read_text().splitlines()
        assert log[0] == f"compiler {qualcomm.COMPILER}" and log[1].startswith(
            f"soc {name}: HTP architecture "
        )
        assert [line.split(":")[0] for line in log[2:]] == list(entry.graphs)
        assert all("nodes, all on the NPU" in line and not line.startswith("0 ") for line in log[2:])
        for file in entry.graphs.values():
            arch, number, contexts = qualcomm.stated(compiled.file(file))
            assert (arch, number) == (SOCS[name].htp_arch, SOCS[name].soc_model)
            assert contexts == ("target_qnn.bin",)


def test_inspect_shows_for_what_a_bundle_is_compiled(
    compiled: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(compiled.path), "-q"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if "onnxruntime-qnn" in line] == [
        ["8-elite", "target"],
        ["8-gen-3", "target"],
    ]
    assert main(["inspect", str(compiled.path), "-q", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    size = compiled.manifest.files["8-elite/target_qnn.bin"].bytes
    assert data["compiled"][0] == {
        "soc": "8-elite", "compiler": qualcomm.COMPILER, "model": "target", "bytes_context": size,
    }  # fmt: skip


def test_a_compiled_bundle_is_checked_for_its_own_socs_and_refused_for_another(compiled: Bundle) -> None:
    found = findings(compiled)
    assert all(f.passed for f in found.values()), found
    assert " compile whole for 8-elite, 8-gen-3 by " in found["qualcomm graphs"].detail
    assert {"compiled for 8-elite", "compiled for 8-gen-3"} <= set(found)
    with pytest.raises(BundleError, match="is compiled for 8-elite, 8-gen-3, not for 8-gen-2"):
        findings(compiled, "8-elite", "8-gen-2")


def test_files_of_another_soc_under_a_socs_name_fail(compiled: Bundle, tmp_path: Path) -> None:
    """The emulator itself opens most contexts of other SoCs without a word."""

    def spoil(folder: Path) -> None:
        shutil.copy(folder / "8-gen-3/target-decode.onnx", folder / "8-elite/target-decode.onnx")

    bad = spoiled(compiled, tmp_path / "bad.bundle", spoil)
    found = check_compiled(bad, "8-elite")
    assert found.detail == "8-elite/target-decode.onnx is compiled for 8-gen-3, not for 8-elite"
    assert not found.passed and check_compiled(bad, "8-gen-3").passed


@pytest.mark.parametrize("place", ["../8-gen-3/target_qnn.bin", "/etc/hostname", "other.bin"])
def test_a_compiled_graph_that_opens_another_file_fails(compiled: Bundle, tmp_path: Path, place: str) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "8-elite/target-decode.onnx"
        model = onnx.load(path)
        held = next(a for a in model.graph.node[0].attribute if a.name == "ep_cache_context")
        held.s = place.encode()
        onnx.save(model, path)

    found = check_compiled(spoiled(compiled, tmp_path / "bad.bundle", spoil), "8-elite")
    assert not found.passed and f"opens '{place}', and the manifest names" in found.detail


def test_a_compiled_graph_that_is_no_graph_fails(compiled: Bundle, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        (folder / "8-elite/target-decode.onnx").write_bytes(b"\xff" * 99)

    found = check_compiled(spoiled(compiled, tmp_path / "bad.bundle", spoil), "8-elite")
    assert not found.passed and found.detail.startswith("8-elite/target-decode.onnx cannot be read: ")


def test_an_empty_text_is_refused(plain: Bundle, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.touch()
    with pytest.raises(InputError, match="' holds no tokens"):
        check_qualcomm(plain, Engine, ("8-elite",), str(text), QUIET)


def test_an_export_that_does_not_compile_names_the_node_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Builder.op

    def op(self: Builder, kind: str, *inputs: Any, **more: Any) -> Any:
        return honest(self, "Erf" if kind == "Sigmoid" else kind, *inputs, **more)

    monkeypatch.setattr(assemble.Builder, "op", op)
    config = ExportConfig(str(source), str(tmp_path / "x.bundle"), **SMALL, soc=("8-elite",))
    with pytest.raises(
        InputError, match=r"target-prefill.onnx does not compile for 8-elite: Erf at "
    ) as caught:
        export(config, QUIET, Engine)
    assert "model.layers.0.mlp.act_fn" in caught.value.message and "--soc" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_context_given_up_leaves_the_next_nothing(tmp_path: Path) -> None:
    def graph(op: str) -> Path:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 8)) for name in "xy"]
        made = helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, ends[:1], ends[1:])
        path = tmp_path / f"{op}.onnx"
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    def context(name: str, *ops: str) -> dict[str, int]:
        place = tmp_path / name
        place.mkdir()
        for i, op in enumerate(ops):
            qualcomm.compile_into(place / name, graph(op), SOCS["8-elite"], i == 0, i == len(ops) - 1)
        return {path.name: path.stat().st_size for path in place.iterdir()}

    alone = context("alone", "Relu", "Sigmoid")
    for ops in ("Tanh", "Erf", "Sigmoid"), ("Tanh", "Erf"), ("Erf",):
        with pytest.raises(Exception, match="default CPU EP"):
            context("-".join(ops), *ops)
    after = context("after", "Relu", "Sigmoid")
    assert set(after) == {"Relu.onnx", "Sigmoid.onnx", "after_qnn.bin"}
    assert after["after_qnn.bin"] == alone["alone_qnn.bin"]


def test_a_bundle_for_a_cpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make(tmp_path / "x.bundle", "cpu")
    assert main(["check", str(bundle.path), "--npu", "qualcomm", "-q"]) == 2
    said = f"error: {bundle.path} is for device cpu, which no NPU runs\n"
    assert capsys.readouterr().err == f"{said}hint:  export it again with --device npu\n"

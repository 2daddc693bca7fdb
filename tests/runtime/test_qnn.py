"""The native runtime on Qualcomm's emulated NPU: the same loop, the same text with and without drafts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import edgespec.runtime.machine
from edgespec.bundle import Bundle
from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.errors import BackendError
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.machine import on_npu
from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime, Settings
from edgespec.soc import SOCS
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

pytest.importorskip(
    "onnxruntime_qnn", reason="Qualcomm's compiler is not installed (EDGESPEC_QNN=1 scripts/setup)"
)

PROMPT = list(range(5, 60))
NEW = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.trained_like(tiny.family_config("llama", max_position_embeddings=2048))
    folder = tmp_path_factory.mktemp("qnn")
    (folder / "text.txt").write_text("one two three four five six seven " * 60)
    return write_directory(folder / "model", model)


def exported(source: Path, name: str, **more: str) -> Bundle:
    config = ExportConfig(
        str(source), str(source.parent / f"{name}.bundle"), draft="layers", draft_budget=32, draft_rows=200,
        context_rows=16, budget=32, block=8, widths=(2, 4), sinks=2, recent=4, **more,
    )  # fmt: skip
    return export(config, Progress(quiet=True), Engine)


@pytest.fixture(scope="module", params=["fp16", "w8a16"])
def bundle(request: pytest.FixtureRequest, source: Path) -> Bundle:
    form = request.param
    return exported(source, form, device="npu", weights=form, text=str(source.parent / "text.txt"))


def test_drafts_change_no_text_on_the_npu(bundle: Bundle) -> None:
    texts = {}
    with Runtime.open(bundle.path, 1, soc="8-elite") as runtime:
        for drafter in ("none", "ngram", "draft"):
            session, trace = runtime.session(), io.StringIO()
            how = Settings(max_new_tokens=NEW, drafter=drafter, stop_rule="fixed")
            for _ in session.stream(PROMPT, how, trace=trace):
                pass
            texts[drafter] = session.answer.tokens
            calls = [
                call for line in trace.getvalue().splitlines() for call in json.loads(line).get("calls", ())
            ]
            assert sum(call[:2] == ["target", "commit"] for call in calls) >= 2  # evictions
            if drafter == "draft":
                assert sum(session.answer.stats["accepted_by_position"]) > 0
    assert texts["none"] == texts["ngram"] == texts["draft"] and len(texts["none"]) == NEW
    if bundle.model("target").precision["linear"] != "fp16":
        return  # a random model's best two tokens are nearer than codes of its activations
    with Runtime.open(bundle.path, 1) as runtime:  # the processor's fp16 is not bitwise the NPU's
        session = runtime.session()
        for _ in session.stream(PROMPT, Settings(max_new_tokens=4, drafter="none")):
            pass
        assert session.answer.tokens[0] == texts["none"][0]


def test_compiled_graphs_are_opened_and_say_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """Contexts of one graph each: of several the emulator opens none."""
    from edgespec.exporters.qualcomm import compile_into

    soc, place = SOCS["8-elite"], tmp_path / "bundle" / "8-elite"
    shutil.copytree(bundle.path, tmp_path / "bundle")
    place.mkdir()
    (place / "compile.log").write_text("by a test")
    graphs = {g.file: f"8-elite/{g.file}" for m in bundle.manifest.models for g in m.graphs}
    for file in graphs:
        compile_into(place / Path(file).stem, bundle.file(file), soc, True, True)
    sizes = {path.name: path.stat().st_size for path in place.iterdir()}
    made = {f"8-elite/{name}": {"bytes": size, "sha256": "0" * 64} for name, size in sizes.items()}
    contexts = {"target": "8-elite/target-decode_qnn.bin", "draft": "8-elite/draft-draft_qnn.bin"}
    entry = {"soc": "8-elite", "compiler": "", "log": "8-elite/compile.log"}
    entry |= {"contexts": contexts, "graphs": graphs}
    data = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    data["files"] |= made
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(data | {"compiled": [entry]}))
    command = [str(binary(print)), "--bundle", str(tmp_path / "bundle"), "--threads", "1"]
    command += on_npu("8-elite")
    texts = []
    for more in ([], ["--compiled", "8-elite"]):
        for file in graphs if more else ():  # nothing is compiled anew
            path = tmp_path / "bundle" / file
            path.write_bytes(bytes(path.stat().st_size))
        with Process([*command, *more]) as process:
            process.ask("open", session="a")
            said = process.events("generate", session="a", tokens=PROMPT, max_new_tokens=NEW, drafter="draft")
            texts.append([token for event in said if event["event"] == "round" for token in event["tokens"]])
    assert texts[0] == texts[1] and len(texts[0]) == NEW
    for flags, message in (
        (["--compiled", "8-gen-2", *on_npu("8-gen-2")], "the bundle is not compiled for 8-gen-2"),
        (["--compiled", "8-elite"], "--compiled needs --qnn"),
    ):
        whole = [*command[:5], *flags]
        done = subprocess.run(whole, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}\n")


def test_graphs_for_a_processor_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(source, "cpu", weights="fp32").path
    assert main(["generate", str(path), "hello", "--soc", "8-elite", "-q"]) == 2
    assert capsys.readouterr().err == (
        "error: the bundle's graphs are onnx for cpu, not for an NPU\n"
        "hint:  export it again with --device npu\n"
    )


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--soc", "9-elite"], "unknown soc '9-elite'", "8-elite"),
        (["--soc", "8-elite", "--via", "sh -c"], "a device reached by --via runs its own SoC", "leave --soc"),
    ],
)
def test_what_cannot_be_is_refused(
    bundle: Bundle, flags: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(bundle.path), "hello", "-q", *flags]) == 2
    error, advice = capsys.readouterr().err.splitlines()
    assert error == f"error: {message}" and hint in advice


def test_the_package_is_named_where_it_is_missing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgespec.runtime.machine, "package", lambda name: None)
    with pytest.raises(BackendError, match="Qualcomm's compiler is not installed") as caught:
        Runtime.open(bundle.path, soc="8-elite")
    assert caught.value.hint == "pip install 'edgespec[qnn]'"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qnn", "/"], "--qnn needs --htp-arch and --soc-model"),
        (["--qnn", "/", "--htp-arch", "0", "--soc-model", "69"], "--htp-arch must be 1 to 1000"),
        (
            ["--qnn", "/", "--htp-arch", "79", "--soc-model", "69"],
            "Qualcomm's provider cannot be loaded: Failed to load library //libonnxruntime_providers_qnn.so",
        ),
    ],
)
def test_a_wrong_provider_is_refused(bundle: Bundle, flags: list[str], message: str) -> None:
    words = [str(binary(print)), "--bundle", str(bundle.path), *flags]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 2
    assert json.loads(done.stdout)["error"].startswith(message)

"""A tiny target and draft as ExecuTorch programs, end to end: the native runtime's text is that of plain
decoding under every policy, past the budget, and that of the ONNX bundle; what does not fit is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgespec import exporters
from edgespec.bundle import Bundle, creating, open_bundle
from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.errors import BackendError, BundleError
from edgespec.exporters.commit import policy_kinds, policy_module
from edgespec.policy import NAMES
from edgespec.progress import Progress
from edgespec.runtime import build
from edgespec.runtime.engine import Engine
from edgespec.runtime.program import Program
from edgespec.runtime.session import Runtime, Settings
from edgespec.spec import ModelEntry
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

pytest.importorskip("executorch", reason="ExecuTorch is not installed (EDGESPEC_EXECUTORCH=1 scripts/setup)")

from edgespec.exporters.assemble_executorch import policy_program

BUDGET, BLOCK, TOKENS = 32, 8, 60
DRAFTERS = (("ngram", "fixed"), ("draft", "fixed"), ("both", "adaedl"))
QUICK = ("keydiff", "caote(h2o)")
POLICIES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "none"]
CODE = np.random.default_rng(3)
PROMPTS = [[int(i) for i in CODE.integers(3, 264, n)] for n in (5, 50)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("executorch") / "llama", tiny.model("llama"))


@pytest.fixture(scope="module")
def exported(source: Path) -> Callable[..., Bundle]:
    """Bundles of a format; the step graphs give what every policy reads."""
    made: dict[str, Bundle] = {}

    def get(form: str = "executorch") -> Bundle:
        if form not in made:
            output = str(source.parent / f"{form}.bundle")
            config = ExportConfig(
                str(source), output, draft="layers", budget=BUDGET, block=BLOCK,
                widths=(4,), policy="h2o", draft_policy="h2o", sinks=1, recent=2, draft_budget=16,
                draft_rows=200, buckets=(16,), weights="fp32", format=form,
            )  # fmt: skip
            made[form] = exporters.export(config, Progress(quiet=True), Engine)
        return made[form]

    return get


def with_policy(bundle: Bundle, policy: str, folder: Path) -> Bundle:
    """The bundle with another policy for the target; its other files are the same ones."""
    with creating(folder) as staging:
        for name in set(bundle.manifest.files) - {"target-policy.pte"}:
            os.link(bundle.file(name), staging.path / name)
        target, draft = bundle.manifest.models
        cache = replace(target.cache, policy=policy)
        graphs = [g for g in target.graphs if g.file == "target.pte"]
        graphs += policy_program("target", target.spec, cache, staging.path)
        target = replace(target, cache=cache, graphs=tuple(graphs))
        staging.finish(replace(bundle.manifest, models=(target, draft), files={}))
    return open_bundle(folder, verify=False)


def say(runtime: Runtime, ids: list[int], **how: Any) -> list[int]:
    session = runtime.session()
    session.generate(ids, Settings(TOKENS, **how))
    session.close()
    return session.tokens[len(ids) :]


@pytest.mark.parametrize("policy", POLICIES)
def test_text_is_that_of_plain_decoding(exported: Callable[..., Bundle], policy: str, tmp_path: Path) -> None:
    bundle = exported() if policy == "h2o" else with_policy(exported(), policy, tmp_path / "bundle")
    target = bundle.model("target")
    assert target.widths_agree
    keeps_what_its_module_keeps(bundle, target)
    with Runtime.open(bundle.path, 1) as runtime:
        for ids in PROMPTS:
            plain = say(runtime, ids, drafter="none")
            assert len(ids) + len(plain) > BUDGET + 2 * BLOCK and len(set(plain)) > 1
            for drafter, rule in DRAFTERS:
                assert say(runtime, ids, drafter=drafter, stop_rule=rule) == plain, drafter


def keeps_what_its_module_keeps(bundle: Bundle, entry: ModelEntry) -> None:
    """Each method of the policy gives what its module gives eagerly."""
    program = Program(bundle.file("target-policy.pte"), None, 1)
    torch.manual_seed(0)
    for kind, bucket in policy_kinds(entry.cache):
        module, graph = policy_module(kind, entry.spec, entry.cache, "", bucket)
        (written,) = (g for g in entry.graphs if (g.kind, g.bucket) == (kind, bucket))
        given = [
            torch.randn(t.shape) if t.dtype == "float32" else torch.tensor([16]).int() for t in graph.inputs
        ]
        arrays = {t.name: tensor.numpy() for t, tensor in zip(graph.inputs, given, strict=True)}
        names = [t.name for t in graph.outputs]
        for name, found, want in zip(
            names, program.method(written).run(names, arrays), module(*given), strict=True
        ):
            np.testing.assert_allclose(found, want.numpy(), atol=1e-5, err_msg=f"{kind} {name}")


def test_text_is_that_of_the_onnx_bundle(exported: Callable[..., Bundle]) -> None:
    said = []
    for form in ("executorch", "onnx"):
        with Runtime.open(exported(form).path, 1) as runtime:
            said.append([say(runtime, ids, drafter="both") for ids in PROMPTS])
    assert said[0] == said[1]


def test_check_passes_and_a_spoilt_program_does_not(
    exported: Callable[..., Bundle], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("hello world, " * 12)
    bundle = exported().path
    words = ["check", str(bundle), "--source", str(source), "--draft-source", "layers", "--text", str(text)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "methods of ExecuTorch programs, with the manifest's tensors" in out
    for line in ("target widths: 6 graphs give the same bits", "target eviction", "draft context rows"):
        assert f"pass  {line}" in out
    assert main(["inspect", str(bundle), "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    steps = [g for g in costs["graphs"] if g["kind"] in ("prefill", "verify", "decode", "draft")]
    assert costs["format"] == "executorch" and all(g["ops"]["delegate"] == 1 for g in steps)

    with creating(tmp_path / "spoilt") as staging:  # cut off, and sealed as if it were whole
        for name in exported().manifest.files:
            shutil.copy(bundle / name, staging.path / name)
        cut = staging.path / "target.pte"
        cut.write_bytes(cut.read_bytes()[:5000])
        staging.finish(replace(exported().manifest, files={}))
    with pytest.raises(BackendError, match=r"ExecuTorch cannot .*target.pte.*\nhint:  run edgespec check"):
        Runtime.open(tmp_path / "spoilt", 1)
    assert main(["inspect", str(tmp_path / "spoilt")]) == 2
    assert "target.pte is not an ExecuTorch program" in capsys.readouterr().err


def test_a_runtime_refuses_the_other_format(exported: Callable[..., Bundle]) -> None:
    for form, other in (("executorch", "onnx"), ("onnx", "executorch")):
        start = [build.binary(print, form=other), "--bundle", exported(form).path, "--threads", "1"]
        done = subprocess.run(start, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 2
        assert done.stderr.endswith(
            f"error: the bundle's graphs are of format {form}, this runtime runs {other}\n"
            f"hint:  start {build.BINARIES[form]}, or let edgespec generate start it\n"
        )


def test_a_manifest_of_two_minds_is_refused(exported: Callable[..., Bundle], tmp_path: Path) -> None:
    for change, message in (
        ({"format": "onnx"}, r"hold the method 'prefill_8_16' in a bundle of onnx"),
        ({"format": "tflite"}, r"manifest.format: 'tflite' is none of onnx, executorch"),
    ):
        folder = tmp_path / change["format"]
        shutil.copytree(exported().path, folder)
        manifest = json.loads((folder / "manifest.json").read_text()) | change
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=message):
            open_bundle(folder)
        program = build.binary(print, form="executorch")
        done = subprocess.run([program, "--bundle", folder], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr


def test_without_the_package(
    exported: Callable[..., Bundle], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported().path
    monkeypatch.setattr(build, "package", lambda name: None)
    with pytest.raises(BackendError, match=r"executorch is not installed\nhint:  pip install 'edgespec\[ex"):
        Runtime.open(bundle, 1)

    def absent(form: str) -> None:
        raise BackendError("format executorch needs executorch, which is not installed", "use --format onnx")

    monkeypatch.setattr(exporters, "exporter", absent)
    words = ["export", str(source), "-o", str(tmp_path / "out"), "--format", "executorch"]
    assert main(words) == 2
    assert not list(tmp_path.iterdir())

"""`random:FOLDER`: a shape without weights exports for a phone, and is never taken for the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgespec.bundle import open_bundle
from edgespec.cli import main
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.runtime.engine import Engine
from tests.helpers import tiny

EXPORT = ["--device", "npu", "--weights", "int4", "--budget", "32", "--block", "8", "--widths", "2"]
EXPORT += ["--sinks", "2", "--recent", "4", "-q"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds a configuration and nothing else."""
    path = tmp_path / "seed"
    path.mkdir()
    path.joinpath("config.json").write_text(
        tiny.family_config("hyperclovax", num_hidden_layers=3, attention_bias=True).to_json_string()
    )
    return path


def test_the_shape_is_the_configuration_s_and_the_numbers_are_repeated(folder: Path) -> None:
    one, other = (open_checkpoint(f"random:{folder}") for _ in range(2))
    wanted = {n: tuple(p.shape) for n, p in tiny.trained_like(one.config).named_parameters()}
    assert {name: one.shape(name) for name in one.names()} == wanted
    assert one.source == "random:seed" and one.digest == other.digest
    for name in one.names():
        value = one.tensor(name)
        assert torch.equal(value, other.tensor(name))
        if value.dim() == 2:
            assert 0.015 < float(value.std()) < 0.025
        else:
            assert set(value.tolist()) == ({0.0} if name.endswith("bias") else {1.0})
    assert one.tokenizer.stop_ids == (2,)
    text = "안녕 hi 👍🏽\n"
    assert one.tokenizer.encoder.decode(one.tokenizer.encoder.encode(text).ids) == text
    folder.joinpath("config.json").write_text(tiny.family_config("hyperclovax").to_json_string())
    assert open_checkpoint(f"random:{folder}").digest != one.digest


def test_a_phone_s_bundle_says_what_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "b")
    assert main(["export", f"random:{folder}", "--draft", "layers", "-o", out, *EXPORT[:-1]]) == 0
    assert (
        "its weights are random: it shows speed and size, and its text means nothing"
        in capsys.readouterr().err
    )
    target = open_bundle(tmp_path / "b").model("target")
    assert target.source == "random:seed" and target.spec.family == "hyperclovax"
    assert target.precision == {"linear": "int4", "head": "fp16", "embedding": "fp16", "ends": "fp16"}
    assert main(["inspect", out, "-q"]) == 0 and "random:seed" in capsys.readouterr().out
    estimate = [
        "estimate",
        out,
        "--profile",
        "snapdragon-8-elite",
        "--prompt",
        "16",
        "--context",
        "30",
        "--json",
        "-q",
    ]
    assert main(estimate) == 0 and json.loads(capsys.readouterr().out)["tokens_per_s"] > 0
    engine = Engine(tmp_path / "b", target, threads=1)
    model = open_checkpoint(f"random:{folder}").load_model()
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7]])).logits[0, -1].numpy()
    assert np.corrcoef(engine.prefill([5, 6, 7]), wanted)[0, 1] > 0.9


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"seed holds no model\.safetensors"):
        open_checkpoint(str(folder))  # without the word, a folder without weights stays no model
    out = ["-o", str(tmp_path / "b"), "-q"]
    for argv, message in (
        (["export", "random:nowhere"], "target 'random:nowhere' does not exist"),
        (["trim", f"random:{folder}", "--samples", str(folder)], "writes nothing of meaning"),
    ):
        assert main([*argv, *out]) == 2 and message in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    assert main(["export", f"random:{folder}", *out]) == 2
    assert "hyperclovax is a mixture of experts" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()

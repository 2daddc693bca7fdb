"""The latency commands as a user types them: results, exit codes, and the two lines of an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgespec.cli import main
from tests.helpers.bundles import make

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "config.json")


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main([*argv, "-q", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_estimate_of_a_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "estimate", config, "--profile", "snapdragon-8-elite")
    assert found["schema"] == "edgespec.estimate/1" and found["precision"] == "w4a16"
    assert 1e3 / found["ttft_ms"] > 0 and found["memory_bytes"] == found["memory"]["bytes_peak"]
    kv = 2 * 16 * 8 * 64 * 4096
    assert found["bytes_moved"] == pytest.approx(486e6 + 263e6 + kv, rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(64.14, rel=0.15)  # as AI Hub publishes
    assert main(["estimate", config, "--profile", "snapdragon-8-elite", "-q"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("snapdragon-8-elite, w4a16, context 4096: predicted\n")
    assert f"decode   {found['tokens_per_s']:.1f} tok/s" in text and "waits for dispatch" in text


def test_estimate_of_speculation(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("estimate", config, "--profile", "snapdragon-8-gen-3", "--width", "4", "--be", "2.2")
    alone = said(capsys, *argv)
    drafted = said(capsys, *argv, "--draft", config)
    trimmed = said(capsys, *argv, "--draft", config, "--draft-rows", "16384")
    assert alone["tokens_per_s"] > trimmed["tokens_per_s"] > drafted["tokens_per_s"]
    assert alone["plain_tokens_per_s"] == drafted["plain_tokens_per_s"]
    assert alone["c"] == 0 and drafted["c"] == pytest.approx(1, rel=1e-4)  # a further row of the embedding
    by_chance = said(capsys, *argv[:-2], "--acceptance", "0.5")
    assert by_chance["block_efficiency"] == 1.875


def test_the_same_bytes_twice(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["estimate", config, "--profile", "tensor-g5", "-q", "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "snapdragon-8-elit"], "no profile is called 'snapdragon-8-elit'"),
        (["--precision", "w3"], "unknown precision 'w3'"),
        (["--width", "4"], "how much is accepted is not said"),
        (["--be", "2"], "nothing is drafted at width 1"),
        (["--acceptance", "0.5"], "nothing is drafted at width 1"),
        (["--be", "nan", "--width", "4"], "be nan is not 1 to 4"),
        (["--be", "2", "--acceptance", "0.5", "--width", "4"], "be and acceptance say the same thing"),
        (["--ray"], "ray is given without a search"),
        (["--search"], "how much is accepted is not said"),
        (["--trace", "none.jsonl"], "trace 'none.jsonl' is not a file"),
        (["--context", "0"], "context 0 is not 1 to 16777216"),
        (["--width", "4", "--be", "2", "--draft", "none"], "none cannot be read as a config"),
        (
            ["--width", "4", "--be", "2", "--draft", "{config}", "--draft-rows", "999999"],
            "draft_rows 999999 are",
        ),
        (["--profile", "snapdragon-8-gen-3-cpu"], "no rate of snapdragon-8-gen-3-cpu is known for int16"),
    ],
)
def test_what_cannot_be_estimated(
    config: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    argv = ["estimate", config, "--profile", "snapdragon-8-elite", *(f.format(config=config) for f in flags)]
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {message}") and lines[1].startswith("hint:  ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "int8"], "--precision is the bundle's own matter"),
        (["--width", "4", "--be", "2", "--draft", "x"], "--draft is the bundle's own matter"),
        (["--width", "4", "--be", "2", "--search"], "{bundle} is a bundle, whose settings are decided"),
    ],
)
def test_a_bundle_decides_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    bundle = str(make(tmp_path / "x.bundle").path)
    assert main(["estimate", bundle, "--profile", "tensor-g5", *flags]) == 2
    assert message.format(bundle=bundle) in capsys.readouterr().err


def test_a_trace_needs_its_bundle(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text("{}")
    assert main(["estimate", config, "--profile", "tensor-g5", "--trace", str(tmp_path / "t.jsonl")]) == 2
    assert "is no bundle\nhint:  replay a trace with the bundle" in capsys.readouterr().err


def test_profiles_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    listed = said(capsys, "profile", "list")
    assert "snapdragon-8-elite" in [one["name"] for one in listed["profiles"]]
    shown = said(capsys, "profile", "show", "exynos-2400")
    assert shown["bandwidth_peak_bytes_per_s"]["value"] == 6.83e10 and shown["energy_j_per_byte"] is None
    assert main(["profile", "show", "exynos-2400", "-q"]) == 0
    text = capsys.readouterr().out
    assert "68.3 GB/s" in text and "unknown" in text
    assert main(["profile", "show", "exynos"]) == 2
    assert "did you mean exynos-2400?" in capsys.readouterr().err


def test_a_fit_is_kept_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    found = said(capsys, "profile", "fit", "snapdragon-8-gen-3", "-o", str(path))
    assert len(found["rows"]) == 5 and found["median_left_out"] < 0.1
    shown = said(capsys, "profile", "show", str(path))
    assert shown["bandwidth_weights_bytes_per_s"]["basis"] == "fit"
    assert main(["profile", "fit", "tensor-g5"]) == 2
    assert "no row of tensor-g5 is published" in capsys.readouterr().err
    assert main(["profile", "fit", "snapdragon-8-gen-3", "-o", "x.json"]) == 2
    assert "'x.json' is no .toml file" in capsys.readouterr().err


def test_a_device_over_via_has_its_own_costs(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "x.bundle", "hi", "--profile", "tensor-g5", "--via", "ssh phone"]
    assert main(argv) == 2
    assert "a device reached by --via has its own call costs" in capsys.readouterr().err

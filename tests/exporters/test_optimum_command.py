"""`optimum-cli export edgespec`, through Optimum's own program and by its class."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.base", reason="optimum is not installed")

from edgespec.config import ExportConfig
from edgespec.exporters.optimum_command import EdgespecExport

PROGRAM = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "edgespec"]


def test_optimum_finds_the_command() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True)
    assert "usage: optimum-cli export edgespec" in done.stdout
    for field in fields(ExportConfig):
        if not field.metadata.get("positional"):
            assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["/nowhere", "-o", "x"],
            "error: target '/nowhere' does not exist\nhint:  give a model folder, a .gguf file",
        ),
        (
            ["demo", "-o", "x", "--block", "2048"],
            "error: block 2048 is larger than budget 1024\nhint:  use --block 512",
        ),
    ],
    ids=["no model", "block"],
)
def test_refusals_are_ours(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "edgespec", *words])
    commands = argparse.ArgumentParser("optimum-cli export").add_subparsers()
    command = EdgespecExport(commands, command=EdgespecExport.COMMAND)
    args = command.parser.parse_args(words)
    with pytest.raises(SystemExit) as ended:
        args.func(args).run()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(said) and err.count("\n") == 2
    assert out == "" and not list(tmp_path.iterdir())

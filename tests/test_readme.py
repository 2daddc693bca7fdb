"""The README promises only what exists: its commands, its files, its Python and its tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgespec.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]
COMMANDS = [line for line in SHELL if line]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("edgespec ")])
def test_every_edgespec_command_parses(line: str) -> None:
    """A flag that was renamed makes this fail."""
    values = vars(_parser().parse_args(shlex.split(line)[1:]))
    name, _, rest = values["command"].__name__.partition("_")
    words = [name, rest.replace("_", "-")] if rest else [name]
    assert words == shlex.split(line)[1 : 1 + len(words)]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("scripts/")])
def test_every_script_is_there_and_runs(line: str) -> None:
    """Named scripts exist with their run bit."""
    script = ROOT / shlex.split(line)[0]
    assert script.is_file() and script.stat().st_mode & 0o100


def test_no_command_is_of_another_kind() -> None:
    """Every line of a shell block is covered by one of the tests above or is an installation."""
    assert [
        c
        for c in COMMANDS
        if not c.startswith(("edgespec ", "scripts/", "pip install ", "optimum-cli export edgespec "))
    ] == []


def test_the_tree_is_the_top_level() -> None:
    """The annotated tree names every folder, and only what exists."""
    block = re.search(r"```text\n(.*?)```", TEXT, re.S)
    assert block is not None
    named = {
        line.split()[0].rstrip("/")
        for line in block.group(1).splitlines()
        if line and not line.startswith(" ")
    }
    folders = {
        p.name
        for p in ROOT.iterdir()
        if p.is_dir() and not p.name.startswith((".", "out", "__", "build", "dist"))
    }
    assert {f for f in folders if not f.endswith("egg-info")} == named


def test_the_commands_and_the_python_snippet_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real demo, as a user would after the commands above it."""
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    monkeypatch.chdir(demo)
    said: list[str] = []
    exec(compile(snippet, "README.md", "exec"), {"print": lambda *words, end="": said.append(str(words[0]))})
    assert len("".join(said[:-1])) > 5
    assert float(said[-1]) > 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the README has been run, in order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "out").mkdir()
    program = Path(sys.executable).parent
    for line in (c for c in COMMANDS if c.startswith("edgespec ")):  # optimum-cli's has a test of its own
        words = [program / "edgespec", *shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=folder, input="hi\n/quit\n", capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line
    return folder

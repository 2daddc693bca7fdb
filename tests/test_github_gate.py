"""The example workflow for GitHub Actions: its `run` lines, in order, in a repository with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgespec.bench_report import read, write
from edgespec.runtime.build import binary
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "scripts" / "github_gate.yml"
FLOW: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
SMALL = {
    "EXPORT": "--weights fp32 --budget 48 --block 16 --widths 2,4 --sinks 2 --recent 4",
    "BENCH": "--prompts prompts.jsonl --tokens 12 --threads 1",
    "PROFILES": "snapdragon-8-elite",
}
INSTALLED = "install"  # the one step that is not run: what it installs is under test


def steps(job: str) -> Iterator[tuple[str, str]]:
    """The name and the lines of every step that a runner's shell would run."""
    for step in FLOW["jobs"][job]["steps"]:
        if "run" in step and step["name"] != INSTALLED:
            yield step["name"], step["run"]


def run(lines: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Lines as GitHub's runner runs them, with the workflow's own env but for the sizes."""
    env = {**os.environ, **FLOW["env"], **SMALL, **more}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", "-e", "-o", "pipefail", "-c", lines]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model, prompts and the baseline that the file's head says how to make."""
    binary(print)
    folder = tmp_path_factory.mktemp("repository")
    write_directory(folder / FLOW["env"]["MODEL"], tiny.model("llama"))
    texts = ["hello hello", "well well well", "a b a b", "help me", "no no", "so", "la la la", "x y z"]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    (folder / FLOW["env"]["BASELINE"]).parent.mkdir()
    comment = [
        line[1:].split("     (")[0].strip() for line in FILE.read_text().splitlines() if line[:6] == "#     "
    ]
    assert [line.split()[1] for line in comment] == ["export", "bench"]
    identity = "-c user.name=x -c user.email=x@example.org"
    made = run(
        "\n".join([*comment, f"git init -q . && git add -A && git {identity} commit -qm base"]), folder
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_the_steps_of_predicted_pass_and_then_fail(repository: Path) -> None:
    names = []
    for name, lines in steps("predicted"):
        names.append(name)
        summary = repository / "summary.md"
        done = run(lines, repository, GITHUB_STEP_SUMMARY=str(summary))
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    assert names == ["export", "measure and predict", "gate"]
    assert done.stdout.splitlines()[-1].startswith("::notice title=edgespec::passed: ")
    assert summary.read_text().startswith("### edgespec: passed: ")
    upload = FLOW["jobs"]["predicted"]["steps"][-1]["with"]["path"].split()
    assert [(repository / name).stat().st_size > 0 for name in upload] == [True] * 4

    head = read(repository / "head.json")
    (target,) = head.counted
    heavy = tuple(replace(s, figures={**s.figures, "rows": s.figures["rows"] + 1}) for s in target.steps)
    write(replace(head, counted=(replace(target, steps=heavy),)), repository / "head.json")
    done = run(dict(steps("predicted"))["gate"], repository)
    assert done.returncode == 1
    assert done.stdout.startswith(
        "::error title=edgespec regression::target decode 1, budget 48: cache rows: "
    )


def test_the_steps_of_measured_take_turns(repository: Path) -> None:
    for path in ("base.bundle", "head.bundle"):  # what the other job and the baseline left
        subprocess.run(["rm", "-rf", str(repository / path)], check=True)
    sha = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True
    )
    for name, lines in steps("measured"):
        done = run(lines, repository, BASE_SHA=sha.stdout.strip())
        # Equal bundles. What a busy machine makes of the last step's times is no business of a test.
        assert done.returncode == 0 or name == "gate", f"{name}\n{done.stdout}\n{done.stderr}"
    assert done.returncode in (0, 1)
    worse = [line for line in done.stdout.splitlines() if "title=edgespec regression" in line]
    assert all("99%, 8 pairs" in line.replace("%25", "%") for line in worse)  # never an exact figure
    base, new = read(repository / "turns.base.json"), read(repository / "turns.json")
    assert (
        base.run == new.run
        and base.bundle.manifest_sha256
        and len(base.samples) == len(new.samples) == 8 * 2 * 3
    )


def test_every_expression_is_one_that_the_test_replaces() -> None:
    text = FILE.read_text("utf-8")
    assert text.count("${{") == 1 and FLOW["env"]["BASE_SHA"] == "${{ github.event.pull_request.base.sha }}"
    assert FLOW[True] == "pull_request"  # YAML 1.1 reads the key `on` as true

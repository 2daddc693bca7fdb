"""What a wheel puts into site-packages: one name, and all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"edgespec": "edgespec", "exporters": "edgespec/exporters", "runtime": "edgespec/runtime"}
FOLDERS["profiles"] = "edgespec/profiles"
REGISTER = "optimum/commands/register"  # where optimum-cli looks for the commands of others


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, check=True, cwd=source, capture_output=True)
    (path,) = (source / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_only_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist() if name != f"{REGISTER}/edgespec.py"}
    assert top == {"edgespec", "edgespec-0.1.0.dist-info"}


def test_every_module_and_data_file_is_there(wheel: zipfile.ZipFile) -> None:
    there = set(wheel.namelist())
    for folder, place in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".toml", ".txt", ".json", ".html", ".cpp", ".h")
                or path.name == "py.typed"
            ):
                inside = path.relative_to(ROOT / folder).as_posix()
                where = REGISTER if path.parent.name == "optimum_register" else place
                assert f"{where}/{path.name if where == REGISTER else inside}" in there
    assert "edgespec/py.typed" in there


def test_the_core_runs_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import edgespec.cli, edgespec.profiles, edgespec.runtime; print(edgespec.cli.__file__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)

"""The native library's own tests, compiled and run; and what a machine without a compiler is told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edgespec.errors import BackendError
from edgespec.runtime import build

SOURCES = Path(__file__).parent / "native"


def test_native_tests(tmp_path: Path) -> None:
    sanitize = os.environ.get("EDGESPEC_SANITIZE") == "1"
    build.build(tmp_path / "b", build.onnx_library(), sanitize, f"-DEDGESPEC_TESTS={SOURCES}")
    done = subprocess.run(
        ["ctest", "--output-on-failure"], cwd=tmp_path / "b", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "100% tests passed, 0 tests failed out of 6" in done.stdout


def test_help_and_flags() -> None:
    program = build.binary(print)
    run = lambda *flags: subprocess.run([program, *flags], capture_output=True, text=True)  # noqa: E731
    shown = run("--help").stdout
    assert all(op in shown for op in ("generate", "snapshot", "tune", "Exit codes"))
    for flags, message in (
        ((), "no bundle is named"),
        (("--bundle",), "--bundle needs a value"),
        (("--colour", "x"), "unknown flag --colour"),
        (("--bundle", "x", "--threads", "0"), "--threads must be 1 to 256"),
        (("--bundle", "/nowhere"), "/nowhere/manifest.json cannot be read"),
    ):
        done = run(*flags)
        assert done.returncode == 2
        assert f"error: {message}\nhint:" in done.stderr


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BackendError, match="no C\\+\\+ compiler and CMake found") as caught:
        build.binary(print)
    assert "apt install g++ cmake" in caught.value.hint
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_compiler_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "native"
    sources.mkdir()
    for path in build.NATIVE.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    (sources / "tune.cpp").write_text("#error no more\n")
    monkeypatch.setattr(build, "NATIVE", sources)
    with pytest.raises(BackendError, match=r"does not compile: .*no more"):
        build.build(tmp_path / "b", build.onnx_library())


def test_a_wheel_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel, _, inside = build.JSON_HEADER
    with pytest.raises(BackendError, match="is not the file that edgespec was tested with"):
        build.unpacked(wheel, "0" * 64, inside)
    assert not (tmp_path / "cache" / "edgespec" / ("headers-" + "0" * 16)).exists()

"""Building in the cache: whole or not at all, one winner, and two lines where the machine cannot."""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path

import pytest

from edgespec.errors import BackendError, InputError
from edgespec.runtime import build


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("ONNXRUNTIME_INCLUDE_DIR", "EDGESPEC_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "edgespec"


def compiled(folder: Path, *more: object) -> None:
    (folder / build.BINARY).write_text("program")


def test_it_is_compiled_once_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", compiled)
    notes: list[str] = []
    first = build.binary(notes.append)
    assert first.read_text() == "program" and first.is_relative_to(cache)
    assert build.binary(notes.append) == first
    assert notes == ["compiling the native runtime (once, about a minute)"]
    assert list(cache.iterdir()) == [first.parent]
    assert build.binary(notes.append, sanitize=True) != first


def test_a_folder_without_its_binary_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", compiled)
    path = build.binary(print)
    path.rename(path.with_name("moved"))
    assert build.binary(print).read_text() == "program"


def test_two_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)

    def slowly(folder: Path, *more: object) -> None:
        compiled(folder)
        both.wait()

    monkeypatch.setattr(build, "build", slowly)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.binary(lambda note: None))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and found[0].is_file()
    assert list(cache.iterdir()) == [found[0].parent]


def test_a_build_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *more: object) -> None:
        compiled(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build", fail)
    with pytest.raises(KeyboardInterrupt):
        build.binary(print)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="cannot be made: Not a directory") as caught:
        build.binary(print)
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_given_headers(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = build.onnx_library()
    plain = build.key(library, False, "")
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"holds no onnxruntime_c_api\.h"):
        build.binary(print)
    (tmp_path / "onnxruntime_c_api.h").write_text("")
    assert build.given_headers() == str(tmp_path)
    assert build.key(library, False, "") != plain


def test_what_the_compiler_said_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (
        ("c++", "#!/bin/sh\n"),
        ("cmake", "#!/bin/sh\necho 'x.cpp:1: error: odd'\nexit 1\n"),
    ):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(build, "unpacked", lambda *wheel: tmp_path)
    with pytest.raises(BackendError, match=r"does not compile: x\.cpp:1: error: odd") as caught:
        build.binary(print)
    log = cache / "build.log"
    assert str(log) in caught.value.hint
    assert "-DONNXRUNTIME_LIBRARY=" in log.read_text() and "error: odd" in log.read_text()
    assert list(cache.iterdir()) == [log]


def test_only_headers_inside_the_folder_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in ("inc/a.h", "inc/b/c.hpp", "inc/run.py", "other/d.h", "inc/../../evil.h", "/inc/e.h"):
            wheel.writestr(name, "text")
    build.unpack(tmp_path / "x.whl", "inc", tmp_path / "out" / "deep")
    found = {os.path.relpath(p, tmp_path) for p in tmp_path.rglob("*.h*")}
    assert found == {"out/deep/a.h", "out/deep/b/c.hpp"}


def test_no_connection(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(BackendError, match=r"nlohmann-json==3\.12\.0, of which .* cannot be downloaded"):
        build.unpacked(*build.JSON_HEADER)
    assert list(cache.iterdir()) == []

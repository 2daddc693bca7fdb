"""Compiles the native runtime, once for each processor, into the user's cache; its sources are package data.

Needs a C++17 compiler and CMake. For this machine the ONNX Runtime library is the installed package's, for
another processor that of its wheel; the two headers that no wheel of it ships come out of pinned wheels that
carry them. Downloaded wheels are hash-checked and never installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from edgespec.errors import BackendError, InputError

NATIVE = Path(__file__).parent / "native"
BINARY = "edgespec-runtime"
BINARIES = {"onnx": BINARY, "executorch": f"{BINARY}-executorch"}  # by the format of the bundles that it runs
# wheel, its SHA-256, the folder of the headers inside
ONNX_HEADER = (
    "amd-quark==0.13",
    "3b3e58a4cbbcff20d27815b641aa4de4d698efde3c782306cb4a6a05bcf55c8c",
    "quark/onnx/operators/custom_ops/include/onnxruntime-1.17.0/onnxruntime/core/session",
)
JSON_HEADER = (
    "nlohmann-json==3.12.0",
    "5f6132720fb25d0d70bf0742f8397b49a540dcc193e7312a914f6aa49f054810",
    "nlohmann_json/include",
)
# The library for another processor: its wheel, the folder inside, and the prefix of Debian's cross compiler
CROSS = {
    "aarch64": (
        (
            "onnxruntime==1.32.0",
            "2303372a85299b6757b0e11e1cbf13e410ddf7e10c37f4b37e99d1c90e7daf7c",
            "onnxruntime/capi",
        ),
        ("manylinux_2_27_aarch64", "manylinux_2_28_aarch64"),
        "aarch64-linux-gnu-",
    ),
}
SYSTEM = ("/usr/include", "/usr/local/include", "/opt/homebrew/include")
INSTALL = "install a C++17 compiler and CMake (Debian: apt install g++ cmake; macOS: xcode-select --install)"


def binary(note: Callable[[str], None], sanitize: bool = False, arch: str = "", form: str = "onnx") -> Path:
    """The runtime's binary for bundles of a format, compiled first if these sources never were; `note` is
    told so.

    `arch`: for another Linux machine's processor, one of CROSS. The library lies beside the binary, as
    libonnxruntime.so.1. BackendError where a tool, a header or the library is missing, or the compiler
    refuses.
    """
    arch = "" if arch == platform.machine() else arch
    sanitize = sanitize or (not arch and os.environ.get("EDGESPEC_SANITIZE") == "1")
    library = cross_library(arch) if arch else onnx_library()
    executorch = None if arch else package("executorch")
    if form == "executorch" and executorch is None:
        if arch:
            why = f"no runtime of ExecuTorch programs can be compiled for {arch!r} here"
            raise InputError(why, "use an ONNX bundle")
        raise BackendError(
            "the bundle is an ExecuTorch program, and executorch is not installed",
            "pip install 'edgespec[executorch]'",
        )
    home = cache() / f"runtime-{key(library, sanitize, arch)}"
    if not (home / BINARY).exists():
        shutil.rmtree(home, ignore_errors=True)  # somebody took the binary out of it
        note(f"compiling the native runtime{arch and f' for {arch}'} (once, about a minute)")
        with appearing(home) as made:
            own = [f"-DEXECUTORCH_DIR={executorch}"] if executorch else []
            build(made, library, sanitize, *cross_flags(arch), *own)
    return home / BINARIES[form]


@contextmanager
def appearing(home: Path) -> Iterator[Path]:
    """A folder to fill that becomes `home` by one rename; of two processes, the faster one's folder stays."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            yield made
            try:
                made.rename(home)
            except OSError:
                if not home.is_dir():
                    raise
    except OSError as error:
        hint = "make room there, or set XDG_CACHE_HOME to a folder that you can write"
        raise BackendError(f"{home} cannot be made: {error.strerror}", hint) from error


def build(folder: Path, library: Path, sanitize: bool = False, *more: str, target: str = "all") -> None:
    """Configure and compile into this folder; `more` are further arguments of CMake's first call."""
    cmake = shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "c++")))):
        raise BackendError("the native runtime cannot be compiled: no C++ compiler and CMake found", INSTALL)
    configure = [
        cmake, "-S", str(NATIVE), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
        f"-DONNXRUNTIME_INCLUDE_DIR={given_headers() or system_headers() or unpacked(*ONNX_HEADER)}",
        f"-DONNXRUNTIME_LIBRARY={library}",
        f"-DNLOHMANN_INCLUDE_DIR={unpacked(*JSON_HEADER)}",
        f"-DEDGESPEC_SANITIZE={'ON' if sanitize else 'OFF'}",
        *more,
    ]  # fmt: skip
    compile = [cmake, "--build", str(folder), "--target", target, "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, compile):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log = cache() / "build.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            faults = [line for line in lines if "error" in line.lower()] or lines[-3:]
            raise BackendError(
                f"the native runtime does not compile: {' | '.join(faults[:3])}",
                f"use g++ 9, clang 10 or newer; all of its output is in {log}",
            )


def given_headers() -> str:
    """The folder that ONNXRUNTIME_INCLUDE_DIR names, or nothing; InputError if the header is not in it."""
    folder = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "")
    if folder and not (Path(folder) / "onnxruntime_c_api.h").is_file():
        raise InputError(
            f"ONNXRUNTIME_INCLUDE_DIR {folder!r} holds no onnxruntime_c_api.h",
            "name the folder with that file, or unset ONNXRUNTIME_INCLUDE_DIR",
        )
    return folder and os.path.abspath(folder)


def system_headers() -> str:
    """The folder where a package of the system keeps the header, or nothing."""
    inside = ("", "onnxruntime", "onnxruntime/core/session")
    folders = [Path(root) / sub for root in SYSTEM for sub in inside]
    return next((str(f) for f in folders if (f / "onnxruntime_c_api.h").is_file()), "")


def cross_flags(arch: str) -> list[str]:
    """CMake's flags for another processor; BackendError where its compiler is missing."""
    if not arch:
        return []
    prefix = CROSS[arch][2]
    if shutil.which(f"{prefix}g++") is None:
        raise BackendError(
            f"no compiler for {arch}: {prefix}g++ was not found",
            f"Debian: apt install g++-{prefix.rstrip('-')}",
        )
    return [
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={arch}",
        f"-DCMAKE_CXX_COMPILER={prefix}g++",
    ]


def cross_library(arch: str) -> Path:
    """ONNX Runtime's shared library for another processor."""
    if arch not in CROSS:
        raise InputError(f"no runtime can be compiled for {arch!r} here", f"known: {', '.join(CROSS)}")
    wheel, platforms, _ = CROSS[arch]
    which = [
        "--python-version=311",
        "--implementation=cp",
        "--abi=cp311",
        *(f"--platform={p}" for p in platforms),
    ]
    return next(unpacked(*wheel, *which).glob("libonnxruntime.so.*"))


def onnx_library() -> Path:
    """The shared library inside the installed onnxruntime package, which is not imported."""
    spec = find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else Path("nowhere")
    found = [*sorted(folder.glob("libonnxruntime.so.*")), *sorted(folder.glob("libonnxruntime.*.dylib"))]
    if not found:
        raise BackendError("onnxruntime is not installed", "pip install 'edgespec[onnx]'")
    return found[-1]


def package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported; None where there is none."""
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def unpacked(wheel: str, sha256: str, inside: str, *which: str) -> Path:
    """The folder with a wheel's headers or library; the wheel is downloaded if need be and never installed.

    `which`: pip's flags for a wheel of another platform.
    """
    home = cache() / f"headers-{sha256[:16]}"
    if not home.exists():
        with appearing(home) as made:
            file = download(wheel, sha256, made.parent, *which)
            unpack(file, inside, made)
    return home


def download(wheel: str, sha256: str, folder: Path, *which: str) -> Path:
    """The wheel's file, as its pinned hash wants it."""
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "-d", str(folder), *which, wheel,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    files = sorted(folder.glob("*.whl"))
    if done.returncode or not files:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise BackendError(
            f"{wheel}, of which the native runtime needs a part, cannot be downloaded: {last}",
            "connect once; later runs take it from the cache",
        )
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != sha256:
        raise BackendError(
            f"{files[0].name} is not the file that edgespec was tested with", "check your package index"
        )
    return files[0]


def unpack(file: Path, inside: str, folder: Path) -> None:
    """The headers and libraries below a folder of the wheel."""
    with zipfile.ZipFile(file) as wheel:
        for name in wheel.namelist():
            path = PurePosixPath(name)
            wanted = path.suffix in (".h", ".hpp") or path.name.startswith("libonnxruntime.so")
            if not path.is_relative_to(inside) or not wanted or ".." in path.parts:
                continue
            place = folder / path.relative_to(inside)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(wheel.read(name))


def cache() -> Path:
    """Where binaries and headers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgespec"


def key(library: Path, sanitize: bool, arch: str) -> str:
    """A name for what a binary is made of."""
    made = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        made.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = (
        library,
        distribution("onnxruntime").version,
        ONNX_HEADER,
        JSON_HEADER,
        arch or platform.machine(),
        sanitize,
        given_headers() or system_headers(),
        distribution("executorch").version if not arch and package("executorch") else "",
    )
    made.update(repr(facts).encode())
    return made.hexdigest()[:16]

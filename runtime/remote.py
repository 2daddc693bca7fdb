"""A runtime on another machine, reached through a command such as `adb shell` or `ssh phone`.

The command gets one more word, a line for a POSIX shell over there (cat, mkdir, mv, rm, uname, wc; sha256sum
where there is one), and its streams are that line's. Knows files and processes; nothing of graphs or text.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgespec.bundle import MANIFEST, Bundle, digest
from edgespec.errors import BackendError, InputError
from edgespec.progress import Progress
from edgespec.runtime import build

ANDROID_FOLDER = "/data/local/tmp/edgespec"  # where a phone lets its shell run programs
ANSWERS = 60.0  # seconds for a short line
SLOWEST = 100_000  # bytes a second, the slowest copy that is waited for
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
RENAME = "rename the bundle's folder: letters, digits and _.+- only"


class Remote:
    """A folder on another machine with the runtime's binary, its library and bundles in it.

    `via`: the command's words. `folder`: an absolute path, or one below where the command's shells start.
    """

    def __init__(self, via: str, folder: str = "") -> None:
        try:
            self.via = shlex.split(via)
        except ValueError as error:
            raise InputError(f"--via {via!r} is not a command: {error}", "close its quotes") from None
        if not self.via:
            raise InputError("--via is empty", 'name a command that runs a shell line, such as "adb shell"')
        android = Path(self.via[0]).name == "adb"
        self.folder = folder or (ANDROID_FOLDER if android else "edgespec")

    def shell(self, line: str, given: Path | None = None) -> str:
        """What a line over there prints; `given` is its standard input. BackendError where it fails."""
        timeout = ANSWERS + (given.stat().st_size / SLOWEST if given else 0)
        said = f"{shlex.join(self.via)} {line!r}"
        try:
            with open(given or "/dev/null", "rb") as stdin:
                done = subprocess.run([*self.via, line], stdin=stdin, capture_output=True, timeout=timeout)
        except OSError as error:
            raise BackendError(
                f"{self.via[0]} cannot be started: {error.strerror}", "correct --via"
            ) from None
        except subprocess.TimeoutExpired:
            raise BackendError(f"{said} took over {timeout:.0f} s", "is the device awake?") from None
        out, fault = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
        if done.returncode:
            last = (fault or out).splitlines()[-1:] or ["nothing was printed"]
            raise BackendError(f"{said} ended with {done.returncode}: {last[0]}", "try it by hand")
        return out

    def machine(self) -> tuple[str, str]:
        """Its processor and its system, such as ("aarch64", "Android")."""
        words = self.shell("uname -m; uname -o 2>/dev/null || uname -s").split()
        if len(words) < 2:
            raise BackendError(
                f"{shlex.join(self.via)} does not answer uname", "--via must run a POSIX shell"
            )
        return words[0].replace("arm64", "aarch64"), words[1].rpartition("/")[2]

    def push(self, bundle: Bundle, program: Path, progress: Progress) -> dict[str, int]:
        """Copy binary, library and bundle; what is there already, byte for byte, stays. Counts of files.

        The manifest is removed first and copied last, so that a broken copy is no bundle.
        """
        files = {path.name: path for path in (program, *libraries(program))}
        place = remote_name(bundle.path)
        names = [*sorted(bundle.manifest.files), MANIFEST]
        files |= {f"{place}/{name}": bundle.path / name for name in names}
        folders = sorted({str(Path(name).parent) for name in files})
        self.shell(
            f"mkdir -p {shlex.quote(self.folder)} && {self.inside()} && mkdir -p {shlex.join(folders)}"
        )
        known = self.hashes(list(files))
        listed = {f"{place}/{name}": entry.sha256 for name, entry in bundle.manifest.files.items()}
        wanted = {name: listed.get(name) or digest(path.resolve()).sha256 for name, path in files.items()}
        late = [name for name in files if known.get(name) != wanted[name]]
        manifest = f"{place}/{MANIFEST}"
        if any(name.startswith(f"{place}/") for name in late):
            self.shell(f"{self.inside()} && rm -f {shlex.quote(manifest)}")
            late = [*(name for name in late if name != manifest), manifest]
        total = sum(files[name].stat().st_size for name in late)
        with progress.stage(f"copy {total / 2**20:.0f} MiB") as advance:
            done = 0
            for name in late:
                self.copy(files[name], name, wanted[name])
                done += files[name].stat().st_size
                advance(done, total)
        return {"copied": len(late), "kept": len(files) - len(late), "bytes": total}

    def copy(self, file: Path, name: str, sha256: str) -> None:
        """One file, under its name only once it is whole."""
        part, there = shlex.quote(f"{name}.part"), shlex.quote(name)
        self.shell(f"{self.inside()} && cat > {part}", file)
        arrived = self.hashes([f"{name}.part"]).get(f"{name}.part")
        size = self.shell(f"{self.inside()} && wc -c < {part}").strip()
        if size != str(file.stat().st_size) or arrived not in (None, sha256):
            raise BackendError(
                f"{name} arrived damaged ({size} bytes of {file.stat().st_size})",
                "the command must pass bytes on unchanged: adb shell -T, ssh -T",
            )
        mode = " && chmod 755 " + part if name == build.BINARY else ""
        self.shell(f"{self.inside()}{mode} && mv -f {part} {there}")

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 by name, of those that exist; empty where the machine has no sha256sum."""
        out = self.shell(f"{self.inside()} && {{ sha256sum {shlex.join(names)} 2>/dev/null || true; }}")
        pairs = (line.split(maxsplit=1) for line in out.splitlines())
        return {pair[1].lstrip("*"): pair[0] for pair in pairs if len(pair) == 2}

    def keep_table(self, bundle: Path, table: dict[str, Any], temporary: Path) -> None:
        """Put a table of call costs beside the bundle over there."""
        file = temporary / "table.json"
        file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        name = table_name(bundle)
        self.copy(file, name, digest(file).sha256)

    def command(self, bundle: Path, threads: int, tuned: bool) -> list[str]:
        """How to start the runtime over there, on the copy of this bundle."""
        words = [f"./{build.BINARY}", "--bundle", remote_name(bundle)]
        words += ["--threads", str(threads)] if threads else []
        table = f'$(test -f {table_name(bundle)} && echo "--table {table_name(bundle)}")' if tuned else ""
        return [*self.via, f"{self.inside()} && LD_LIBRARY_PATH=. exec {shlex.join(words)} {table}"]

    def inside(self) -> str:
        """A line's beginning: go to the folder."""
        return f"cd {shlex.quote(self.folder)}"


def program_for(machine: tuple[str, str], given: str, note: Callable[[str], None]) -> Path:
    """The binary for a processor and system: compiled here where it can be, or out of the folder `given`."""
    processor, system = machine
    if given:
        path = Path(given) / build.BINARY
        if not path.is_file() or not libraries(path):
            raise InputError(
                f"{given} does not hold {build.BINARY} and libonnxruntime.so*", "build it as the README says"
            )
        return path
    if "Linux" not in system:
        raise InputError(
            f"no binary for {system} on {processor} is compiled here",
            "build it as the README says (for Android: its NDK), then name its folder: --binary FOLDER",
        )
    return build.binary(note, arch=processor)


def libraries(program: Path) -> list[Path]:
    """The ONNX Runtime library beside a binary, by the name that the binary asks for."""
    return sorted(program.parent.glob("libonnxruntime.so*"))[-1:]


def remote_name(bundle: Path) -> str:
    """The bundle's folder over there: its own name."""
    if not NAME.fullmatch(bundle.name):
        raise InputError(f"{bundle.name!r} is no name for a remote shell", RENAME)
    return bundle.name


def table_name(bundle: Path) -> str:
    """Its table of call costs over there."""
    return f"{remote_name(bundle)}.tune.json"

"""A device reached through a shell command: here a local shell, and an emulated aarch64 one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgespec.bundle import Bundle, open_bundle
from edgespec.cli import main
from edgespec.errors import BackendError, EdgespecError, InputError
from edgespec.runtime import build
from edgespec.runtime.remote import Remote, program_for
from edgespec.runtime.session import Runtime, Settings

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def bundle(opened: Callable[..., Runtime], tmp_path: Path) -> Bundle:
    made = opened(policy="keydiff", draft="layers", draft_budget=32, draft_rows=200).bundle
    return open_bundle(shutil.copytree(made.path, tmp_path / "tiny.bundle"))


def push(bundle: Bundle, capsys: pytest.CaptureFixture[str], via: str, to: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["push", str(bundle.path), "--via", via, "--to", str(to), "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)


def test_push_then_generate_there(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "a device's folder"
    first = push(bundle, capsys, "sh -c", there)
    assert first["files"]["kept"] == 0 and first["same_text"] and first["difference"] == ""
    table = json.loads((there / f"{bundle.path.name}.tune.json").read_text())
    assert table["widths_agree"] and set(table["verify"]) == {"1", "2", "4"}

    copy = there / bundle.path.name
    for path in bundle.path.rglob("*"):
        assert not path.is_file() or (copy / path.relative_to(bundle.path)).read_bytes() == path.read_bytes()
    (copy / "target.data").write_bytes(b"x")  # a copy that somebody broke
    again = push(bundle, capsys, "sh -c", there)
    assert (again["files"]["copied"], again["files"]["kept"]) == (2, first["files"]["copied"] - 2)

    say = ["generate", str(bundle.path), TEXT, "--max-new-tokens", "12", "--json", "-q"]
    assert main(say) == 0
    here = json.loads(capsys.readouterr().out)
    assert main([*say, "--via", "sh -c", "--to", str(there)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == here["text"]
    assert answer["stats"]["table"] == f"{bundle.path.name}.tune.json"


def fake(tmp_path: Path, line: str) -> str:
    """A command that stands between us and a shell."""
    program = tmp_path / "bridge"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("tr 'e' 'E' | sh -c \"$1\"", "arrived damaged", "adb shell -T"),
        ("exit 255", "ended with 255: nothing was printed", "try it by hand"),
        ("echo error: device offline >&2; exit 1", "ended with 1: error: device offline", "try it by hand"),
        ("true", "does not answer uname", "must run a POSIX shell"),
        ('case "$1" in uname*) echo riscv64 GNU/Linux;; esac', "compiled for 'riscv64'", "known: aarch64"),
        ('case "$1" in uname*) echo aarch64 Android;; esac', "no binary for Android on aarch64", "--binary"),
    ],
)
def test_a_device_that_cannot(bundle: Bundle, tmp_path: Path, line: str, message: str, hint: str) -> None:
    via, there = fake(tmp_path, line), tmp_path / "there"
    with pytest.raises(EdgespecError, match=message) as caught:
        remote = Remote(via, str(there))
        remote.push(bundle, program_for(remote.machine(), "", print), _silent())
    assert hint in caught.value.hint
    assert not list(there.rglob("manifest.json"))  # nothing there looks like a bundle


def test_what_is_typed_wrong(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for via, message in (
        ("", "--via is empty"),
        ("adb 'shell", "is not a command: No closing quotation"),
        (str(tmp_path / "nothing"), "nothing cannot be started: No such file"),
    ):
        assert main(["push", str(bundle.path), "--via", via, "-q"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="does not hold edgespec-runtime"):
        program_for(("aarch64", "Android"), str(tmp_path), print)
    odd = tmp_path / "a bundle; rm -r x"
    shutil.copytree(bundle.path, odd)
    assert main(["push", str(odd), "--via", "sh -c", "--to", str(tmp_path / "t"), "-q"]) == 2
    assert "is no name for a remote shell\nhint:  rename the bundle's folder" in capsys.readouterr().err


def test_generate_before_push_says_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        Runtime.open(bundle.path, remote=Remote("sh -c", str(tmp_path / "none")))
    assert "none" in caught.value.message and "edgespec push" in caught.value.hint


# What ONNX Runtime's library reads of a processor when it is loaded; an emulator shows the host's otherwise.
CPUINFO = """processor : 0
Features : fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x0
CPU part : 0xd08
CPU revision : 3
"""
SYSROOT = Path("/usr/aarch64-linux-gnu")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not qemu or not shutil.which("aarch64-linux-gnu-g++") or not SYSROOT.is_dir():
        pytest.skip("needs qemu-user and g++-aarch64-linux-gnu (Debian packages)")
    root = tmp_path_factory.mktemp("aarch64")
    (root / "lib").symlink_to(SYSROOT / "lib")
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    cpus = root / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    for name in ("present", "possible", "kernel_max"):
        (cpus / name).write_text("0\n")
    return [qemu, "-L", str(root)]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_aarch64_speaks_the_same_text(
    opened: Callable[..., Runtime], emulator: list[str], tmp_path: Path, weights: str
) -> None:
    """Its kernels may round a row of a wide call otherwise: then the device keeps to one width."""
    program = [*emulator, str(build.binary(print, arch="aarch64"))]
    assert subprocess.run([*program, "--version"], capture_output=True, text=True).stdout == "0.1.0\n"
    runtime = opened(policy="keydiff", draft="layers", draft_budget=32, draft_rows=200, weights=weights)
    ids = runtime.encode_raw(TEXT)
    table = tmp_path / "table.json"
    with Runtime.open(runtime.bundle.path, 1, command=program) as arm:
        difference = arm.process.ask("check")["difference"]
        table.write_text(json.dumps(arm.tune(1, lambda done, total: None)))
    assert json.loads(table.read_text())["widths_agree"] == (difference == "")
    how = Settings(max_new_tokens=48, drafter="draft", stop_rule="fixed")
    with Runtime.open(runtime.bundle.path, 1, command=[*program, "--table", str(table)]) as arm:
        plain = arm.session().generate(ids, replace(how, drafter="none"))
        assert len(plain.tokens) > 8
        for drafter in ("draft", "ngram", "both"):
            assert arm.session().generate(ids, replace(how, drafter=drafter)).tokens == plain.tokens
    if weights == "fp32":  # no near tie in this text
        assert plain.tokens == runtime.session().generate(ids, how).tokens


def _silent() -> Any:
    from edgespec.progress import Progress

    return Progress(quiet=True)

"""`edgespec push`: a bundle and the runtime to a device, and what they do there."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgespec.bundle import open_bundle
from edgespec.errors import InputError
from edgespec.progress import Progress
from edgespec.runtime.remote import Remote, program_for
from edgespec.runtime.session import Runtime, Settings

QUESTION = "Name three colours."
TOKENS = 24
RUNS = 5


@dataclass(frozen=True)
class Pushed:
    """What arrived and how it ran.

    `difference`: where the widths of the target differ in their bits over there; such a device keeps to one
    width. `same_text`: greedy speculative text is plain text.
    """

    machine: str
    folder: str
    files: dict[str, int]
    difference: str
    same_text: bool
    text: str
    tokens_per_s: float
    bytes_rss_peak: int
    table: dict[str, Any]
    flags: str

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        widths = (
            f"differ ({self.difference}): every call has one width" if self.difference else "agree bitwise"
        )
        same = "is its plain text" if self.same_text else "DIFFERS from its plain text"
        return [
            f"device   {self.machine}, {self.folder}",
            f"files    {self.files['copied']} copied, {self.files['kept']} there already",
            f"widths   {widths}",
            f"text     speculative text {same}: {self.text!r}",
            f"speed    {self.tokens_per_s:.1f} tokens/s plain, {self.bytes_rss_peak / 2**20:.0f} MiB at peak",
        ]


def push(path: str, via: str, to: str, binary: str, threads: int, progress: Progress) -> Pushed:
    """Copy, check, tune; see `Pushed`. Nothing on the device is started that does not end.

    `binary`: a folder with a runtime that was built for the device; else it is compiled here.
    """
    remote = Remote(via, to)
    with progress.stage("checksums"):
        bundle = open_bundle(path)
    if bundle.manifest.format != "onnx":
        raise InputError(
            f"{path} holds ExecuTorch programs, whose runtime is not pushed yet",
            "push a bundle that was exported with --format onnx",
        )
    machine = remote.machine()
    program = program_for(machine, binary, progress.note)
    files = remote.push(bundle, program, progress)
    with Runtime.open(bundle.path, threads, remote=remote, tuned=False) as runtime:
        with progress.stage("widths on the device"):
            difference = runtime.process.ask("check")["difference"]
        with progress.stage("call costs on the device") as advance:
            table = runtime.tune(RUNS, advance) | {"cpu": " ".join(machine)}
    with tempfile.TemporaryDirectory() as temporary:
        remote.keep_table(bundle.path, table, Path(temporary))
    with (
        progress.stage("text on the device"),
        Runtime.open(bundle.path, threads, remote=remote) as runtime,
    ):
        drafted, plain = (
            runtime.session().generate(QUESTION, Settings(max_new_tokens=TOKENS, drafter=drafter))
            for drafter in ("auto", "none")
        )
    return Pushed(
        " ".join(machine), remote.folder, files, difference, plain.tokens == drafted.tokens, plain.text,
        plain.stats["tokens_per_s"], plain.stats["bytes_rss_peak"], table,
        f"--via {shlex.quote(via)}" + (f" --to {shlex.quote(to)}" if to else ""),
    )  # fmt: skip

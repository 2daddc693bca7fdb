"""What the user sees while waiting: one line a stage on stderr, with its name and time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Advance(Protocol):
    """Told how much of a stage is done; `total` 0 means that nobody knows."""

    def __call__(self, done: int, total: int) -> None: ...


class Progress:
    """Reports stages: `with progress.stage("prefill graph") as advance: ...; advance(3, 30)`.

    A finished stage is one line; on a terminal a bar stands there meanwhile. `quiet` prints nothing.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Time a stage; it is printed when it ends, and says so when it fails."""
        if self.quiet:
            yield _nothing
            return
        start = time.monotonic()
        bar = _Bar(name) if self.stream.isatty() else None
        word = "failed after"
        try:
            yield bar.advance if bar else _nothing
            word = ""
        finally:
            if bar:
                bar.close()
            self.note(f"{name:<32} {word:>13} {time.monotonic() - start:6.1f} s")

    def note(self, text: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)


class _Bar:
    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn(f"{name:<32}"), BarColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bars.add_task(name, total=None)
        self.bars.start()

    def advance(self, done: int, total: int) -> None:
        self.bars.update(self.task, completed=done, total=total or None)

    def close(self) -> None:
        self.bars.stop()


def _nothing(done: int, total: int) -> None:
    """Nobody watches."""

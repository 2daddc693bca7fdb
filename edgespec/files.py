"""A file that appears whole or not at all, and a stream that goes nowhere for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replaced(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a file beside `path`, then put it in its place; nothing stays where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def written_whole(path: Path, text: str) -> None:
    """The same for a text."""
    replaced(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def discarded(descriptor: int) -> Iterator[None]:
    """What native libraries write to this stream of the process (1: standard output, 2: error) is dropped."""
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)

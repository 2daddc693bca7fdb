"""A file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
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

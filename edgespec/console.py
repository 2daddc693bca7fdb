"""What all commands share: results on stdout, parts that need an extra, files opened before the slow step."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any, NoReturn, TextIO

from edgespec.errors import BackendError, InputError
from edgespec.progress import Progress


def verified(path: str, progress: Progress) -> Any:
    """An opened bundle whose checksums hold."""
    from edgespec.bundle import open_bundle

    with progress.stage("checksums"):
        return open_bundle(path)


def load(module: str, name: str, extra: str = "export") -> Any:
    """A part that needs an extra, or a BackendError that names the extra."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgespec"):
            raise
        raise BackendError(f"{error.name} is not installed", f"pip install 'edgespec[{extra}]'") from None


def print_json(command: str, result: dict[str, Any]) -> None:
    """Print a command's result as one object with its schema."""
    print(json.dumps({"schema": f"edgespec.{command}/1", **result}, indent=1, allow_nan=False))


class Terminated(KeyboardInterrupt):
    """Somebody else ends the program; Ctrl-C may only end an answer."""


def terminated(number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM."""
    raise Terminated


def written(path: str) -> TextIO:
    """A text file opened for writing, or an InputError."""
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        hint = "give another file"
        raise InputError(f"{path} cannot be written: {error.strerror}", hint) from None

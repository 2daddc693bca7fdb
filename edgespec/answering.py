"""What the commands that let a model speak share: the runtime that a config asks for, and its settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from edgespec.config_answering import Answering
from edgespec.console import load
from edgespec.progress import Progress


def opened(config: Answering, progress: Progress, costs: Any = None) -> Any:
    """The runtime over the config's bundle, here or on a device; `costs` is another table of call costs."""
    runtime_type = load("edgespec.runtime.session", "Runtime", extra="onnx")
    remote_type = load("edgespec.runtime.remote", "Remote", extra="onnx")
    remote = remote_type(config.via, config.to) if config.via else None
    return runtime_type.open(
        config.bundle, config.threads, note=progress.note, remote=remote, costs=costs, soc=config.soc
    )


def give_sight(runtime: Any) -> None:
    """Let a runtime make pictures of images, where its bundle reads any."""
    for entry in runtime.bundle.manifest.vision if runtime.sight is None else ():
        sight = load("edgespec.exporters.images", "Sight", extra="vision")
        runtime.sight = sight(runtime.bundle.path / entry.processor, entry)


def settings(config: Answering) -> Any:
    """How to generate, as far as the config says."""
    settings_type = load("edgespec.runtime.session", "Settings", extra="onnx")
    values = {f.name: getattr(config, f.name) for f in fields(settings_type) if hasattr(config, f.name)}
    return settings_type(**values | ({"drafter": "none"} if getattr(config, "no_draft", False) else {}))

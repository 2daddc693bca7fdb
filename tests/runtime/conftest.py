"""Tiny exported bundles, opened in the native runtime: what the tests of sessions and of faults share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("session") / "llama", tiny.model("llama"))


@pytest.fixture(scope="session")
def opened(source: Path) -> Iterator[Callable[..., Runtime]]:
    """Runtimes over bundles of a tiny model, one for each way of exporting."""
    binary(print)
    made: dict[str, Runtime] = {}

    def get(family: str = "llama", **more: Any) -> Runtime:
        name = "-".join([family, *(f"{k}={v}" for k, v in more.items())]).replace("(", "").replace(")", "")
        name = name.replace(", ", ".").replace(" ", "")
        if name not in made:
            model = source.parent / family
            if not model.exists():
                write_directory(model, tiny.model(family))
            given: dict[str, Any] = {"budget": 48, "block": 16, "widths": (2, 4), "weights": "fp32", **more}
            config = ExportConfig(
                str(model), str(source.parent / f"{name}.bundle"), sinks=2, recent=4, **given
            )
            export(config, Progress(quiet=True), Engine)
            made[name] = Runtime.open(config.output, threads=1)
        return made[name]

    yield get
    for runtime in made.values():
        runtime.close()

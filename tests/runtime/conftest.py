"""Tiny exported bundles, opened in the native runtime, some that read images: what several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.images import Sight
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime
from tests.helpers import tiny, tiny_vlm
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


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Runtime, Path]]]:
    """Runtimes over bundles of tiny vision-language models, with the checkpoints they came from."""
    binary(print)
    place = tmp_path_factory.mktemp("seeing")
    made: dict[str, tuple[Runtime, Path]] = {}

    def get(kind: str, splits: bool = False, **more: Any) -> tuple[Runtime, Path]:
        name = "-".join([kind, str(splits), *(f"{k}={v}" for k, v in more.items())])
        if name not in made:
            source = place / f"{kind}-{splits}"
            if not source.exists():
                source.mkdir()
                tiny_vlm.folder(source, kind, splits)
            if "sees" in more:  # rows of a picture that the draft sees
                more["draft"] = str(tiny_vlm.draft(place / f"{len(made)}-draft", source, more.pop("sees")))
            given: dict[str, Any] = {"budget": 128, "block": 32, "widths": (2, 4), "weights": "fp32", **more}
            config = ExportConfig(str(source), str(place / str(len(made))), **given)
            bundle = export(config, Progress(quiet=True), Engine)
            runtime = Runtime.open(bundle.path, threads=1)
            (entry,) = bundle.manifest.vision
            runtime.sight = Sight(bundle.path / entry.processor, entry)
            made[name] = runtime, source
        return made[name]

    yield get
    for runtime, _ in made.values():
        runtime.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two images of shapes and sizes of their own."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in (("a", (40, 60, 3)), ("b", (60, 30, 3))):
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder / "a.png", folder / "b.png"

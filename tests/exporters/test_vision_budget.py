"""A bundle's image encoder under a budget of FLOPs: `edgespec export --vision-flops`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import export
from edgespec.exporters.images import Pixels
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny_vision, tiny_vlm
from tests.helpers.checkpoints import tiny_model, write_directory

SMALL: dict[str, Any] = {"budget": 64, "block": 32, "widths": (2,), "weights": "fp32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, images, and its encoder's selectors."""
    folder = tmp_path_factory.mktemp("budget")
    (folder / "llava").mkdir()
    tiny_vlm.folder(folder / "llava", "llava")
    tiny_vision.images(folder / "images")
    given = ["--images", str(folder / "images"), "-o", str(folder / "selectors"), "--steps", "3", "--quiet"]
    assert main(["vision", "train-selector", str(folder / "llava"), *given]) == 0
    return folder


@pytest.mark.parametrize("method", ["merge", "tosa"])
def test_a_budget_is_shared_out_as_for_the_encoder_alone(made: Path, tmp_path: Path, method: str) -> None:
    """`vision export --flops` of the same model, images and selectors names the same patches a layer."""
    images, selectors = str(made / "images"), str(made / "selectors")
    given: dict[str, Any] = {"vision_flops": 0.8, "vision_images": images, "vision_method": method}
    given |= {"vision_selectors": selectors} if method == "tosa" else {}
    config = ExportConfig(str(made / "llava"), str(tmp_path / "bundle"), **given, **SMALL)
    (entry,) = export(config.check(), Progress(quiet=True), Engine).manifest.vision
    words = ["--method", method, "--flops", "0.8", "--images", images, "-o", str(tmp_path / "out"), "-q"]
    words += ["--selectors", selectors] if method == "tosa" else []
    assert main(["vision", "export", str(made / "llava"), *words]) == 0
    facts = json.loads((tmp_path / "out" / "vision.json").read_text())
    assert entry.keeps == facts["keeps"] and facts["flops"] <= 0.8 * facts["flops_whole"]


def test_a_budget_that_makes_no_sense_is_refused(made: Path, tmp_path: Path) -> None:
    """By name, and before the target's graphs are made."""
    flops: dict[str, Any] = {"vision_flops": 0.8, "vision_images": str(made / "images")}

    def refused(said: str, source: Path = made / "llava", **more: Any) -> None:
        config = ExportConfig(str(source), str(tmp_path / "out"), **SMALL, **more)
        with pytest.raises(InputError, match=said):
            export(config.check(), Progress(quiet=True), None)
        assert not (tmp_path / "out").exists()

    text = write_directory(tmp_path / "text", tiny_model("llama"))
    refused("reads no images", text, **flops)
    refused("chosen on images", vision_flops=0.8)
    refused("nothing is chosen by them", vision_images=str(made / "images"))
    refused("both say how many", **flops, vision_keep=0.5)
    refused("chosen by selectors", **flops, vision_method="tosa")
    refused("no patch is left out", **flops, vision_selectors=str(made / "selectors"))
    for wrong in (1.5, -0.1, float("nan")):
        refused("vision_flops .* is not 0 to 1", **flops | {"vision_flops": wrong})
    refused("of their FLOPs at least", **flops | {"vision_flops": 0.2})
    refused("no folder of images", **flops | {"vision_images": str(tmp_path / "none")})
    (tmp_path / "none").mkdir()
    refused("holds no images", **flops | {"vision_images": str(tmp_path / "none")})
    shutil.copytree(made / "llava", tmp_path / "other")
    processor = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    processor["crop_size"] = {"height": 14, "width": 14}
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(processor))
    refused("makes pictures of .*14", tmp_path / "other", **flops)


def test_an_encoder_alone_is_shown_an_image_as_one_picture(tmp_path: Path) -> None:
    """Also where the processor would cut it up for prompts: a choice on 16 images is one on 16 pictures."""
    (tmp_path / "cuts").mkdir()
    pixels = Pixels(tiny_vlm.folder(tmp_path / "cuts", "idefics3", splits=True))
    assert pixels([Image.new("RGB", (56, 40)), Image.new("RGB", (20, 30))]).shape == (2, 3, 28, 28)

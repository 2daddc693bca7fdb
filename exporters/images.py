"""Image files as a model's own processor wants them. Knows Pillow and Transformers' processors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from edgespec.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROCESSOR = "preprocessor_config.json"
MOST_PIXELS = 2**26  # a larger image is a mistake or an attack: it would take 200 MB as bytes alone


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and those below it, by name; InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of images", "name one")
    if found := sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        return found
    raise InputError(f"{folder} holds no images", f"files of these kinds are read: {', '.join(SUFFIXES)}")


def open_image(path: Path) -> Image.Image:
    """An image upright and in RGB, over white where it was transparent; InputError where it is none.

    Its size is known, and refused where it is above MOST_PIXELS, before a pixel of it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Any = Image.open(path)
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
    except Image.DecompressionBombError as error:  # Pillow's own limit, or ours
        hint = f"make it smaller: at most {MOST_PIXELS:,} pixels are read"
        raise InputError(f"{path.name} is too large ({error})", hint) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path.name} is no image that can be read ({error})", "save it again as a PNG"
        ) from None
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Pixels:
    """A model directory's own processor in its Pillow form, for square images of one size."""

    def __init__(self, directory: Path) -> None:
        if not (directory / PROCESSOR).is_file():
            hint = f"copy the model's {PROCESSOR} beside its config.json"
            raise InputError(f"{directory} has no {PROCESSOR}: how its images are made is not known", hint)
        logging.getLogger("transformers").setLevel(logging.ERROR)  # a line about torchvision for every class
        from transformers import AutoImageProcessor

        try:
            self.processor = AutoImageProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_fast=False
            )
        except Exception as error:  # whatever a processor raises about its file
            raise InputError(f"{PROCESSOR} cannot be used ({error})", "download it again") from None

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """[n,3,S,S] float32; InputError where the processor makes no square image."""
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        if not isinstance(found, torch.Tensor) or found.dim() != 4 or found.shape[2] != found.shape[3]:
            raise InputError(
                f"{PROCESSOR} makes {tuple(found.shape)} of an image, not one square",
                "let it crop, or set a square size",
            )
        return found.float()

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return int(self([Image.new("RGB", (64, 48))]).shape[-1])

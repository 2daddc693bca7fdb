"""Image files, and prompts with images, as a model's own processor makes them. Knows Pillow and Transformers'
processors.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from edgespec.errors import InputError
from edgespec.exporters.tokenizer import optional_json
from edgespec.spec import VisionEntry

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROCESSOR = "preprocessor_config.json"
# What a processor is made of: every one that a folder has goes into a bundle, and no other.
PROCESSOR_FILES = (
    PROCESSOR,
    "processor_config.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
AGAIN = "use the processor that came with the checkpoint, and export again"
MOST_PIXELS = 2**26  # a larger image is a mistake or an attack: it would take 200 MB as bytes alone


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and those below it, by name; InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of images", "name one")
    if found := sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        return found
    raise InputError(f"{folder} holds no images", f"files of these kinds are read: {', '.join(SUFFIXES)}")


def open_image(source: Path | BytesIO, name: str = "") -> Image.Image:
    """An image upright and in RGB, over white where it was transparent; InputError where it is none. `name`
    says in errors what a source in memory is.

    Its size is known, and refused where it is above MOST_PIXELS, before a pixel of it is decoded.
    """
    name = source.name if isinstance(source, Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Any = Image.open(source)
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
    except Image.DecompressionBombError as error:  # Pillow's own limit, or ours
        hint = f"make it smaller: at most {MOST_PIXELS:,} pixels are read"
        raise InputError(f"{name} is too large ({error})", hint) from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image that can be read", "save it again as a PNG") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name} is no image that can be read ({error})", "save it again as a PNG") from None
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
        self.processor = processor_of(directory, "AutoImageProcessor")
        if getattr(self.processor, "do_image_splitting", False):
            self.processor.do_image_splitting = False  # one picture an image: cut up, one has up to 65

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """[n,3,S,S] float32; InputError where the processor makes no square image."""
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        if isinstance(found, torch.Tensor) and found.dim() == 5:  # of a processor that could split an image
            found = found.flatten(0, 1)
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


class Sight:
    """A vision-language bundle's processor: a prompt and its images as token ids and pictures."""

    def __init__(self, folder: Path, entry: VisionEntry) -> None:
        """`folder` holds the processor's files."""
        self.entry, self.processor = entry, processor_of(folder, "AutoProcessor")

    @property
    def slot(self) -> str:
        """The text that stands for an image in a prompt."""
        return str(self.processor.image_token)

    def __call__(self, text: str, images: Sequence[tuple[str, bytes]]) -> tuple[list[int], np.ndarray]:
        """Token ids, and pictures [n,3,size,size] float32 in the order of their rows among the ids, from a
        text and image files: their names and contents.

        An image may become several pictures; each has `rows` ids of the image's token. InputError where the
        text has not one slot for each image, or the processor makes other pictures than the graph takes.
        """
        slots = text.count(self.slot)
        if slots != len(images):
            said = (
                f"the prompt has {slots} slots for an image ({self.slot}) and {len(images)} images are given"
            )
            raise InputError(said, f"write {self.slot} where an image belongs, once for each")
        return self.made(text, [open_image(BytesIO(data), name) for name, data in images])

    def tried(self) -> None:
        """Nothing, or an InputError where images of two shapes do not become what the graph takes."""
        for size in ((640, 480), (48, 64)):
            self.made(self.slot, [Image.new("RGB", size)])

    def made(self, text: str, opened: list[Image.Image]) -> tuple[list[int], np.ndarray]:
        """The same of images that are open, one for each slot."""
        try:
            made = self.processor(text=text, images=opened, return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # whatever a processor raises about a prompt
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the model's processor refuses the prompt ({first})", "try another image"
            ) from None
        ids, size = made["input_ids"][0].tolist(), self.entry.size
        pictures = made["pixel_values"].float().reshape(-1, *made["pixel_values"].shape[-3:]).numpy()
        if pictures.shape[1:] != (3, size, size):
            given = " x ".join(map(str, pictures.shape[1:]))
            raise InputError(
                f"the processor makes pictures of {given}, the graph takes 3 x {size} x {size}", AGAIN
            )
        if ids.count(self.entry.token) != len(pictures) * self.entry.rows:
            found = ids.count(self.entry.token)
            raise InputError(
                f"the processor gives {len(pictures)} pictures {found} rows, not {self.entry.rows} each",
                AGAIN,
            )
        return ids, np.ascontiguousarray(pictures)


def processor_of(folder: Path, kind: str) -> Any:
    """A folder's processor in its Pillow form; `kind`: which of Transformers' classes reads it."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a line about torchvision for every class
    import transformers

    known = {"local_files_only": True, "trust_remote_code": False}
    try:
        whole = optional_json(folder / "processor_config.json")
        if kind == "AutoProcessor" and whole.get("processor_class") == "SmolVLMProcessor":
            return without_video(folder, whole, known)
        return getattr(transformers, kind).from_pretrained(folder, backend="pil", **known)
    except InputError:
        raise
    except Exception as error:  # whatever a processor raises about its file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{PROCESSOR} cannot be used ({first})", "download it again") from None


def without_video(folder: Path, whole: dict[str, Any], known: dict[str, Any]) -> Any:
    """SmolVLM's processor but for videos, which need torchvision: of images Idefics3's makes the same."""
    from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor

    images = AutoImageProcessor.from_pretrained(folder, backend="pil", **known)
    tokenizer = AutoTokenizer.from_pretrained(folder, **known)
    return Idefics3Processor(images, tokenizer, image_seq_len=whole.get("image_seq_len", 169))

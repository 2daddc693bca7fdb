"""Images in a conversation: the messages that show them, and what of them a model has yet to see."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from edgespec.errors import InputError
from edgespec.runtime.text import Message, in_parts
from edgespec.spec import VisionEntry

File = tuple[str, bytes]  # an image file's name and content


class Sight(Protocol):
    """A model's own processor (edgespec.exporters.images.Sight): a text, images -> ids and pictures."""

    @property
    def slot(self) -> str: ...
    def __call__(self, text: str, images: Sequence[File]) -> tuple[list[int], Any]: ...


def read(images: Sequence[Path | str | File]) -> list[File]:
    """Image files, those that are read already as they are; InputError where one cannot be read."""
    found: list[File] = []
    for image in images:
        if isinstance(image, tuple):
            found.append(image)
            continue
        path = Path(image)
        try:
            found.append((path.name, path.read_bytes()))
        except OSError as error:
            raise InputError(
                f"{path} is no image that can be read ({error.strerror})", "name another"
            ) from None
    return found


def content(prompt: str, images: Sequence[File], slot: str) -> Any:
    """A message's content: its words, and its images before them or where the words have their marks.

    An image is in its message whole, so that a conversation goes on without the file, and as text, so that
    a snapshot can hold it.
    """
    if not images:
        return prompt
    parts: list[Message] = [
        {"type": "image", "name": name, "image": base64.b64encode(data).decode()} for name, data in images
    ]
    words = marked(prompt, len(images), slot).split(slot)
    made = [{"type": "text", "text": words[0]}] if words[0] else []
    for part, word in zip(parts, words[1:], strict=True):
        made += [part, *([{"type": "text", "text": word}] if word else [])]
    return made


def marked(prompt: str, images: int, slot: str) -> str:
    """The prompt with a mark for each image, all of them in front where it has none."""
    count = prompt.count(slot)
    if count not in (0, images):
        raise InputError(
            f"the prompt has {count} marks for an image ({slot}) and {images} images are given",
            "write a mark for each image, or none at all",
        )
    return prompt if count else slot * images + prompt


def images_of(messages: Sequence[Message]) -> list[File]:
    """The images that messages show, in order."""
    parts = (part for m in in_parts(messages) for part in m["content"])
    return [(part["name"], base64.b64decode(part["image"])) for part in parts if part["type"] == "image"]


def names(pictures: Sequence[Any]) -> list[str]:
    """What tells one picture from another."""
    return [sha256(picture.tobytes()).hexdigest() for picture in pictures]


def shared(
    ids: Sequence[int], same: int, pictures: Sequence[str], seen: Sequence[str], entry: VisionEntry
) -> tuple[int, int]:
    """How many of the ids, the first `same` of which are absorbed, stay, and how many pictures.

    All pictures have the same ids: those that differ from what was `seen` are cut off, and none in two.
    """
    places = [i for i, token in enumerate(ids) if token == entry.token]
    starts = places[:: entry.rows]
    for number, start in enumerate(starts):
        whole = places[(number + 1) * entry.rows - 1] < same
        if start < same and not (whole and number < len(seen) and pictures[number] == seen[number]):
            return start, number
    return same, sum(start < same for start in starts)

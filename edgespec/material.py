"""What the evaluation's tasks are built from: a bundle's tokenizer and chat template, filler text, questions.

Knows tokens and text, no model: everything here is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers

from edgespec.bundle import Bundle
from edgespec.errors import BundleError, InputError

TEXTS = ("wikitext", "calibration")  # WikiText-2, test and validation
HOLE = "[[filler {}]]"
Render = Callable[[str, Sequence[dict[str, str]], str, str], str]


@dataclass(frozen=True)
class Material:
    """A tokenizer, a chat template ("" without one) and the text that fills contexts.

    `render` puts messages into a chat template (edgespec.runtime.text.render).
    """

    tokenizer: tokenizers.Tokenizer
    template: str
    bos_id: int | None
    eos: str
    text: str
    render: Render

    def ids(self, text: str) -> list[int]:
        """The tokens of a piece of text, without a start token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def start(self) -> list[int]:
        """What every plain text begins with: the model's start token, where it has one."""
        return [] if self.bos_id is None else [self.bos_id]

    @cached_property
    def document(self) -> list[int]:
        """The whole text's tokens."""
        return self.ids(self.text)

    @cached_property
    def sentences(self) -> list[list[int]]:
        """The text's whole sentences, each with a space before it."""
        found = []
        for line in self.text.splitlines():
            if not line.startswith("=") and len(line) > 40:
                found += re.split(r"(?<=[.!?]) (?=[A-Z\"])", line)
        return [self.ids(" " + sentence) for sentence in found if "<unk>" not in sentence]

    @cached_property
    def questions(self) -> list[dict[str, Any]]:
        """The shipped question set: passages, each with questions whose answer it holds once."""
        data = json.loads(files("edgespec").joinpath("questions.json").read_text(encoding="utf-8"))
        return data["passages"]

    def filler(self, count: int, first: int) -> list[list[int]]:
        """Whole sentences from number `first` on, going round, of so many tokens; the last one is cut."""
        if not self.sentences:
            raise InputError("the text has no whole sentence", "give a longer text with --text")
        found: list[list[int]] = []
        while count > 0:
            found.append(self.sentences[(first + len(found)) % len(self.sentences)][:count])
            count -= len(found[-1])
        return found

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages as the model was trained to see them, ready for the assistant's turn."""
        if not self.template:
            turns = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages]
            return "".join(turns) + "Assistant:"
        start = "" if self.bos_id is None else self.tokenizer.id_to_token(self.bos_id) or ""
        return self.render(self.template, messages, start, self.eos)


def open_material(bundle: Bundle, text: str | None, render: Render) -> Material:
    """The material of a bundle, over the shipped texts or a text file of the user's."""
    entry = bundle.manifest.tokenizer
    try:
        tokenizer = tokenizers.Tokenizer.from_str(bundle.file(entry.tokenizer).read_text(encoding="utf-8"))
        form = entry.chat_template and bundle.file(entry.chat_template).read_text(encoding="utf-8")
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BundleError(
            f"the tokenizer or its chat template cannot be read: {error}", "export the bundle again"
        ) from error
    end = tokenizer.id_to_token(entry.stop_ids[0]) if len(entry.stop_ids) == 1 else ""
    return Material(tokenizer, form, entry.bos_id, end or "", plain(read(text)), render)


def read(text: str | None) -> str:
    """A user's text file, or the shipped texts one after the other."""
    if text is None:
        folder = files("edgespec.exporters")
        return "\n".join(folder.joinpath(f"{name}.txt").read_text(encoding="utf-8") for name in TEXTS)
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {text!r} cannot be read: {error}", "give a UTF-8 text to --text") from None


def plain(text: str) -> str:
    """WikiText's spaced-out tokens as text is usually written; other text hardly changes."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" +([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) +", r"\1", text)
    text = re.sub(r" ('s|n't|'re|'ll|'ve|'m|'d)\b", r"\1", text)
    text = re.sub(r'" ([^"\n]*) "', r'"\1"', text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())

"""Between text and tokens: chat templates in a sandbox, and token ids streamed as text that is final."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import tokenizers
from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgespec.errors import BundleError, InputError

Message = dict[str, Any]  # role, and content: a text, or a list of parts (image, text) as processors have it
UNKNOWN = "\ufffd"  # what incomplete UTF-8 decodes to


class Streamed:
    """Text of tokens as they come: complete characters only, and nothing that may turn into a stop string."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.held = ""
        self.window: list[int] = []  # the tokens of the last text given out, then those after it
        self.given = 0  # how many of these were given out
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is final now; after a stop string nothing more comes."""
        if self.stopped:
            return ""
        self.window.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNKNOWN):
            return ""
        self.window, self.given = self.window[self.given :], len(self.window) - self.given
        return self._release(piece, last=False)

    def end(self) -> str:
        """What was held back, without a character that never became whole."""
        rest = self._piece().rstrip(UNKNOWN)
        self.window, self.given = [], 0
        return "" if self.stopped else self._release(rest, last=True)

    def _piece(self) -> str:
        """The text that the window's new tokens add.

        Its old ones are decoded along: some decoders take the first space off a text. Lengths are compared,
        not texts, since a broken byte may spoil the whole run of byte tokens before it.
        """
        before = self.tokenizer.decode(self.window[: self.given], skip_special_tokens=True)
        return self.tokenizer.decode(self.window, skip_special_tokens=True)[len(before) :]

    def _release(self, piece: str, last: bool) -> str:
        self.held += piece
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        keep = 0 if last else max((overlap(self.held, stop) for stop in self.stops), default=0)
        return self._take(len(self.held) - keep)

    def _take(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)


class _Generation(Extension):
    """Transformers' `{% generation %}` marks what the assistant said; its text is the block's own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: Sequence[Message], bos: str, eos: str = "") -> str:
    """A chat template over messages, ready for the assistant's turn.

    As Transformers renders it, in a sandbox: a template is data from a checkpoint. BundleError where it
    cannot be rendered, InputError where it refuses the conversation.
    """
    names: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=True, **names)
    except InputError:
        raise
    except Exception as error:  # a template is a program: it may divide by zero, or recurse
        raise BundleError(
            f"the chat template cannot be rendered: {error}", "use --raw, or export with another template"
        ) from error


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The same messages, every content a list of parts: templates of models that read images ask for it."""
    text = lambda content: [{"type": "text", "text": content}]  # noqa: E731
    return [m | {"content": text(m["content"])} if isinstance(m["content"], str) else m for m in messages]


@lru_cache(8)
def _compiled(template: str) -> Template:
    """The template's program, compiled once: that takes as long as hundreds of prompts."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses this conversation: {message}", "use --raw")

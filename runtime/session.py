"""A conversation over a bundle: text in, text out, by a plain greedy decode loop through the graphs.

Tokenizer, chat template and stop ids come from the bundle; graphs and caches are the Engine's.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgespec.bundle import Bundle, open_bundle
from edgespec.errors import BundleError, InputError
from edgespec.runtime.engine import Engine


@dataclass(frozen=True)
class Answer:
    """A generated text, why it ended (`stop`, `length` or `positions`) and what it took."""

    text: str
    tokens: tuple[int, ...]
    ended: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


class Session:
    """One conversation with a bundle's target."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self.bundle = bundle
        self.engine = Engine(bundle.path, bundle.model("target"), threads)
        entry = bundle.manifest.tokenizer
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(
                bundle.file(entry.tokenizer).read_text(encoding="utf-8")
            )
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(
                f"{entry.tokenizer} is no tokenizer: {error}", "export the bundle again"
            ) from error
        self.template = (
            bundle.file(entry.chat_template).read_text(encoding="utf-8") if entry.chat_template else ""
        )

    @classmethod
    def open(cls, path: Path | str, threads: int = 0) -> Session:
        """A session over the bundle in this folder."""
        return cls(open_bundle(path, verify=False), threads)

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """The prompt's ids: through the chat template, or `raw` with the model's start token in front."""
        if self.template and not raw:
            return self.tokenizer.encode(self.render(prompt), add_special_tokens=False).ids
        bos = self.bundle.manifest.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def render(self, prompt: str) -> str:
        """The chat template with one user message, in a sandbox: a template is data from a checkpoint."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        bos = self.bundle.manifest.tokenizer.bos_id
        names = {"bos_token": "" if bos is None else self.tokenizer.id_to_token(bos) or "", "eos_token": ""}
        try:
            template = environment.from_string(self.template)
            return template.render(
                messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **names
            )
        except TemplateError as error:
            raise BundleError(
                f"the chat template cannot be rendered: {error}", "use --raw, or export with another template"
            ) from error

    def generate(self, prompt: str, tokens: int = 128, raw: bool = False) -> Answer:
        """Greedy text after the prompt.

        InputError where prompt and answer cannot fit the model's positions or cache.
        """
        ids = self.encode(prompt, raw)
        engine, stops = self.engine, set(self.bundle.manifest.tokenizer.stop_ids)
        engine.reset()
        start = time.perf_counter()
        logits = engine.prefill(ids)
        out, ended = [int(logits.argmax())], "length"
        begun = time.perf_counter()
        while out[-1] not in stops and len(out) < tokens:
            if engine.position + 1 > engine.spec.positions or (
                engine.cache.policy == "none" and not engine.free
            ):
                ended = "positions"
                break
            out.append(engine.step(out[-1]))
        if out[-1] in stops:
            ended = "stop"
            out.pop()
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        return Answer(text, tuple(out), ended, len(ids), begun - start, time.perf_counter() - begun)


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses this conversation: {message}", "use --raw")

"""Transformers' assisted generation with a bundle's own checkpoints: the baseline beside our drafts.

Its confidence threshold (arXiv 2405.04304) ends a draft after a token that the draft finds unlikely. Models
are the checkpoints in fp32, the draft with its whole head; calls are counted where they happen, by hooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.utils import is_sklearn_available, logging

from edgespec.bundle import Bundle
from edgespec.errors import InputError
from edgespec.exporters.check import find_source
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.tokenizer import asked
from edgespec.prompts import Prompt

# Transformers' own defaults, given so that a checkpoint's generation settings cannot change them.
DRAFTING = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


def how() -> str:
    """What was run, for the report; Transformers moves its threshold only where scikit-learn is there."""
    threshold = DRAFTING["assistant_confidence_threshold"]
    moved = "moved by scikit-learn's ROC curve" if is_sklearn_available() else "fixed"
    return (
        f"fp32, greedy, at most {DRAFTING['num_assistant_tokens']} drafts, confidence {threshold} ({moved}), "
        "the draft's whole head; c is the bundle's, times are not measured"
    )


def sources(bundle: Bundle, source: str | None, draft_source: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoints of a bundle's target and draft; InputError where one is not here or is another's."""
    if len(bundle.manifest.models) < 2:
        raise InputError(
            f"{bundle.path.name} has no draft for the baseline transformers", "export it with --draft"
        )
    found: list[Checkpoint] = []
    for entry, word, name in zip(
        bundle.manifest.models, (source, draft_source), ("--source", "--draft-source"), strict=True
    ):
        checkpoint = find_source(bundle, entry, word, found[0] if found else None)
        if checkpoint is None:
            raise InputError(
                f"the {entry.name}'s checkpoint {word or entry.source} is not here", f"name it with {name}"
            )
        found.append(checkpoint)
    return found[0], found[1]


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, a stop token included, and what a benchmark counts of it."""

    tokens: tuple[int, ...]
    stats: dict[str, Any]


class Assisted:
    """The two models, loaded, as a benchmark's runtime: a context manager with sessions of one answer each.

    `c` is what its answers' MBSU reckons with, `render` fills a chat template, `threads` are PyTorch's.
    """

    def __init__(
        self, target: Checkpoint, draft: Checkpoint, c: float, threads: int, render: Callable[..., str]
    ) -> None:
        self.tokenizer, self.c, self.render = target.tokenizer, c, render
        torch.set_num_threads(threads)
        logging.set_verbosity_error()  # it warns of how it calls its own draft
        self.target, self.draft = target.load_model(), draft.load_model()
        self.draft.generation_config.update(**DRAFTING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        del self.target, self.draft

    def session(self) -> Self:
        """Itself: nothing stays from answer to answer."""
        return self

    def close(self) -> None:
        """End a session."""

    def generate(self, text: str, tokens: int, trace: object = None) -> Answer:
        """The greedy answer to a prompt, of at most so many tokens. There is no trace to write.

        As in our loop, the prompt's call gives the first token and every later target call verifies a draft;
        here the first of those absorbs the prompt again.
        """
        ((ids, _),) = asked(self.tokenizer, [Prompt(text, "")], self.render) or [([], "")]
        if not ids:
            raise InputError("the prompt holds no token", "leave it out")
        start = time.perf_counter()
        said, first_s = self._greedy(ids, 1), time.perf_counter() - start
        with counted(self.target) as verified, counted(self.draft) as drafted:
            if tokens > 1 and said[-1] not in self.tokenizer.stop_ids:
                said = self._greedy(said, tokens - 1, assistant_model=self.draft)
        written = said[len(ids) :]
        drafts = [c[len(ids) + 1 :] if i == 0 else c[1:] for i, c in enumerate(verified)]
        judged, stood = positions(written[1:], drafts)
        return Answer(
            tuple(written),
            {
                "tokens_prompt": len(ids),
                "tokens_new": len(written),
                "verify_calls": len(verified),
                "draft_calls": len(drafted),
                "drafted_by_position": judged,
                "accepted_by_position": stood,
                "time_first_token_s": first_s,
                "time_decode_s": 0.0,
                "time_graphs_s": 0.0,
                "bytes_rss_peak": 0,
                "c": self.c,
            },
        )

    def _greedy(self, ids: Sequence[int], tokens: int, **more: Any) -> list[int]:
        """The text with at most so many tokens more."""
        given, stops = torch.tensor([list(ids)]), list(self.tokenizer.stop_ids)
        made = self.target.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            **more,
        )
        found: list[int] = made[0].tolist()
        return found


@contextmanager
def counted(model: Any) -> Iterator[list[list[int]]]:
    """The token rows of every call of a model, as they come."""
    calls: list[list[int]] = []

    def note(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = named["input_ids"] if "input_ids" in named else args[0]
        calls.append(rows[0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def positions(text: Sequence[int], rounds: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """How many drafts were judged, and how many stood, at each place of a draft.

    `rounds` are the drafts of each target call, in order, which wrote `text` together: those that stood and
    one token more. A draft is judged if all before it stood.
    """
    longest, place = max(map(len, rounds), default=0), 0
    judged, stood = [0] * longest, [0] * longest
    for drafts in rounds:
        for i, (draft, token) in enumerate(zip(drafts, text[place:], strict=False)):
            judged[i] += 1
            if draft != token:
                break
            stood[i] += 1
            place += 1
        place += 1
    return judged, stood

"""The baseline: Transformers' assisted generation says what it says plainly, and its calls are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgespec.exporters import assisted
from edgespec.exporters.assisted import Assisted, positions
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.self_draft import draft_of
from edgespec.exporters.tokenizer import asked
from edgespec.prompts import Prompt
from edgespec.runtime.text import render
from tests.helpers import tiny

TEXTS = ("hello hello hello", "well well", "a b c a b c", "안녕")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.checkpoint(tmp_path_factory.mktemp("assisted") / "model", tiny.model("llama"))


def plainly(target: Checkpoint, text: str, count: int) -> list[int]:
    """A greedy answer, every token from the whole text; a stop token ends it."""
    ((ids, _),) = asked(target.tokenizer, [Prompt(text, "")], render)
    written: list[int] = []
    while len(written) < count and not {*written} & {*target.tokenizer.stop_ids}:
        with torch.no_grad():
            logits = tiny.model("llama")(torch.tensor([[*ids, *written]])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("threshold", [0.4, 0.02, 0.0])
@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_it_says_what_plain_decoding_says(
    target: Checkpoint, layers: tuple[int, ...], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a draft that is wrong most of the time, and with one that is the target."""
    monkeypatch.setitem(assisted.DRAFTING, "assistant_confidence_threshold", threshold)
    judged = stood = 0
    with Assisted(target, draft_of(target, layers), 0.25, 1, render) as runtime:
        for text in TEXTS:
            answer = runtime.session().generate(text, 32)
            written, stats = plainly(target, text, 32), answer.stats
            assert list(answer.tokens) == written and stats["tokens_new"] == len(written) > 1
            assert sum(stats["accepted_by_position"]) + stats["verify_calls"] == len(written) - 1
            assert stats["draft_calls"] >= sum(stats["drafted_by_position"])
            assert stats["c"] == 0.25 and stats["time_first_token_s"] > 0
            judged += sum(stats["drafted_by_position"])
            stood += sum(stats["accepted_by_position"])
            if len(layers) == 2:
                assert stats["draft_calls"] == sum(stats["accepted_by_position"])
                if threshold == 0:  # 31 tokens are left: 20 drafts and one, then as many as there is room for
                    assert (stats["verify_calls"], stats["draft_calls"]) == (2, 29)
    assert judged > 0 and (stood == judged) == (len(layers) == 2)


def test_a_stop_token_ends_an_answer(target: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: by the prompt's call, as a draft that stood, or as the target's own."""
    monkeypatch.setitem(assisted.DRAFTING, "assistant_confidence_threshold", 0.0)
    written = plainly(target, TEXTS[0], 32)
    with Assisted(target, draft_of(target, (0, 1)), 0.25, 1, render) as runtime:
        for place in sorted({written.index(token) for token in written}):
            runtime.tokenizer = replace(runtime.tokenizer, stop_ids=(written[place],))
            answer = runtime.generate(TEXTS[0], 32)
            assert list(answer.tokens) == written[: place + 1]
            assert answer.stats["verify_calls"] == (place > 0) + (place > 21)


def test_positions() -> None:
    text = [1, 2, 3, 4, 5, 6, 7]
    assert positions(text, [[1, 9, 3], [3], [], [6, 7]]) == ([3, 2, 0], [3, 1, 0])
    assert positions([1], [[]]) == positions([], []) == ([], [])

"""The tasks' contexts: as long as asked, the same for a seed, every answer in the context."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers

from edgespec.errors import InputError
from edgespec.material import Material, plain, read
from edgespec.task_words import NAMES
from edgespec.tasks import TASKS, Question, Sample
from tests.helpers.checkpoints import tokenizer_json

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTH, BLOCK = 6144, 128  # the tiny tokenizer gives about a token for each letter


def chatting(template: str, messages: Sequence[dict[str, str]], bos: str, eos: str) -> str:
    """A chat template as the tests' own words."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>"


@functools.cache
def material(template: str = "yes", bos: int | None = 1) -> Material:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json()))
    return Material(tokenizer, template, bos, "", plain(read(None)), chatting)


def said(ids: Sequence[int]) -> str:
    return material().tokenizer.decode(list(ids), skip_special_tokens=False)


def answer(question: Question) -> str:
    return said([question.ids[place] for place in question.scored])


def make(task: str, seed: int = 0, length: int = LENGTH, what: Material | None = None) -> Sample:
    return TASKS[task](what or material(), length, BLOCK, seed)


def test_the_names_are_the_tasks() -> None:
    assert tuple(TASKS) == NAMES


@pytest.mark.parametrize("task", NAMES)
def test_contexts_are_as_long_as_asked_and_repeat(task: str) -> None:
    sample = make(task)
    longest = max(len(q.ids) for q in sample.questions)
    whole = len(sample.context) + longest
    assert LENGTH - BLOCK < whole <= LENGTH or longest > BLOCK
    assert len(sample.context) % BLOCK == 0 or longest > BLOCK
    assert make(task) == sample
    assert make(task, seed=1).context != sample.context
    for question in sample.questions:
        assert question.scored and question.scored[0] > 0 and question.scored[-1] == len(question.ids) - 1
        assert list(question.scored) == list(range(question.scored[0], question.scored[-1] + 1))


@pytest.mark.parametrize("task", [name for name in NAMES if name != "text"])
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_stands_in_the_context(task: str, seed: int) -> None:
    sample = make(task, seed)
    context = said(sample.context)
    for question in sample.questions:
        assert answer(question).strip() in context
    depths = [q.depth for q in sample.questions]
    if task != "multi-turn":
        assert all(d is not None and 0 < d < 1 for d in depths)


def test_a_needle_stands_at_its_depth_and_nowhere_else() -> None:
    sample = make("needle")
    context = said(sample.context)
    assert [round(q.depth or 0, 1) for q in sample.questions] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for question in sample.questions:
        words = said(question.ids[: question.scored[0]]).strip()
        assert context.count(words) == 1
        assert abs(context.index(words) / len(context) - (question.depth or 0)) < 0.05


def test_multi_needle_gives_the_earlier_answers() -> None:
    questions = make("multi-needle").questions
    texts = [said(q.ids) for q in questions]
    assert texts[1].startswith(texts[0]) and texts[2].startswith(texts[1])
    assert [len(q.scored) for q in questions] == [5, 5, 5]  # a space and four digits


def test_distractors_have_other_answers() -> None:
    for task in ("multi-key", "key-value"):
        sample = make(task)
        answers = [answer(q).strip() for q in sample.questions]
        assert len(set(answers)) == len(answers) >= 4


def test_text_scores_the_tail_of_windows_that_do_not_overlap() -> None:
    windows = [make("text", seed) for seed in range(3)]
    document = material().document
    for seed, window in enumerate(windows):
        (question,) = window.questions
        assert (len(question.ids), len(question.scored)) == (256, 255)
        whole = [*window.context, *question.ids]
        assert whole[0] == 1 and len(whole) == LENGTH
        assert whole[1:] == document[seed * LENGTH : seed * LENGTH + LENGTH - 1]


def test_a_conversation_without_a_template_is_plain_text() -> None:
    sample = make("multi-turn", what=material("", None))
    text = said(sample.context)
    assert text.startswith("User: ") and "<|im_start|>" not in text
    assert said(sample.questions[0].ids).rstrip().endswith(answer(sample.questions[0]).strip())
    assert "Assistant: Your" in said(sample.questions[0].ids) or "Assistant: You" in said(
        sample.questions[0].ids
    )


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    def forgetful(template: str, messages: Sequence[dict[str, str]], bos: str, eos: str) -> str:
        return messages[-1]["content"] + chatting(template, messages, bos, eos)

    with pytest.raises(InputError, match="the chat template changes earlier turns"):
        make("multi-turn", what=dataclasses.replace(material(), render=forgetful))


@pytest.mark.parametrize("task", [name for name in NAMES if name != "text"])
def test_a_length_that_is_too_short_is_refused(task: str) -> None:
    with pytest.raises(InputError, match="length 128 is too short for the task"):
        make(task, length=128)


def test_a_text_that_is_too_short_is_refused() -> None:
    short = dataclasses.replace(material(), text="One sentence only, but a rather long one, as sentences go.")
    with pytest.raises(InputError, match=r"the text has \d+ tokens, and length 6,144 needs as many"):
        make("text", what=short)
    with pytest.raises(InputError, match="the text has no whole sentence"):
        make("needle", what=dataclasses.replace(material(), text="words"))


def test_wikitext_is_read_as_text_is_written() -> None:
    spaced = 'It weighs 2 @.@ 5 kg ( 5 lb ) , or " two @-@ and @-@ more " ; it \'s heavy .\n\n = = A = = \n'
    assert plain(spaced) == ('It weighs 2.5 kg (5 lb), or "two-and-more"; it\'s heavy.\n= = A = =')
    assert plain('Nothing (at all) changes here, "really".') == 'Nothing (at all) changes here, "really".'


def test_the_shipped_questions_have_their_answer_once() -> None:
    passages = material().questions
    assert len(passages) > 50
    assert {p["source"] for p in passages} == {"WikiText-2", "Spec-Bench"}
    for passage in passages:
        assert passage["text"].count(passage["answer"]) == 1
        assert passage["answer"] not in passage["ask"] and len(passage["text"]) <= 1200


def test_the_shipped_questions_are_what_their_script_builds(tmp_path: Path) -> None:
    if not (ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the texts are not here")
    built = tmp_path / "questions.json"
    command = [sys.executable, ROOT / "scripts" / "build_questions", "--output", built]
    subprocess.run(command, check=True, capture_output=True)
    assert built.read_bytes() == (ROOT / "edgespec" / "questions.json").read_bytes()

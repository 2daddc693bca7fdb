"""The evaluation's tasks: contexts that fill a cache, and questions about them. Text and ids, no model.

The setting is query-agnostic: a context is absorbed, and its rows evicted, before any question is known; the
question's own rows then stand in the cache as they would in a conversation. Every question of a context is
asked of the same cache. Same material, length and seed: same ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgespec.errors import InputError
from edgespec.material import HOLE, Material
from edgespec.task_words import CHATTER, KINDS, MEMORIES, TOWNS, WORDS, number

TAIL = 256  # tokens at a text's end whose prediction is scored
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TALK = 4  # turns of other talk in a conversation


@dataclass(frozen=True)
class Question:
    """Tokens after the context; `scored` are the places in `ids` that the model must predict, ascending, > 0.

    `depth` is where in the context the answer stands, 0 (its beginning) to 1; None where that has no meaning.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Sample:
    """One context and what is asked of it."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Asked:
    """A question as text: the words up to its answer, the answer, the number of the fact that holds it."""

    words: str
    answer: str
    fact: int | None = None


def text(material: Material, length: int, block: int, seed: int) -> Sample:
    """Long text: its last tokens are predicted one by one, as perplexity is measured.

    Windows of different seeds do not overlap while the text lasts.
    """
    room = len(material.document) - length
    if room < 0:
        raise InputError(
            f"the text has {len(material.document):,} tokens, and length {length:,} needs as many",
            "give a longer text with --text, or use smaller --lengths",
        )
    first = seed * length % (room + 1)
    ids = [*material.start, *material.document[first : first + length]][:length]
    tail = min(TAIL, length // 4)
    asked = Question(tuple(ids[-tail:]), tuple(range(1, tail)))
    return Sample(tuple(ids[:-tail]), (asked,))


def needle(material: Material, length: int, block: int, seed: int) -> Sample:
    """Five facts of different kinds, one at each depth; each is asked apart (needle in a haystack).

    The facts share no words, so each is a single needle to its question.
    """
    chance = random.Random(f"needle {seed}")
    kinds = chance.sample(KINDS, len(DEPTHS))
    said = [(kind, make(chance)) for kind, make in kinds]
    facts = [f" {kind} {answer}." for kind, answer in said]
    asked = [Asked(f"\n\n{kind}", f" {answer}", i) for i, (kind, answer) in enumerate(said)]
    return haystack(material, length, block, chance, facts, asked)


def multi_needle(material: Material, length: int, block: int, seed: int) -> Sample:
    """Three facts of one kind, all asked in one breath, so that each answer must be found among the others
    (RULER's multi-query, arXiv 2404.06654). Each is scored with the right answers before it."""
    chance = random.Random(f"multi-needle {seed}")
    codes = secrets(chance, 3)
    said, asked = "\n\n", []
    for i, (town, code) in enumerate(codes):
        said += f"The secret code of {town} is"
        asked.append(Asked(said, f" {code}", i))
        said += f" {code}. "
    return haystack(material, length, block, chance, stated(codes), asked)


def multi_key(material: Material, length: int, block: int, seed: int) -> Sample:
    """Four facts of one kind, each asked apart while the others distract (RULER's multi-key)."""
    chance = random.Random(f"multi-key {seed}")
    codes = secrets(chance, 4)
    asked = [
        Asked(f"\n\nThe secret code of {town} is", f" {code}", i) for i, (town, code) in enumerate(codes)
    ]
    return haystack(material, length, block, chance, stated(codes), asked)


def secrets(chance: random.Random, count: int) -> list[tuple[str, str]]:
    """Towns, and a number of each."""
    return [(town, number(chance)) for town in chance.sample(TOWNS, count)]


def stated(codes: Sequence[tuple[str, str]]) -> list[str]:
    """Each town's number as a sentence."""
    return [f" The secret code of {town} is {code}." for town, code in codes]


def key_value(material: Material, length: int, block: int, seed: int) -> Sample:
    """Six JSON objects of four pairs each, spread over a long text; one key of each is asked apart.

    After Lost in the Middle (arXiv 2307.03172), whose one long object small models cannot search.
    """
    chance = random.Random(f"key-value {seed}")
    keys = chance.sample([f"{a}-{b}" for a in WORDS for b in WORDS if a != b], 24)
    pairs = [(key, number(chance)) for key in keys]
    groups = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
    facts = ["\n\n{" + "".join(f'\n"{k}": "{v}",' for k, v in group) + "\n}\n\n" for group in groups]
    chosen = [chance.choice(group) for group in groups]
    asked = [Asked(f'\n\n{{\n"{key}": "', value, i) for i, (key, value) in enumerate(chosen)]
    return haystack(material, length, block, chance, facts, asked)


def answering(material: Material, length: int, block: int, seed: int) -> Sample:
    """Five passages at equal distances in a long text, a question about each (the shipped set): three
    sentences of Wikipedia articles to finish, two of Spec-Bench's retrieval questions."""
    chance = random.Random(f"questions {seed}")
    asked_of = lambda source, count: chance.sample(  # noqa: E731
        [p for p in material.questions if p["source"] == source], count
    )
    chosen = asked_of("WikiText-2", 3) + asked_of("Spec-Bench", 2)
    chance.shuffle(chosen)
    facts = [f"\n\n{passage['text']}\n\n" for passage in chosen]
    asked = [Asked(f"\n\n{p['ask']}", f" {p['answer']}", i) for i, p in enumerate(chosen)]
    return haystack(material, length, block, chance, facts, asked)


def multi_turn(material: Material, length: int, block: int, seed: int) -> Sample:
    """A conversation: facts in its first turns, other talk after them, then each fact is asked apart."""
    chance = random.Random(f"multi-turn {seed}")
    told = [(memory, chance.choice(memory.answers)) for memory in chance.sample(MEMORIES, 3)]
    messages = []
    for memory, answer in told:
        messages += [user(f"{memory.told} {answer}."), assistant(f"{memory.repeated} {answer}.")]
    for turn in range(TALK):
        messages += [user(chance.choice(CHATTER)), assistant(HOLE.format(turn))]
    gap = "" if material.template else " "
    asked = [
        (material.chat([*messages, user(memory.asked)]), f"{gap}{memory.repeated}", f" {answer}")
        for memory, answer in told
    ]
    return conversation(material, length, block, asked, chance)


def user(words: str) -> dict[str, str]:
    """A turn of the user's."""
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    """A turn of the model's."""
    return {"role": "assistant", "content": words}


def conversation(
    material: Material,
    length: int,
    block: int,
    asked: Sequence[tuple[str, str, str]],
    chance: random.Random,
) -> Sample:
    """Rendered conversations that differ in their last turn alone, their holes filled up to the length."""
    end = HOLE.format(TALK - 1)
    head = asked[0][0].split(end)[0]
    if any(whole.split(end)[0] != head for whole, _, _ in asked):
        raise InputError("the chat template changes earlier turns", "leave multi-turn out of --tasks")
    questions = [
        question(material, Asked(whole.split(end)[1] + start, answer)) for whole, start, answer in asked
    ]
    pieces = [head]
    for turn in range(TALK - 1):
        pieces[-1:] = pieces[-1].split(HOLE.format(turn))
    parts = [material.ids(piece) for piece in pieces]
    context: list[int] = [] if material.template else list(material.start)
    room = context_end(length, block, questions) - len(context) - sum(map(len, parts))
    if room < TALK * 8:
        raise too_short(length)
    for turn, part in enumerate(parts):
        size = room // TALK if turn < TALK - 1 else room - (TALK - 1) * (room // TALK)
        context += part
        for sentence in material.filler(size, chance.randrange(10_000)):
            context += sentence
    return Sample(tuple(context), tuple(questions))


def haystack(
    material: Material, length: int, block: int, chance: random.Random, facts: list[str], asked: list[Asked]
) -> Sample:
    """Filler with facts at equal distances; context and the longest question make up the length.

    A fact stands between two sentences; its depth is where the filler before it ends.
    """
    parts = [material.ids(fact) for fact in facts]
    bare = [question(material, a) for a in asked]
    room = context_end(length, block, bare) - len(material.start) - sum(map(len, parts))
    if room < 8 * (len(parts) + 1):
        raise too_short(length)
    depths = [round((i + 0.5) / len(parts), 2) for i in range(len(parts))]
    context, filled, placed = list(material.start), 0, 0
    for sentence in material.filler(room, chance.randrange(10_000)):
        context += sentence
        filled += len(sentence)
        while placed < len(parts) and filled >= depths[placed] * room:
            context += parts[placed]
            placed += 1
    depth_of = [None if a.fact is None else depths[a.fact] for a in asked]
    questions = [Question(q.ids, q.scored, depth) for q, depth in zip(bare, depth_of, strict=True)]
    return Sample(tuple(context), tuple(questions))


def context_end(length: int, block: int, questions: Sequence[Question]) -> int:
    """Where a context ends: before a block if the questions fit into one, else as late as they allow.

    Commits fall on whole blocks: then the last one has just been when a question comes.
    """
    longest = max(len(q.ids) for q in questions)
    return (length - longest) // block * block if longest <= block else length - longest


def question(material: Material, asked: Asked, depth: float | None = None) -> Question:
    """A question's tokens and its answer's; those are what the answer's words add to the question's."""
    before = material.ids(asked.words)
    ids = material.ids(asked.words + asked.answer)
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    return Question(tuple(ids), tuple(range(min(same, len(ids) - 1), len(ids))), depth)


def too_short(length: int) -> InputError:
    """A length that the task does not fit in."""
    return InputError(
        f"length {length} is too short for the task", "use larger --lengths, or leave the task out of --tasks"
    )


TASKS: dict[str, Callable[[Material, int, int, int], Sample]] = {
    "text": text,
    "needle": needle,
    "multi-needle": multi_needle,
    "multi-key": multi_key,
    "key-value": key_value,
    "questions": answering,
    "multi-turn": multi_turn,
}

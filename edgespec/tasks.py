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

TAIL = 256  # tokens at a text's end whose prediction is scored
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


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
    """A question as text: the words, with every answer in between; the fact's number, for its depth."""

    parts: tuple[tuple[str, str], ...]
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
    asked = [Asked(((f"\n\n{kind}", f" {answer}"),), i) for i, (kind, answer) in enumerate(said)]
    return haystack(material, length, block, chance, facts, asked)


def multi_needle(material: Material, length: int, block: int, seed: int) -> Sample:
    """Three facts of one kind, all asked in one breath, so that each answer must be found among the others
    (RULER's multi-query, arXiv 2404.06654). Each is scored with the right answers before it."""
    chance = random.Random(f"multi-needle {seed}")
    codes = secrets(chance, 3)
    parts = [(f"The secret code of {town} is", f" {code}") for town, code in codes]
    before = [("\n\n" if not i else ". ") + words for i, (words, _) in enumerate(parts)]
    whole = [(words, answer) for words, (_, answer) in zip(before, parts, strict=True)]
    asked = [Asked(tuple(whole[: i + 1]), i) for i in range(len(whole))]
    return haystack(material, length, block, chance, stated(codes), asked)


def multi_key(material: Material, length: int, block: int, seed: int) -> Sample:
    """Four facts of one kind, each asked apart while the others distract (RULER's multi-key)."""
    chance = random.Random(f"multi-key {seed}")
    codes = secrets(chance, 4)
    asked = [
        Asked(((f"\n\nThe secret code of {town} is", f" {code}"),), i) for i, (town, code) in enumerate(codes)
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
    asked = [Asked(((f'\n\n{{\n"{key}": "', value),), i) for i, (key, value) in enumerate(chosen)]
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
    asked = [Asked(((f"\n\n{p['ask']}", f" {p['answer']}"),), i) for i, p in enumerate(chosen)]
    return haystack(material, length, block, chance, facts, asked)


def multi_turn(material: Material, length: int, block: int, seed: int) -> Sample:
    """A conversation: facts in its first turns, other talk in the next ones, then each fact is asked apart."""
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
    return conversation(material, length, asked, chance)


def user(words: str) -> dict[str, str]:
    """A turn of the user's."""
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    """A turn of the model's."""
    return {"role": "assistant", "content": words}


def conversation(
    material: Material, length: int, asked: Sequence[tuple[str, str, str]], chance: random.Random
) -> Sample:
    """Rendered conversations that differ in their last turn alone, their holes filled up to the length."""
    end = HOLE.format(TALK - 1)
    head = asked[0][0].split(end)[0]
    if any(whole.split(end)[0] != head for whole, _, _ in asked):
        raise InputError("the chat template changes earlier turns", "leave multi-turn out of --tasks")
    questions = [
        question(material, Asked(((whole.split(end)[1] + start, answer),))) for whole, start, answer in asked
    ]
    pieces = [head]
    for turn in range(TALK - 1):
        pieces[-1:] = pieces[-1].split(HOLE.format(turn))
    parts = [material.ids(piece) for piece in pieces]
    room = length - sum(map(len, parts)) - max(len(q.ids) for q in questions)
    if room < TALK * 8:
        raise too_short(length, "multi-turn")
    context: list[int] = [] if material.template else list(material.start)
    room -= len(context)
    for turn, part in enumerate(parts):
        size = room // TALK if turn < TALK - 1 else room - (TALK - 1) * (room // TALK)
        context += part + material.filler(size, chance.randrange(10_000))
    return Sample(tuple(context), tuple(questions))


def haystack(
    material: Material, length: int, block: int, chance: random.Random, facts: list[str], asked: list[Asked]
) -> Sample:
    """Filler with facts at equal distances; context and the longest question make up the length.

    The context ends where a block does if the questions fit behind it: then every context row has been
    through the commits when a question comes.
    """
    parts = [material.ids(fact) for fact in facts]
    bare = [question(material, a) for a in asked]
    longest = max(len(q.ids) for q in bare)
    end = (length - longest) // block * block if longest <= block else length - longest
    room = end - len(material.start) - sum(map(len, parts))
    if room < 8 * (len(parts) + 1):
        raise too_short(length, "one of the tasks")
    filler = material.filler(room, chance.randrange(10_000))
    context, taken, places = list(material.start), 0, []
    for number_, part in enumerate(parts):
        upto = int((number_ + 0.5) / len(parts) * room)
        context += filler[taken:upto]
        taken = upto
        places.append(len(context) / end)
        context += part
    context += filler[taken:]
    depths = [None if a.fact is None else round(places[a.fact], 2) for a in asked]
    return Sample(
        tuple(context), tuple(Question(q.ids, q.scored, d) for q, d in zip(bare, depths, strict=True))
    )


def question(material: Material, asked: Asked, depth: float | None = None) -> Question:
    """The tokens of a question and its answers; an answer's are those that its words add to the text's."""
    said, ids, scored = "", [], []
    for words, answer in asked.parts:
        before = material.ids(said + words)
        said += words + answer
        ids = material.ids(said)
        same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        scored += list(range(min(same, len(ids) - 1), len(ids)))
    return Question(tuple(ids), tuple(scored), depth)


def too_short(length: int, name: str) -> InputError:
    """A length that a task does not fit in."""
    return InputError(
        f"length {length} is too short for {name}", "use larger --lengths, or leave the task out of --tasks"
    )


def number(chance: random.Random) -> str:
    """Four digits."""
    return str(chance.randint(1000, 9999))


TALK = 4  # turns of other talk
TOWNS = ("Paris", "Rome", "London", "Berlin", "Madrid", "Tokyo", "Oslo", "Cairo", "Lima", "Athens", "Dublin",
         "Moscow", "Vienna", "Warsaw", "Lisbon", "Delhi")  # fmt: skip
WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "chair", "piano", "table", "ocean", "candle",
         "garden", "silver", "window", "bridge", "forest", "mirror", "rocket", "sugar", "paper")  # fmt: skip
ANIMALS = ("tiger", "rabbit", "falcon", "dolphin", "beaver", "camel", "donkey", "horse", "lizard", "monkey")
NAMES = ("Oliver", "Hannah", "Martin", "Sophie", "Victor", "Julia", "Walter", "Emma", "Felix", "Clara")
THINGS = ("carpet", "piano", "mirror", "fountain", "staircase", "oak tree", "clock", "statue", "bookshelf")
KINDS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("The number of the hotel room where the spy slept is", number),
    ("The password of the old library is", lambda chance: chance.choice(WORDS)),
    ("The captain of the ship Aurora is called", lambda chance: chance.choice(NAMES)),
    ("The golden key of the castle lies under the", lambda chance: chance.choice(THINGS)),
    ("The animal on the wizard's flag is the", lambda chance: chance.choice(ANIMALS)),
    ("The telephone extension of Doctor Lund is", number),
)
SISTERS = ("Maria", "Laura", "Alice", "Nina", "Julia", "Emma", "Clara", "Sophie")
DOGS = ("Biscuit", "Rocky", "Pepper", "Shadow", "Max", "Luna")
LOCKERS = tuple(str(n) for n in range(113, 990, 37))


@dataclass(frozen=True)
class Memory:
    """Something to remember: how the user tells it, asks for it, how the model repeats it; possible answers."""

    told: str
    asked: str
    repeated: str
    answers: tuple[str, ...]


MEMORIES = (
    Memory("My sister's name is", "What is my sister's name?", "Your sister's name is", SISTERS),
    Memory("I live in", "Where do I live?", "You live in", TOWNS),
    Memory("My locker number is", "What is my locker number?", "Your locker number is", LOCKERS),
    Memory(
        "My favourite animal is the", "What is my favourite animal?", "Your favourite animal is the", ANIMALS
    ),
    Memory("My dog is called", "What is my dog called?", "Your dog is called", DOGS),
)
CHATTER = (
    "Tell me something interesting.",
    "Go on, please.",
    "Tell me something else.",
    "What else do you know?",
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

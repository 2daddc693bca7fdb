"""The words of the evaluation's tasks, chosen so that a small model can do them while nothing is evicted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("text", "needle", "multi-needle", "multi-key", "key-value", "questions", "multi-turn")


@dataclass(frozen=True)
class Memory:
    """Something to remember: how the user tells it and asks for it, how the model repeats it."""

    told: str
    asked: str
    repeated: str
    answers: tuple[str, ...]


def number(chance: random.Random) -> str:
    """Four digits."""
    return str(chance.randint(1000, 9999))


TOWNS = ("Paris", "Rome", "London", "Berlin", "Madrid", "Tokyo", "Oslo", "Cairo", "Lima", "Athens", "Dublin",
         "Moscow", "Vienna", "Warsaw", "Lisbon", "Delhi")  # fmt: skip
WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "chair", "piano", "table", "ocean", "candle",
         "garden", "silver", "window", "bridge", "forest", "mirror", "rocket", "sugar", "paper")  # fmt: skip
ANIMALS = ("tiger", "rabbit", "falcon", "dolphin", "beaver", "camel", "donkey", "horse", "lizard", "monkey")
CAPTAINS = ("Oliver", "Hannah", "Martin", "Sophie", "Victor", "Julia", "Walter", "Emma", "Felix", "Clara")
THINGS = ("carpet", "piano", "mirror", "fountain", "staircase", "oak tree", "clock", "statue", "bookshelf")
KINDS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("The number of the hotel room where the spy slept is", number),
    ("The password of the old library is", lambda chance: chance.choice(WORDS)),
    ("The captain of the ship Aurora is called", lambda chance: chance.choice(CAPTAINS)),
    ("The golden key of the castle lies under the", lambda chance: chance.choice(THINGS)),
    ("The animal on the wizard's flag is the", lambda chance: chance.choice(ANIMALS)),
    ("The telephone extension of Doctor Lund is", number),
)
SISTERS = ("Maria", "Laura", "Alice", "Nina", "Julia", "Emma", "Clara", "Sophie")
DOGS = ("Biscuit", "Rocky", "Pepper", "Shadow", "Max", "Luna")
LOCKERS = tuple(str(n) for n in range(113, 990, 37))


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

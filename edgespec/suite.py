"""The prompts of a benchmark: a suite that ships with edgespec, or a file; each with a name of its own.

`specbench` is a balanced part of Spec-Bench (Apache-2.0): five prompts of each of its 13 categories, made by
scripts/build_specbench. They are test prompts: nothing may be trained or tuned on them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from importlib.resources import as_file, files

from edgespec.prompts import read

SUITES = ("specbench",)


@dataclass(frozen=True)
class Item:
    """A prompt; `name` is its category and its number in it."""

    name: str
    category: str
    text: str


def items(suite: str, path: str | None, limit: int) -> tuple[Item, ...]:
    """The prompts of a file, or else of a suite, in its order; `limit` (0: all) takes categories in turns."""
    if path is not None:
        found = read(path)
    else:
        with as_file(files("edgespec").joinpath(f"{suite}.json")) as file:
            found = read(file)
    seen: Counter[str] = Counter()
    ranked = []
    for order, prompt in enumerate(found):
        seen[prompt.category] += 1
        number = seen[prompt.category]
        name = f"{prompt.category}/{number}"
        ranked.append((number, order, Item(name, prompt.category, prompt.text)))
    kept = sorted(ranked, key=lambda r: r[:2])[: limit or None]
    return tuple(item for _, _, item in sorted(kept, key=lambda r: r[1]))


def digest(chosen: tuple[Item, ...]) -> str:
    """SHA-256 of the prompts' texts, in order."""
    return hashlib.sha256("\0".join(item.text for item in chosen).encode()).hexdigest()

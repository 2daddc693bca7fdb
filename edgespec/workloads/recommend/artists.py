"""The artists of a list, and where a post names one: whole words, longest first, Korean particles allowed.

A line of the list is a name and, behind `|`, its other spellings: `BTS | 방탄소년단 | @BTS_twt`. A spelling
is found as its words in a row (`NCT 127`), or as these in one (`#NCT127`); an account only as that account. A
spelling of one letter or one syllable (비, "rain") is too common a word: it counts behind # alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgespec.errors import InputError
from edgespec.workloads.recommend.tokens import HANGUL, HASH, is_tail, tokens

LARGEST_LIST = 2**22  # bytes
MARK = "*"  # an artist among a post's words: `*7`
HINT = "one artist a line, other spellings behind |: BTS | 방탄소년단"


@dataclass(frozen=True)
class Artists:
    """`names` in the list's order. `spellings`: by first token, the tokens of a spelling and whose it is,
    longest first. `notes`: what of the list was merged or left out.
    """

    names: tuple[str, ...]
    spellings: dict[str, list[tuple[tuple[str, ...], int]]]
    hangul: dict[str, int]
    single: dict[str, int]
    notes: tuple[str, ...]

    def marked(self, found: list[str]) -> list[str]:
        """The tokens with every artist's spelling in them replaced by its mark."""
        out, at = [], 0
        while at < len(found):
            owner, length = self._at(found, at)
            out.append(found[at] if owner is None else f"{MARK}{owner}")
            at += length
        return out

    def named(self, text: str) -> set[str]:
        """The names of the artists that a text names."""
        return {self.names[artist] for artist in artists_of(self.marked(tokens(text)))}

    def _at(self, found: list[str], at: int) -> tuple[int | None, int]:
        """Whose spelling begins here and how many tokens it has; None and 1 where none does."""
        token = found[at]
        if at and found[at - 1] == HASH and token in self.single:
            return self.single[token], 1
        for words, owner in self.spellings.get(token, ()):
            end = at + len(words)
            if tuple(found[at:end]) == words:
                return owner, len(words)
            last = found[end - 1] if end <= len(found) else ""
            if len(words) > 1 and tuple(found[at : end - 1]) == words[:-1] and _with_tail(last, words[-1]):
                return owner, len(words)
        for cut in range(len(token) - 1, 1, -1) if HANGUL.fullmatch(token) else ():
            whose = self.hangul.get(token[:cut])
            if whose is not None and is_tail(token[cut:]):
                return whose, 1
        return None, 1


def artists_of(marked: list[str]) -> list[int]:
    """The artists among marked tokens, in order, with repetitions."""
    return [int(token[1:]) for token in marked if token.startswith(MARK)]


def _with_tail(token: str, word: str) -> bool:
    """Is a token this Hangul word with particles behind it?"""
    return bool(HANGUL.fullmatch(word)) and token.startswith(word) and is_tail(token[len(word) :])


def read(path: Path | str) -> Artists:
    """The artists of a file; InputError where it cannot be read or names nobody."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_LIST + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"artists {path} cannot be read: {error.strerror}", "give --artists a file"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"artists {path} is not UTF-8", "save the list as UTF-8 text") from None
    if len(content) > LARGEST_LIST:
        raise InputError(f"artists {path} is larger than {LARGEST_LIST:,} bytes", HINT)
    return parsed(text.splitlines(), str(path))


def parsed(lines: list[str], where: str) -> Artists:
    """The artists of a list's lines; names that differ in case or width alone are one."""
    names: list[str] = []
    owners: dict[tuple[str, ...], int] = {}
    by_name: dict[tuple[str, ...], int] = {}
    notes: list[str] = []
    for number, line in enumerate(lines, 1):
        first, *others = (part.strip() for part in line.split("|"))
        key = tuple(tokens(first))
        if not first or not key:
            if line.strip():
                notes.append(f"line {number}: no name in {first[:40]!r}")
            continue
        if len(first) > 100 or any(c < " " for c in first):
            notes.append(f"line {number}: a name of more than 100 characters, or with a control character")
            continue
        if key in owners and key not in by_name:
            notes.append(f"line {number}: {first} is a spelling of {names[owners[key]]} already; left out")
            continue
        if key in by_name:
            notes.append(f"line {number}: {first} is in the list already; merged")
        else:
            by_name[key] = len(names)
            names.append(first)
        for spelling in (first, *others):
            _claim(spelling, by_name[key], owners, names, notes, number)
    if not names:
        raise InputError(f"artists {where} names nobody", HINT)
    return _indexed(names, owners, notes)


def _claim(
    spelling: str,
    owner: int,
    owners: dict[tuple[str, ...], int],
    names: list[str],
    notes: list[str],
    number: int,
) -> None:
    """Give a spelling to its artist; one that another has already stays there, and is told of."""
    if not (key := tuple(token for token in tokens(spelling) if token != HASH)):
        return
    if owners.setdefault(key, owner) != owner:
        notes.append(f"line {number}: {spelling} stays a spelling of {names[owners[key]]}")


def _indexed(names: list[str], owners: dict[tuple[str, ...], int], notes: list[str]) -> Artists:
    spellings: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    hangul: dict[str, int] = {}
    single: dict[str, int] = {}
    for key, owner in owners.items():
        joined = "".join(key)
        if len(joined) == 1:
            single[joined] = owner
            continue
        for words in {key, (joined,)} if tuple(tokens(joined)) == (joined,) else {key}:
            if words != key and words in owners:
                continue  # another artist is spelled so in the list itself
            spellings.setdefault(words[0], []).append((words, owner))
            if len(words) == 1 and HANGUL.fullmatch(words[0]):
                hangul[words[0]] = owner
    for found in spellings.values():
        found.sort(key=lambda item: (-len(item[0]), item[0]))
    return Artists(tuple(names), spellings, hangul, single, tuple(notes))

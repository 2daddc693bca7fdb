"""The draft's trimmed LM head (VocabTrim, arXiv 2506.22694): which rows of the target's head it keeps.

Knows token ids and counts; the ids are mapped back inside the graph by the lowering.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgespec import vocabulary
from edgespec.errors import InputError

BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback
NUMBER = re.compile("[0-9]{1,9}")


def always_kept(
    tokenizer_json: bytes, stop_ids: tuple[int, ...], template: str = "", vocab: int | None = None
) -> set[int]:
    """Every special and stop token, the chat template's own tokens and all byte tokens: without them some
    texts could not be written. Those of a vocabulary of `vocab` tokens, where it is given.
    """
    data = json.loads(tokenizer_json)
    added = data.get("added_tokens", [])
    special = {e["id"] for e in added if e.get("special") or (e.get("content") and e["content"] in template)}
    vocabulary = data["model"]["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {e[0]: i for i, e in enumerate(vocabulary)}
    single = {i for token, i in ids.items() if BYTE.fullmatch(token)}
    single = single or {i for token, i in ids.items() if len(token) == 1}  # byte-level: a byte is one letter
    kept = special | set(stop_ids) | single
    return kept if vocab is None else {i for i in kept if i < vocab}


def by_frequency(
    tokenizer_json: bytes,
    stop_ids: tuple[int, ...],
    text: str,
    rows: int,
    vocab: int,
    template: str = "",
    first: Sequence[int] = (),
) -> np.ndarray:
    """The `rows` ids to keep, ascending: what must be kept, `first` in its order, the text's most frequent,
    then the lowest ids.

    A byte-pair vocabulary numbers its merges by frequency: among unseen tokens a lower id is the likelier.
    """
    counts = Counter(Tokenizer.from_str(tokenizer_json.decode()).encode(text, add_special_tokens=False).ids)
    fixed = always_kept(tokenizer_json, stop_ids, template, vocab)
    place = {token: i for i, token in enumerate(first)}
    rest = sorted(
        (i for i in range(vocab) if i not in fixed), key=lambda i: (place.get(i, len(place)), -counts[i], i)
    )
    return np.array(sorted([*fixed, *rest[: max(0, rows - len(fixed))]]), np.int64)


def from_file(
    path: Path, tokenizer_json: bytes, stop_ids: tuple[int, ...], vocab: int, template: str = ""
) -> np.ndarray:
    """The ids of a vocabulary file, or of one id a line, with those that are always kept; InputError for a
    file of another tokenizer and for a line that is no id.
    """
    chosen = always_kept(tokenizer_json, stop_ids, template, vocab)
    if vocabulary.is_vocabulary(path):
        return np.array(
            sorted(chosen | set(vocabulary.read(path, tokenizer_json, vocab).token_ids)), np.int64
        )
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            if not NUMBER.fullmatch(line.strip()) or int(line) >= vocab:
                raise InputError(
                    f"{path.name} line {number}: {line.strip()[:40]!r} is no token id below {vocab}",
                    "write one id a line, most frequent first or in any order",
                )
            chosen.add(int(line))
    return np.array(sorted(chosen), np.int64)

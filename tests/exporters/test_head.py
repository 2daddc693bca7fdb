"""Which rows a trimmed head keeps: above all the tokens without which some texts could not be written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgespec.errors import InputError
from edgespec.exporters.head import always_kept, by_frequency, from_file
from tests.helpers.checkpoints import CONTROL, LETTERS, MERGES, TOKENS, tokenizer_json

BYTE_LEVEL = json.dumps(tokenizer_json()).encode()
FIXED = set(range(len(CONTROL) + len(LETTERS)))  # in the tiny tokenizer every byte stands before the merges
STOP = TOKENS.index("Ġw")


def sentence_pieces(kind: str) -> bytes:
    """A SentencePiece-like vocabulary: control tokens, 256 byte tokens, words and single characters."""
    words = ["▁", "e", "▁the", "▁한", "국", "한국", "<0xyz>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    added = [
        dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, t in enumerate(tokens[:3])
    ]
    model: dict[str, Any] = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    if kind == "Unigram":
        model = {"type": "Unigram", "unk_id": 0, "vocab": [[t, -float(i)] for i, t in enumerate(tokens)]}
    return json.dumps(dict(version="1.0", added_tokens=added, model=model)).encode()


def test_byte_level_keeps_every_byte_special_and_stop_token() -> None:
    assert always_kept(BYTE_LEVEL, (STOP,)) == FIXED | {STOP}
    assert len(LETTERS) == 256


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_byte_fallback_keeps_the_byte_tokens_and_not_every_single_character(kind: str) -> None:
    """Bug: thousands of single CJK characters of a SentencePiece vocabulary took frequent words' rows."""
    assert always_kept(sentence_pieces(kind), (261,)) == {*range(259), 261}


def test_rows_go_to_the_text_s_most_frequent_tokens_then_to_low_ids() -> None:
    text = "hello hello  world he"
    counts = Counter(Tokenizer.from_str(BYTE_LEVEL.decode()).encode(text).ids)
    ids = by_frequency(BYTE_LEVEL, (1,), text, len(FIXED) + 2, 288)
    rest = sorted(set(ids.tolist()) - FIXED, key=lambda i: (-counts[i], i))
    merged = sorted((i for i in range(len(FIXED), 288)), key=lambda i: (-counts[i], i))
    assert sorted(rest) == sorted(merged[:2]) and counts[merged[0]] >= 1
    assert ids.tolist() == sorted(set(ids.tolist())) and set(ids.tolist()) >= FIXED
    unseen = by_frequency(BYTE_LEVEL, (1,), "", len(FIXED) + 3, 288)
    assert unseen.tolist() == list(range(len(FIXED) + 3))
    assert len(TOKENS) == len(FIXED) + len(MERGES)


@pytest.mark.parametrize("rows", [1, len(FIXED), 288])
def test_what_must_be_kept_is_kept_even_in_too_few_rows(rows: int) -> None:
    ids = by_frequency(BYTE_LEVEL, (STOP,), "hello", rows, 288)
    assert FIXED | {STOP} <= set(ids.tolist()) and len(ids) == max(rows, len(FIXED) + 1)
    assert ids.dtype == np.int64 and ids.max() < 288


def test_ids_beyond_the_vocabulary_are_not_rows() -> None:
    assert by_frequency(BYTE_LEVEL, (STOP,), "hello", 40, 100).max() < 100


def test_a_file_of_ids_is_joined_with_what_must_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("270\n\n 263 \n5\n270\n")
    assert from_file(path, BYTE_LEVEL, (STOP,), 288).tolist() == sorted(FIXED | {STOP, 263, 270})


@pytest.mark.parametrize("line", ["288", "-1", "1.5", "hello", "²", "1 2", "9" * 5000, "0x10"])
def test_a_line_that_is_no_id_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(f"3\n{line}\n")
    with pytest.raises(InputError, match=r"ids\.txt line 2: .* is no token id below 288"):
        from_file(path, BYTE_LEVEL, (), 288)

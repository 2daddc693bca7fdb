"""A vocabulary file comes back as it was written, and only to the tokenizer that it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import InputError
from edgespec.vocabulary import SCHEMA, Vocabulary, hash_of, is_vocabulary, read, write
from tests.helpers.checkpoints import tokenizer_json

TOKENIZER = json.dumps(tokenizer_json()).encode()
GOOD = Vocabulary(SCHEMA, hash_of(TOKENIZER), (270, 3, 5), {"target": "tiny"})


def test_round_trip(tmp_path: Path) -> None:
    write(GOOD, tmp_path / "v.json")
    assert read(tmp_path / "v.json", TOKENIZER, 288) == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]
    assert is_vocabulary(tmp_path / "v.json")
    (tmp_path / "lines").write_text("3\n5\n")
    assert not is_vocabulary(tmp_path / "lines")


def test_the_hash_is_of_what_ids_mean() -> None:
    data = tokenizer_json()
    assert hash_of(json.dumps(data, indent=3).encode()) == GOOD.tokenizer_sha256
    tokens = list(data["model"]["vocab"])
    a, b = tokens[10], tokens[11]
    data["model"]["vocab"][a], data["model"]["vocab"][b] = (data["model"]["vocab"][x] for x in (b, a))
    assert hash_of(json.dumps(data).encode()) != GOOD.tokenizer_sha256


def text(**changes: Any) -> str:
    data = {"schema": SCHEMA, "tokenizer_sha256": GOOD.tokenizer_sha256, "token_ids": [1, 2], "made": {}}
    return json.dumps({k: v for k, v in {**data, **changes}.items() if v is not None})


REFUSED = [
    ("{", "v.json is not JSON"),
    ("[1]", "v.json has schema 'None', not edgespec.vocabulary/1"),
    (text(schema="edgespec.vocabulary/2"), "has schema 'edgespec.vocabulary/2', not edgespec.vocabulary/1"),
    (text(tokenizer_sha256="0" * 64), "v.json is of another tokenizer than the target's"),
    (text(token_ids=[1, 288]), "v.json holds the id 288, and the head has 288 rows"),
    (text(token_ids=[1, 2, 1]), "v.json holds an id twice"),
    (text(token_ids=[1, -2]), r"v.json.token_ids\[1\]: is negative"),
    (text(token_ids=["1"]), r"v.json.token_ids\[0\]: is a text, not int"),
    (text(token_ids=None), "v.json: field 'token_ids' is missing"),
    (text(more=1), "v.json: unknown field 'more'"),
    ("{" + '"a":{' * 100_000, "v.json is not JSON"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[r[1][:30] for r in REFUSED])
def test_files_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "v.json", TOKENIZER, 288)
    assert "edgespec trim" in caught.value.hint


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/v.json cannot be written: No such file"):
        write(GOOD, tmp_path / "nowhere" / "v.json")

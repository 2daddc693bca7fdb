"""A vocabulary file: which tokens a draft's trimmed head has rows for. Knows ids and hashes, no tensors.

JSON of schema edgespec.vocabulary/1, bound to a tokenizer by the hash of what its ids mean. Ids are absolute:
those of the tokenizer, never places in another list.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer

from edgespec.errors import EdgespecError, InputError
from edgespec.files import written_whole
from edgespec.plain import from_json

SCHEMA = "edgespec.vocabulary/1"
LARGEST = 64 * 2**20  # bytes
AGAIN = "make it again: edgespec trim"


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a draft's head: absolute token ids, most frequent first, and how they were chosen."""

    schema: str
    tokenizer_sha256: str
    token_ids: tuple[int, ...]
    made: dict[str, str] = field(default_factory=dict)


def hash_of(tokenizer_json: bytes) -> str:
    """SHA-256, in hex, of what every id of a tokenizer means; how its file is written makes no difference."""
    tokens = Tokenizer.from_str(tokenizer_json.decode()).get_vocab()
    pairs = sorted((i, token) for token, i in tokens.items())
    return sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Write the file whole or not at all."""
    try:
        written_whole(path, json.dumps(asdict(vocabulary)) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another with -o") from None


def is_vocabulary(path: Path) -> bool:
    """True for a file that is JSON rather than lines of ids."""
    with path.open("rb") as file:
        return file.read(256).lstrip()[:1] == b"{"


def read(path: Path, tokenizer_json: bytes, vocab: int) -> Vocabulary:
    """The file's vocabulary; InputError for one that is damaged, or of another tokenizer or version."""
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path.name} is larger than {LARGEST >> 20} MiB", AGAIN)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not JSON ({str(error)[:80]})", AGAIN) from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path.name} has schema {str(schema)[:40]!r}, not {SCHEMA}", AGAIN)
    try:
        found: Vocabulary = from_json(Vocabulary, data, path.name)
    except EdgespecError as error:
        raise InputError(error.message, AGAIN) from None
    if found.tokenizer_sha256 != hash_of(tokenizer_json):
        raise InputError(f"{path.name} is of another tokenizer than the target's", f"{AGAIN} TARGET")
    if wrong := [i for i in found.token_ids if i >= vocab]:
        raise InputError(f"{path.name} holds the id {wrong[0]}, and the head has {vocab} rows", AGAIN)
    if len(set(found.token_ids)) < len(found.token_ids):
        raise InputError(f"{path.name} holds an id twice", AGAIN)
    return found

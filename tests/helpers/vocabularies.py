"""Real vocabularies of 32,000 and 128,256 tokens (shared/data/vocab) as tokenizers of the tokenizers library.

Byte-pair merges are not in these files: any two tokens whose whole is a token may merge, those of the better
whole first, which is how both families' own programs work.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

DATA = Path(__file__).parents[2].parent / "shared" / "data"
LLAMA2, LLAMA3 = DATA / "vocab" / "llama2" / "tokenizer.bin", DATA / "vocab" / "llama3" / "tokenizer.model"
SPECIAL, BYTES = 3, 256  # of llama2, the first ids: <unk>, <s>, </s>; then the bytes
NAMED = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
NAMED |= {"<|eot_id|>": 9}  # of llama3's 256 special tokens, which come last
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama2() -> tokenizers.Tokenizer:
    """SentencePiece's byte-pair vocabulary: words start with a mark, what it lacks are byte tokens."""
    tokens, scores = zip(*entries(LLAMA2.read_bytes()), strict=True)
    names = ["<unk>", "<s>", "</s>", *(t.replace(" ", "▁") for t in tokens[SPECIAL:])]
    vocab = {name: i for i, name in enumerate(names)}
    whole = {name: scores[i] for name, i in vocab.items() if i >= SPECIAL + BYTES}
    pairs = sorted(splits(whole), key=lambda pair: -whole[pair[0] + pair[1]])
    made = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(names[:SPECIAL])
    return made


def entries(content: bytes) -> Iterator[tuple[str, float]]:
    """(token, score) of llama2.c's format: the longest length, then a score, a length and bytes each."""
    at = 4
    while at < len(content):
        score, size = struct.unpack_from("<fi", content, at)
        yield content[at + 8 : at + 8 + size].decode(), score
        at += 8 + size


def llama3() -> tokenizers.Tokenizer:
    """A tiktoken vocabulary of byte strings, ranked by id, and 256 special tokens."""
    letters = byte_letters()
    lines = LLAMA3.read_text().split("\n")
    ranks = {
        "".join(letters[b] for b in base64.b64decode(token)): int(rank)
        for token, rank in (line.split() for line in lines if line)
    }
    pairs = sorted(splits(ranks), key=lambda pair: ranks[pair[0] + pair[1]])
    made = tokenizers.Tokenizer(models.BPE(ranks, pairs, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    made.decoder = decoders.ByteLevel()
    names = {place: name for name, place in NAMED.items()}
    special = [names.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return made


def splits(whole: dict[str, float] | dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that is a token together."""
    for token in whole:
        for i in range(1, len(token)):
            if token[:i] in whole and token[i:] in whole:
                yield token[:i], token[i:]


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in own}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    return [letters[b] for b in range(256)]

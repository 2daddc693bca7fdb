"""Korean, emoji and mixed scripts through streaming and stop strings, with three real vocabularies."""

from __future__ import annotations

import random
from functools import cache

import pytest
import tokenizers

from edgespec.exporters.checkpoint import demo_file
from edgespec.exporters.gguf_file import read_gguf
from edgespec.exporters.tokenizer import gguf_tokenizer
from edgespec.runtime.text import UNKNOWN, Streamed
from tests.helpers import vocabularies

SYLLABLES = "".join(map(chr, range(0xAC00, 0xD7A4)))
JAMO = "".join(
    chr(c)
    for first, last in (
        (0x1100, 0x11FF),
        (0x3131, 0x318E),
        (0xA960, 0xA97C),
        (0xD7B0, 0xD7C6),
        (0xD7CB, 0xD7FB),
    )
    for c in range(first, last + 1)
)
EMOJI = "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 ❤️‍🔥 👍🏻👍🏼👍🏽👍🏾👍🏿 🇰🇷🇺🇸🇯🇵 1️⃣#️⃣*️⃣ 😀🥹🫠 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👁️‍🗨️ ☕️ ©️"
MIXED = (
    "안녕 hello 世界 こんにちは мир שלום नमस्ते สวัสดี 𝒳𝓎 café naïve 뷁쒧 ㅋㅋㅋ ㅠㅠ e\u0301 "
    "가나다abc123라마바, 「東京」へ go! x²≤y³ ½ ₩10,000"
)
LETTERLESS = (
    "12:30, 3.14% (+82) 010-1234-5678!! ...?? ~^^ 😂😂 👍🏽 → ₩5,000 / #1 @ 2026.11.27 \n\n--- *** 100%"
)
TEXTS = {
    "syllables": SYLLABLES,
    "words": "".join(random.Random(0).sample(list(SYLLABLES + JAMO + "     \n"), 4000)),
    "jamo": JAMO,
    "emoji": EMOJI,
    "mixed": MIXED,
    "letterless": LETTERLESS,
}


def demo() -> tokenizers.Tokenizer:
    file = demo_file()
    content = gguf_tokenizer(read_gguf(file).fields, file.name).tokenizer_json
    return tokenizers.Tokenizer.from_str(content.decode())


SOURCES = {"49152": demo, "32000": vocabularies.llama2, "128256": vocabularies.llama3}


@cache
def vocabulary(size: str) -> tokenizers.Tokenizer:
    made = SOURCES[size]()
    assert made.get_vocab_size() == int(size)
    return made


def streamed(size: str, ids: list[int], *stops: str) -> tuple[list[str], bool]:
    """The pieces of a text that ends after these tokens, and whether a stop string ended it."""
    out = Streamed(vocabulary(size), stops)
    return [*(out.feed(token) for token in ids), out.end()], out.stopped


def encoded(size: str, text: str) -> list[int]:
    return vocabulary(size).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", SOURCES)
def test_a_text_streams_to_itself_in_whole_characters(size: str, text: str) -> None:
    pieces, _ = streamed(size, encoded(size, TEXTS[text]))
    assert "".join(pieces) == TEXTS[text]
    assert UNKNOWN not in "".join(pieces)


@pytest.mark.parametrize("text", [EMOJI, MIXED, LETTERLESS], ids=["emoji", "mixed", "letterless"])
@pytest.mark.parametrize("size", SOURCES)
def test_a_text_that_ends_anywhere_has_no_half_character(size: str, text: str) -> None:
    """However many tokens an answer may have: what was given out begins the text, and no more is lost than
    the character that was not whole.
    """
    ids = encoded(size, text)
    longest = 0
    for count in range(len(ids) + 1):
        said = "".join(streamed(size, ids[:count])[0])
        assert text.startswith(said)
        assert longest <= len(said)
        longest = len(said)
    assert longest == len(text)


@pytest.mark.parametrize("size", SOURCES)
@pytest.mark.parametrize("stop", ["그만", "뷁", "끝.", "ㅋㅋ", "👩‍👩‍👧", "\n질문:", "🇰🇷", "100%"])
def test_a_stop_string_ends_the_text_however_its_tokens_lie(size: str, stop: str) -> None:
    before = "오늘은 여기까지 하고 그 만 끝 ㅋ 👩‍👩 🇺🇸 10 질문: "
    ids = encoded(size, f"{before}{stop} 뒤에 더 있어요")
    pieces, stopped = streamed(size, ids, "없는 말", stop)
    assert stopped and "".join(pieces) == before
    # its own characters byte by byte, where the vocabulary lets them be: a boundary in every place
    letters = [token for character in f"가{stop}나" for token in encoded(size, character)]
    said, stopped = streamed(size, letters, stop)
    whole = vocabulary(size).decode(letters)
    assert stopped == (stop in whole) and "".join(said) == whole.split(stop)[0]


@pytest.mark.parametrize("size", SOURCES)
def test_stop_strings_lie_over_several_tokens(size: str) -> None:
    """The cases above would show nothing if each stop string were a token of its own."""
    assert len(encoded(size, "a뷁그만")) > 3


@pytest.mark.parametrize("size", SOURCES)
def test_half_a_stop_string_is_text_after_all(size: str) -> None:
    text = "그만두지 않고 그마"
    pieces, stopped = streamed(size, encoded(size, text), "그만해")
    assert "".join(pieces) == text and not stopped


def test_how_many_tokens_korean_is() -> None:
    text = "안녕하세요! 오늘 날씨가 참 좋네요."
    counts = {size: len(encoded(size, text)) for size in SOURCES}
    assert counts["128256"] < counts["32000"] < counts["49152"] < len(text.encode())

"""Streaming and templates: text comes whole, in order, never as half a character."""

from __future__ import annotations

import string
from functools import cache

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from edgespec.errors import BundleError, InputError
from edgespec.exporters.checkpoint import demo_file
from edgespec.exporters.gguf_file import read_gguf
from edgespec.exporters.tokenizer import gguf_tokenizer
from edgespec.runtime.text import Streamed, overlap, render

KOREAN = "안녕하세요! 오늘 날씨가 참 좋네요. 👩‍👩‍👧 🇰🇷 뷁쒧"


@cache
def tokenizer() -> tokenizers.Tokenizer:
    path = demo_file()
    return tokenizers.Tokenizer.from_str(
        gguf_tokenizer(read_gguf(path).fields, path.name).tokenizer_json.decode()
    )


def pieces(text: str, *stops: str) -> tuple[list[str], Streamed]:
    streamed = Streamed(tokenizer(), stops)
    out = [streamed.feed(t) for t in tokenizer().encode(text, add_special_tokens=False).ids]
    return [*out, streamed.end()], streamed


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_any_text_streams_to_itself(text: str) -> None:
    wanted = tokenizer().decode(tokenizer().encode(text, add_special_tokens=False).ids)
    assume("\ufffd" not in wanted)  # this vocabulary lacks a few bytes
    assert "".join(pieces(text)[0]) == wanted


@cache
def byte_fallback() -> tokenizers.Tokenizer:
    """A vocabulary of Llama 2's kind: words start with a mark, other characters are bytes."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + [f"▁{c}" for c in string.ascii_letters]
    tokens += ["▁", *string.ascii_letters]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", c) for c in string.ascii_letters]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab é안녕🇰🇷\n"), max_size=30))
def test_byte_tokens_stream_to_their_text(text: str) -> None:
    streamed = Streamed(byte_fallback())
    ids = byte_fallback().encode(text, add_special_tokens=False).ids
    assert "".join(streamed.feed(t) for t in ids) + streamed.end() == byte_fallback().decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 310), max_size=12))
def test_bytes_that_are_no_text_end_nothing(ids: list[int]) -> None:
    """A broken byte spoils the run of byte tokens before it, part of which was given out; it raised."""
    streamed = Streamed(byte_fallback())
    out = "".join(streamed.feed(t) for t in ids) + streamed.end()
    wanted = byte_fallback().decode(ids)
    assert out == wanted or "\ufffd" in wanted


def test_korean_and_emoji_are_never_half() -> None:
    out, _ = pieces(KOREAN)
    assert "".join(out) == KOREAN
    assert len([p for p in out if p]) > 10
    assert not any("\ufffd" in p for p in out)


def test_a_character_that_never_ends_is_left_out() -> None:
    streamed = Streamed(tokenizer())
    ids = tokenizer().encode("a뷁", add_special_tokens=False).ids
    assert len(ids) > 2
    assert "".join(streamed.feed(t) for t in ids[:-1]) + streamed.end() == "a"


@pytest.mark.parametrize("stop", ["###", "\n\nUser:", "좋네요", "."])
def test_stop_strings_end_the_text_before_them(stop: str) -> None:
    text = f"one two ## three{stop} four\n\nUse {KOREAN}"
    out, streamed = pieces(text, stop, "never")
    assert "".join(out) == text[: text.index(stop)]
    assert streamed.stopped


def test_half_a_stop_string_is_text_after_all() -> None:
    out, streamed = pieces("wait ## no", "###")
    assert "".join(out) == "wait ## no"
    assert not streamed.stopped


def test_overlap() -> None:
    assert [overlap(text, "###") for text in ("", "a", "a#", "a##", "###")] == [0, 0, 1, 2, 2]


def test_messages_are_rendered_in_turn() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}{{ {'k': 'é'} | tojson }}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{{ tools is none }}"
    )
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert render(template, said, "<s>", "</s>") == '<s><user>hi<assistant>yo<a>{"k": "é"}</s>True'


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
            BundleError,
            "cannot be rendered",
        ),
        ("{% for m in messages %}{{ m.content }", BundleError, "cannot be rendered"),
        ("{{ 1 / 0 }}", BundleError, "division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", BundleError, "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", BundleError, "recursion depth"),
        ("{{ raise_exception('roles must alternate') }}", InputError, "roles must alternate"),
    ],
)
def test_a_hostile_or_broken_template_is_two_lines(template: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        render(template, [{"role": "user", "content": "hi"}], "")

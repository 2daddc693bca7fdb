"""A post's words, in any script: links gone, accounts and hashtags read, Korean particles taken off.

Knows no artist. Korean is cut by rule, not by a dictionary: a particle goes where two syllables stay.
"""

from __future__ import annotations

import html
import re
import unicodedata

LINK = re.compile(r"(?:https?://|www\.|pic\.twitter\.com/|t\.co/)\S*", re.IGNORECASE)
REPEATED = re.compile(r"^\s*RT\s+@\w+:?")  # what a repeated post begins with
JAMO = re.compile(r"[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\ud7b0-\ud7ff]+")  # laughter, tears
SURROGATE = re.compile(r"[\ud800-\udfff]")
# An account, or a run of Hangul, or a run of other letters and digits: `BTS가`, `IU's` are two.
TOKEN = re.compile(r"@\w+|#|[가-힣]+|(?:(?![가-힣])[^\W_])+(?:['’](?!s\b)[a-z]+)?", re.IGNORECASE)
HANGUL = re.compile(r"[가-힣]+")
HASH = "#"
LONGEST_WORD = 40  # letters
STEM = 2  # syllables that stay at least when a particle is taken off a word
# What may follow a noun, longest first where one begins another; two may follow each other (에게는, 들이).
PARTICLES = sorted(
    [
        "이", "가", "은", "는", "을", "를", "의", "에", "에서", "에게", "에게서", "께", "께서",
        "한테", "와", "과", "랑", "이랑", "하고", "도", "만", "로", "으로", "보다", "처럼", "같은",
        "같이", "부터", "까지", "마저", "조차", "밖에", "이나", "나", "이라도", "라도", "이라", "라",
        "이라고", "라고", "이란", "란", "이다", "다", "야", "이야", "아", "요", "이요", "예요",
        "이에요", "에요", "입니다", "인데", "이고", "고", "이며", "이면", "면", "들", "님", "씨",
        "네", "때문에", "덕분에", "대신", "뿐",
    ],
    key=len, reverse=True,
)  # fmt: skip
TAIL = re.compile(f"(?:{'|'.join(PARTICLES)}){{1,2}}")


def plain(text: str) -> str:
    """The text for cutting: entities resolved, links and runs of jamo gone, one form of every letter."""
    text = SURROGATE.sub(" ", html.unescape(text))
    text = JAMO.sub(" ", LINK.sub(" ", REPEATED.sub(" ", text)))
    return unicodedata.normalize("NFKC", text)


def tokens(text: str) -> list[str]:
    """Runs of letters and digits in their order, folded; `@name` is one, a hashtag's `#` one of its own."""
    return TOKEN.findall(plain(text).casefold())


def is_tail(text: str) -> bool:
    """Is this nothing, or one or two particles?"""
    return not text or TAIL.fullmatch(text) is not None


def stem(token: str) -> str:
    """A Hangul word without its last particle, where two syllables stay; any other word as it is."""
    if HANGUL.fullmatch(token):
        for particle in PARTICLES:
            if token.endswith(particle) and len(token) - len(particle) >= STEM:
                return token[: -len(particle)]
    return token


def is_word(token: str) -> bool:
    """May a token be counted as a word? Accounts, numbers, single Latin letters, bare particles and what is
    too long for a word may not.
    """
    if token.startswith("@") or token == HASH or token.isdigit() or TAIL.fullmatch(token):
        return False
    return (len(token) > 1 or not token.isascii()) and len(token) <= LONGEST_WORD

"""What the recommender reads: lines that are no posts, words of two languages, artists in them."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path

import pytest

from edgespec.errors import InputError
from edgespec.workloads.recommend import artists as lists
from edgespec.workloads.recommend import posts
from edgespec.workloads.recommend.posts import Faults, Post
from edgespec.workloads.recommend.split import worded
from edgespec.workloads.recommend.tokens import stem, tokens

LIST = """BTS | 방탄소년단 | @BTS_twt
IU|아이유
IVE | 아이브
NCT
NCT 127 | 엔시티 127
비
Stray Kids | 스트레이 키즈
(G)I-DLE | 여자아이들
Girls' Generation | 소녀시대"""
ARTISTS = lists.parsed(LIST.splitlines(), "a test")


def lines(content: bytes) -> tuple[list[Post], Faults]:
    faults = Faults()
    found = [post for post, _ in posts.read(io.BytesIO(content), 0, faults) if post]
    return found, faults


def test_every_line_is_a_post_or_a_named_fault() -> None:
    good = json.dumps({"user": "a", "text": "안녕 hello", "time": "2025"}, ensure_ascii=False).encode()
    bad = [b"{broken", b"[1]", b'"text"', b'{"text": "x"}', b'{"user": "a"}', b'{"user": "a", "text": "  "}']
    bad += [b'{"user": true, "text": "x"}', b'{"user": "a", "text": 5}', b'\xff\xfe{"user"', b"[" * 100_000]
    numbers = b'{"user": 7, "text": "x"}'
    found, faults = lines(b"\xef\xbb\xbf" + b"\n".join([good, *bad, b"", numbers]))
    assert found == [Post("a", "안녕 hello", "2025"), Post("7", "x", "")]
    assert faults.counts == {
        posts.NOT_JSON: 2, posts.NO_OBJECT: 2, posts.NO_USER: 2, posts.NO_TEXT: 3, posts.NOT_UTF8: 1,
    }  # fmt: skip
    assert faults.lines[posts.NOT_JSON] == [2, 11]
    assert "2 lines no JSON object: 3, 4" in faults.shown()


def test_a_line_of_100_mb_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "posts.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"user": "a", "text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"user": "b", "text": "after"}')
    before, faults = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Faults()
    with open(path, "rb") as file:
        found = list(posts.read(file, 0, faults))
    assert [post for post, _ in found] == [None, Post("b", "after", "")]
    assert found[-1][1] == path.stat().st_size and faults.lines == {posts.TOO_LONG: [1]}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_half_characters_go() -> None:
    found, _ = lines(b'{"user": "a\\ud800", "text": "x \\udfff y"}')
    assert found[0].user.encode() == b"a?" and found[0].text.encode() == b"x ? y"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("RT @friend: 콘서트에서 봤어 ㅋㅋㅋ https://t.co/abc", ["콘서트", "봤어"]),
        (
            "The show&#39;s great &amp; fun 😭 #concert_day 2025",
            ["the", "show", "great", "fun", "concert", "day"],
        ),
        ("친구랑 앨범을 ㅠㅠ 가 나도", ["친구", "앨범"]),
        ("ｆｕｌｌ ｗｉｄｔｈ www.example.com/콘서트", ["full", "width"]),
        ("😭😭 !!! ㅋㅋ 123 https://x.y", []),
        ("x" * 41, []),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert worded(tokens(text)) == wanted


def test_a_particle_goes_where_two_syllables_stay() -> None:
    assert [stem(word) for word in ("콘서트가", "앨범에서", "가나", "나도", "live")] == [
        "콘서트", "앨범", "가나", "나도", "live",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("방탄소년단이 좋아", {"BTS"}),
        ("BTS가 최고, bts!", {"BTS"}),
        ("@bts_twt 사랑해", {"BTS"}),
        ("@IU_fan 안녕", set()),  # another's account
        ("live IUism believe gives", set()),  # inside words
        ("IU랑 IVE 같이", {"IU", "IVE"}),
        ("IU's new song", {"IU"}),
        ("아이유에게는", {"IU"}),
        ("아이브로우 샀다", set()),  # an eyebrow
        ("여자아이들이 온다", {"(G)I-DLE"}),
        ("NCT 127 왔다", {"NCT 127"}),  # the longer name alone
        ("NCT 127, and NCT", {"NCT 127", "NCT"}),
        ("엔시티 127이랑 #NCT127", {"NCT 127"}),
        ("비가 온다", set()),  # rain
        ("#비 콘서트", {"비"}),
        ("#StrayKids 스트레이 키즈가", {"Stray Kids"}),
        ("Girls’ Generation and girls", {"Girls' Generation"}),
        ("https://t.co/IU", set()),
    ],
)
def test_artists_are_found_as_whole_words(text: str, wanted: set[str]) -> None:
    assert ARTISTS.named(text) == wanted


def test_a_list_with_duplicates_loses_nobody() -> None:
    given = ["BTS | 방탄소년단", "", "bts|Bangtan", "...", "IU", "방탄소년단 | x", "Rain | IU"]
    found = lists.parsed(given, "a test")
    assert found.names == ("BTS", "IU", "Rain")
    assert found.named("bangtan") == {"BTS"} and found.named("IU 방탄소년단") == {"IU", "BTS"}
    assert found.notes == (
        "line 3: bts is in the list already; merged",
        "line 4: no name in '...'",
        "line 6: 방탄소년단 is a spelling of BTS already; left out",
        "line 7: IU stays a spelling of IU",
    )


@pytest.mark.parametrize("content", [b"", b"\n ... \n", b"\xff\xfe"])
def test_a_list_of_nobody_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "artists.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"names nobody|not UTF-8"):
        lists.read(path)

"""What the model may say of a cluster: candidates of the list and ordinary words; else it is plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgespec.workloads.recommend import artists as lists
from edgespec.workloads.recommend.ranking import SMOOTHING, popular, ranked, recommended
from edgespec.workloads.recommend.wording import (
    MODEL,
    PLAIN,
    TRIES,
    Asked,
    ordinary,
    plainly,
    problem,
    readable,
    word,
)

ARTISTS = lists.parsed(["BTS | 방탄소년단", "IU", "IVE", "Stray Kids", "Winner"], "a test")
ASKED = Asked(("concert", "ticket", "encore"), ("IU", "Stray Kids"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("If you love a good concert, you may also like IU and Stray Kids.", None),
        ("If you love a good concert, you may also like IU.", None),
        ("If you love a good concert, you may also like BTS and IU.", "names BTS, which is no candidate"),
        ("If you love a good concert, you may also like 방탄소년단.", "names BTS, which is no candidate"),
        ("If you love a good concert, you may also like music.", "names none of the candidates"),
        ("If you love IU, you may also like Taylor Swift.", "'taylor' is no ordinary word"),
        ("if you love iu, you may also like taylor swift.", "'taylor' is no ordinary word"),
        ("If you love IU, you may also like 뉴진스 too.", "'뉴진스' is no ordinary word"),
        ("If you love IU, you may also like the Time of music.", "'Time' is written like a name"),
        ("If you love IU, you may also like winner of the year.", "names Winner, which is no candidate"),
        ("IU and Stray Kids.", "1 words beside the names"),
        ("IU " * 200, "too long"),
        ("", "names none of the candidates"),
    ],
)  # fmt: skip
def test_a_text_names_candidates_and_nobody_else(said: str, why: str | None) -> None:
    found = problem("text", said, ASKED, ARTISTS)
    assert found == why if why is None else found is not None and found.startswith(why)


@pytest.mark.parametrize(
    ("said", "fine"),
    [
        ("The Encore Concert", True),
        ("Music Fans", False),
        ("IU Concert", False),
        ("Concert Beyonce", False),
        ("", False),
    ],
)
def test_a_name_is_of_the_clusters_words(said: str, fine: bool) -> None:
    assert (problem("name", said, ASKED, ARTISTS) is None) is fine


def test_tries_are_bounded_and_then_it_is_plain(tmp_path: Path) -> None:
    prompts: list[str] = []

    def says_nonsense(prompt: str) -> str:
        prompts.append(prompt)
        return "Taylor Swift!"

    (done,) = word([ASKED], ARTISTS, says_nonsense, tmp_path / "w.jsonl", lambda done, total: None)
    # Three words can be turned three ways only, and what was refused once is not asked again.
    assert len(prompts) == len(set(prompts)) == 3 + TRIES
    assert (done.name_by, done.text_by, len(done.refused)) == (PLAIN, PLAIN, 3 + TRIES)
    assert done.text == "Fans like these also follow IU and Stray Kids."
    assert (done.name, done.text) == (plainly(0, ASKED).name, plainly(0, ASKED).text)


def test_what_is_worded_is_not_asked_again(tmp_path: Path) -> None:
    path, other = tmp_path / "w.jsonl", Asked(("dance", "cover"), ())

    def says(prompt: str) -> str:
        if "dance" in prompt and "title" not in prompt:
            raise AssertionError("there is nobody to recommend")
        return (
            '"Concert and dance: a story"\n\nMore.'
            if "title" in prompt
            else "You may like the music of IU. Or not."
        )

    first = word([ASKED], ARTISTS, says, path, lambda done, total: None)
    path.write_bytes(path.read_bytes() + b'{"cluster": 1, "na')  # a killed run's last line

    def once(prompt: str) -> str:
        assert "concert" not in prompt
        return says(prompt)

    both = word([ASKED, other], ARTISTS, once, path, lambda done, total: None)
    assert both[0] == first[0] and first[0].refused == ()
    assert (first[0].name, first[0].text) == ("Concert and dance", "You may like the music of IU.")
    assert (first[0].name_by, first[0].text_by) == (MODEL, MODEL)
    assert both[1].text == "These fans name no artist of the list."
    assert word([ASKED, other], ARTISTS, once, path, lambda done, total: None) == both


def test_ordinary_words_hold_no_name() -> None:
    assert {"love", "music", "the"} <= ordinary()
    assert not {"taylor", "beyonce", "blackpink", "bts"} & ordinary()


def test_a_model_is_shown_the_words_that_it_can_read() -> None:
    assert readable(["콘서트", "concert", "ticket"], lambda word: 2 if word.isascii() else 9) == (
        "concert",
        "ticket",
    )


def test_ranking_by_hand() -> None:
    """Of 10 fans 6 follow artist 0, as everyone does; 5 follow 1, as nobody else; 2 is followed elsewhere."""
    order = ranked([6, 5, 0], 10, [60, 5, 20], 100)
    assert [one.artist for one in order] == [1, 0]
    rate = (5 + SMOOTHING * 0.05) / (10 + SMOOTHING)
    assert (order[0].fans, order[0].rate, order[0].lift) == (5, rate, rate / 0.05)
    assert order[1].lift == pytest.approx(1.0)
    assert [one.artist for one in ranked([6, 5, 0], 10, [60, 5, 20], 100, power=0.0)] == [0, 1]


def test_one_fan_proves_little() -> None:
    """A cluster of one leans on everyone: who alone follows an artist raises no share above a half."""
    (one,) = ranked([1, 0], 1, [1, 50], 100)
    assert one.rate == pytest.approx((1 + SMOOTHING * 0.01) / (1 + SMOOTHING)) and one.rate < 0.5


def test_who_is_followed_is_not_recommended() -> None:
    assert popular([3, 0, 7]) == [2, 0]
    assert recommended([4, 2, 0, 1], {2, 0}, 2) == [4, 1]

"""Posts to recommendations without a model: clusters, ranking, resuming, input that is hard or hostile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import adjusted_rand_score

import edgespec.files
from edgespec.errors import InputError
from edgespec.progress import Progress
from edgespec.workloads.recommend import artists as lists
from edgespec.workloads.recommend import split
from edgespec.workloads.recommend.folder import FANS, Folder
from edgespec.workloads.recommend.pipeline import TOP, Found, find, result, write_fans
from edgespec.workloads.recommend.placing import placed
from edgespec.workloads.recommend.ranking import popular, recommended
from edgespec.workloads.recommend.report import to_html
from edgespec.workloads.recommend.speed import speed
from edgespec.workloads.recommend.synthetic import World, post
from edgespec.workloads.recommend.wording import Asked, plainly

QUIET = Progress(quiet=True)
ARTISTS = lists.parsed(["BTS | 방탄소년단", "IU", "Nobody"], "a test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 made-up fans with 24 posts each."""
    folder = tmp_path_factory.mktemp("fans")
    World(0, 60).write(folder, 60 * 24)
    return folder


def lines(path: Path, *rows: Any) -> Path:
    """A file of posts: a pair is user and text, anything else a line as it is."""
    texts = (json.dumps({"user": r[0], "text": r[1]}) if isinstance(r, tuple) else r for r in rows)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def found_in(path: Path, folder: Path, wanted: int = 0, artists: Any = ARTISTS) -> Found:
    return find(str(path), artists, wanted, Folder(folder, {}), QUIET)


def test_types_and_held_out_artists_are_found(tmp_path: Path) -> None:
    """Of 400 made-up fans; scripts/recommend_accuracy has more, with errors."""
    world = World(3, 400)
    known = {fan.user: fan for fan in world.fans}
    held = {fan.user: fan.follows[0] for fan in world.fans}
    path = tmp_path / "posts.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for fan, named, text in world.posts(400 * 16):
            if named != held[fan.user]:
                file.write(post(fan, text, 0) + "\n")
    artists = lists.parsed(world.artists().splitlines(), "made up")
    found = found_in(path, tmp_path / "out", artists=artists)
    rows = list(placed(Folder(tmp_path / "out", {}), found.split.shards))
    assert len(rows) > 390 and all(cluster >= 0 for _, cluster, *_ in rows)
    truth = [known[user].kind for user, *_ in rows]
    assert adjusted_rand_score(truth, [cluster for _, cluster, *_ in rows]) > 0.6
    orders = [[one.artist for one in ranking] for ranking in found.ranking]
    everyone = popular(found.everyone.follows)
    hits = [held[u] in recommended(orders[c], set(a), TOP) for u, c, _, a in rows]
    base = [held[u] in recommended(everyone, set(a), TOP) for u, _, _, a in rows]
    assert sum(hits) > 1.2 * sum(base) > 0
    # Names are found whatever their spelling: whom the posts name is whom they were made to name.
    assert all(set(a) <= set(known[u].follows) for u, _, _, a in rows)


def test_languages_are_not_clusters(tmp_path: Path) -> None:
    """Two types, each of fans who write Korean, English and both."""
    kinds = [
        ("콘서트 티켓 응원봉 공연장", "concert ticket lightstick venue"),
        ("안무 댄스 연습실 챌린지", "choreography dance practice challenge"),
    ]
    rows = []
    for number in range(90):
        korean, english = kinds[number % 2]
        text = {0: korean, 1: english, 2: f"{korean} {english}"}[number // 2 % 3]
        rows.append(
            (f"{number % 2}-{number}", f"{text} {'오늘 정말' if number // 2 % 3 == 0 else 'today really'}")
        )
    found_in(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out", 2)
    got = {user: cluster for user, cluster, *_ in placed(Folder(tmp_path / "out", {}), 1)}
    assert len({(user[0], cluster) for user, cluster in got.items()}) == 2


def test_a_run_killed_at_every_write_ends_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "CHECKPOINT", 300)
    monkeypatch.setattr(split, "BYTES_A_SHARD", 50_000)
    artists = lists.read(made / "artists.txt")

    def attempt(folder: Path) -> Found:
        run = Folder(folder, {})
        found = find(str(made / "posts.jsonl"), artists, 3, run, QUIET)
        write_fans(found, run)
        return found

    whole = attempt(tmp_path / "whole")
    assert whole.split.shards == 4
    put, left, kills = edgespec.files.os.replace, 0, 0

    def dying(old: Path, new: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        put(old, new)

    monkeypatch.setattr(edgespec.files.os, "replace", dying)
    while True:
        left = 2  # a file that is done and the next one, whose writer dies
        try:
            killed = attempt(tmp_path / "killed")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 6
    said = [plainly(i, Asked((), ())) for i in range(3)]
    assert result(killed, said) == result(whole, said)
    assert (tmp_path / "killed" / FANS).read_bytes() == (tmp_path / "whole" / FANS).read_bytes()


@pytest.mark.parametrize(
    ("rows", "wanted", "said"),
    [
        (["{broken", "[]"], 0, "holds no post"),
        ([("a", "concert ticket"), ("b", "dance cover")], 0, "no word in common"),
        ([("a", "😭😭"), ("b", "!!!")], 0, "no word in common"),
        (
            [("a", "concert day"), ("b", "concert night"), ("c", "concert")],
            9,
            "9 clusters are more than the ",
        ),
    ],
)
def test_what_cannot_be_clustered_is_told(tmp_path: Path, rows: list[Any], wanted: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        found_in(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out", wanted)


def test_a_cluster_of_one_and_fans_without_words(tmp_path: Path) -> None:
    rows = [(f"u{i}", "concert ticket tour BTS") for i in range(8)]
    rows += [
        ("lone", "concert dance dance dance IU"),
        ("mate", "dance IU"),
        ("silent", "😭"),
        ("odd", "xyzzy"),
    ]
    path = lines(tmp_path / "p.jsonl", *rows, "{broken")
    found = found_in(path, tmp_path / "out", 3)
    assert sorted(group.fans for group in found.groups) == [1, 1, 8]
    run = Folder(tmp_path / "out", {})
    write_fans(found, run)
    fans = {f["user"]: f for f in map(json.loads, (run.path / FANS).read_text().splitlines())}
    assert len(fans) == 12 and fans["silent"]["cluster"] is fans["odd"]["cluster"] is None
    assert fans["odd"]["recommended"] == ["BTS", "IU"]  # everyone's favourites
    told = result(found, [plainly(i, Asked((), ())) for i in range(3)])
    assert (told.unplaced, told.silent, told.unnamed) == (2, 1, ("Nobody",))
    assert told.faults == ("1 lines broken JSON: 13",)


def test_alike_fans_are_one_cluster(tmp_path: Path) -> None:
    rows = [(f"u{i}", "concert ticket IU") for i in range(5)]
    found = found_in(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out")
    assert [group.fans for group in found.groups] == [5] and found.places.silhouettes == {}


def test_a_user_who_writes_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgespec.workloads.recommend.fans.MOST_WORDS", 50)
    rows = [("bot", " ".join(f"word{i}x{j}" for j in range(40))) for i in range(20)] + [
        ("a", "tour"),
        ("b", "tour"),
    ]
    rows += [("bot", "tour tour tour")] * 9
    found_in(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out")
    fans = [json.loads(x) for x in (tmp_path / "out" / "work" / "fans-000.jsonl").read_text().splitlines()]
    (bot,) = [fan for fan in fans if fan[0] == "bot"]
    assert bot[1] == 29 and len(bot[2]) == 50 and bot[2]["tour"] == 27


def test_the_page_escapes_what_fans_write(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script> "><img src=x onerror=alert(2)> concert {{ 7777*7777 }}'
    rows = [(f"<b>u{i}</b>", f"{hostile} BTS") for i in range(3)]
    found = found_in(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out")
    made = result(found, [plainly(0, Asked(("<i>",), ("BTS",)))])
    page = to_html(made, speed([], []))
    assert "alert(1)" in page and "60481729" not in page.split("</style>")[1]
    tags = set(re.findall(r"<(\w+)", page.split("</style>")[1]))
    assert not tags & {"script", "img", "b>u0", "i"} and "src=" not in re.sub(r"&[^;]+;|src=x", "", page)
    assert "http" not in page  # nothing is loaded

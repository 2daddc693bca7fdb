"""The shipped suite and files of prompts: balance, names, digests."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from edgespec.suite import Item, digest, items

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_suite_is_balanced_and_names_its_licence() -> None:
    suite = items("specbench", None, 0)
    assert len(suite) == 65 and set(Counter(i.category for i in suite).values()) == {5}
    assert suite[0].name == "writing/1" and len({i.name for i in suite}) == len({i.text for i in suite}) == 65
    records = json.loads((ROOT / "edgespec" / "specbench.json").read_text())
    assert all(r["source"].startswith("Spec-Bench ") and "(Apache-2.0)" in r["source"] for r in records)


def test_a_limit_takes_categories_in_turns() -> None:
    fifteen = items("specbench", None, 15)
    counts = Counter(i.category for i in fifteen)
    assert len(counts) == 13 and sorted(counts.values())[-2:] == [2, 2]
    assert set(fifteen) < set(items("specbench", None, 16))


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n{"prompt": "c", "category": "x"}\n')
    chosen = items("specbench", str(path), 0)
    assert chosen == (Item("x/1", "x", "a"), Item("mine/1", "mine", "b"), Item("x/2", "x", "c"))
    assert items("specbench", str(path), 2) == chosen[:2]


def test_the_digest_is_of_texts_and_their_order() -> None:
    a, b = Item("x/1", "x", "a"), Item("x/2", "x", "b")
    assert digest((a, b)) != digest((b, a))
    assert digest((a,)) == digest((Item("y/9", "y", "a"),))

"""Prompts come out of every format that the data sets are in; a file without any is refused."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest

from edgespec.errors import InputError
from edgespec.prompts import Prompt, digest, read
from edgespec.suite import items


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.jsonl", '{"turns": ["one", "two"], "category": "qa"}\n\n{"question": "3?"}\n',
         [("one", "qa"), ("3?", "a")]),
        ("b.json", '[{"instruction": "sum", "input": "1, 2"}, {"instruction": "no", "input": ""}]',
         [("sum\n\n1, 2", "b"), ("no", "b")]),
        ("c.csv", 'Q,A,label\n"안녕, 너",b,0\n', [("안녕, 너", "c")]),
        ("d.txt", "first\n\n second \n", [("first", "d"), ("second", "d")]),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, text: str, wanted: list[tuple[str, str]]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / name) == read(tmp_path / f"{name}.gz") == [Prompt(*pair) for pair in wanted]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "holds no prompt"),
        ("a.jsonl", b"[1]", "record 1 is no object"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "line 2 is no JSON"),
        ("a.json", b"{}", "it is no list"),
        ("a.jsonl", json.dumps({"prompt": 7}).encode(), "a prompt is int, not text"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and caught.value.hint
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read(tmp_path / "absent.txt")


def test_a_line_ends_where_its_file_says_so(tmp_path: Path) -> None:
    """Unicode has further line separators, and JSON allows them inside a string."""
    text = "one\u2028two\x85three\x1d"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n", newline="")
    (tmp_path / "a.txt").write_text(f"{text}\nfour\r\n", newline="")
    assert [p.text for p in read(tmp_path / "a.jsonl")] == [text.strip()]
    assert [p.text for p in read(tmp_path / "a.txt")] == [text.strip(), "four"]


def test_no_test_prompt_is_among_those_that_the_shipped_draft_learned_from() -> None:
    """Their hashes ship with the draft; one of Spec-Bench would be among them."""
    learned = set((files("edgespec.exporters") / "demo_draft" / "prompts.sha256").read_text().split())
    assert len(learned) > 20000
    assert digest("Translate Korean to English: O형 남자와 썸을 타는데") in learned  # it is of them
    tests = [item.text for item in items("specbench", None, 0)]
    assert len(tests) == 65
    assert not [text for text in tests if digest(text) in learned]

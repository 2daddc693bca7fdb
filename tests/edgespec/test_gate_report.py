"""Every rendering of one verdict: what changed comes first, and all say the same."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from edgespec.gate import IMPROVEMENT, REGRESSION, UNCHANGED, UNKNOWN, Row, Rules, Verdict
from edgespec.gate_report import cells, github, junit, markdown, summary, table, to_json


def row(metric: str, verdict: str, unit: str = "bytes", base: float = 1000, new: float = 1001) -> Row:
    return Row(
        metric, "counted", unit, "less", base, new, new / base - 1, None, None, 0, verdict, "a | <reason>"
    )


WORSE = row("target decode 1, budget 16: weights a call", REGRESSION)
BETTER = row("time to first token", IMPROVEMENT, "s", 0.1, 0.09)
ODD = replace(row("peak memory", UNKNOWN), base=None, change=None)
SAME = row("phone-a: plain decoding", UNCHANGED, "tokens/s", 30, 30)
FAILED = Verdict((WORSE, BETTER, ODD, SAME), ("drafter: auto in the base, ngram in the new one",), Rules())
PASSED = Verdict((SAME,), (), Rules())


def test_figures_have_units_that_people_read() -> None:
    assert cells(WORSE)[1:4] == ["1,000 bytes", "1,001 bytes", "+0.10%"]
    assert cells(BETTER)[1:4] == ["100.000 ms", "90.000 ms", "-10.00%"]
    assert cells(ODD)[1:4] == ["-", "1,001 bytes", "-"]
    assert cells(SAME)[1:4] == ["30.00 tok/s", "30.00 tok/s", "+0.00%"]


def test_the_summary_names_the_first_reason() -> None:
    assert summary(FAILED) == (
        "failed: 1 regression, 1 improvement, 1 not enough data, 1 unchanged; first: "
        "target decode 1, budget 16: weights a call 1,000 bytes -> 1,001 bytes"
    )
    assert summary(PASSED) == "passed: 1 unchanged"


def test_the_table_leaves_unchanged_rows_to_the_count() -> None:
    lines = table(FAILED).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:4]] == [r.metric for r in FAILED.rows[:3]]
    assert lines[-2:] == ["differs  drafter: auto in the base, ngram in the new one", summary(FAILED)]
    assert table(PASSED) == "passed: 1 unchanged\n"


def test_markdown_folds_what_is_unchanged() -> None:
    text = markdown(FAILED)
    shown, _, folded = text.partition("<details><summary>1 unchanged</summary>")
    assert shown.startswith(f"### edgespec: {summary(FAILED)}\n")
    assert all(r.metric in shown for r in FAILED.rows[:3]) and SAME.metric not in shown
    assert SAME.metric in folded
    assert "a \\| &lt;reason>" in shown  # a bar would end the cell, a bracket begin a tag
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {7}


def test_junit_has_a_case_for_every_row() -> None:
    suite = ElementTree.fromstring(junit(FAILED))
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped")} == {
        "tests": "4", "failures": "1", "skipped": "1",
    }  # fmt: skip
    kinds = [(case.get("name"), case[0].tag) for case in suite]
    assert kinds == [
        (WORSE.metric, "failure"), (BETTER.metric, "system-out"), (ODD.metric, "skipped"),
        (SAME.metric, "system-out"),
    ]  # fmt: skip
    assert suite[0][0].get("message") == "1,000 bytes -> 1,001 bytes: a | <reason>"


def test_annotations_are_lines_that_github_reads() -> None:
    odd = replace(WORSE, reason="50 %\nsure")
    lines = github(Verdict((odd, SAME), (), Rules()))
    assert lines == [
        "::error title=edgespec regression::target decode 1, budget 16: weights a call: "
        "1,000 bytes -> 1,001 bytes (50 %25%0Asure)",
        "::error title=edgespec::failed: 1 regression, 1 unchanged; first: target decode 1, budget 16: "
        "weights a call 1,000 bytes -> 1,001 bytes",
    ]
    assert github(PASSED) == ["::notice title=edgespec::passed: 1 unchanged"]


def test_json_holds_every_row_and_the_answer() -> None:
    data = to_json(FAILED)
    assert data["passed"] is False and len(data["rows"]) == 4
    assert data["counts"] == {"regression": 1, "improvement": 1, "not enough data": 1, "unchanged": 1}

"""A Verdict as text, Markdown, JUnit XML, GitHub annotations and JSON, from the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from edgespec.gate import IMPROVEMENT, REGRESSION, UNCHANGED, UNKNOWN, VERDICTS, Row, Verdict
from edgespec.rendering import grid, printed

HEAD = ("figure", "base", "new", "change", "verdict", "why")
WORDS = {REGRESSION: "error", IMPROVEMENT: "notice", UNKNOWN: "warning"}
SCALES: dict[str, tuple[float, str, str]] = {
    "s": (1e3, "ms", ",.3f"),
    "tokens/s": (1, "tok/s", ",.2f"),
    "": (1, "", ".3f"),
}


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Every row and note, and whether it passed."""
    return {"passed": verdict.passed, "counts": counts(verdict), **asdict(verdict)}


def counts(verdict: Verdict) -> dict[str, int]:
    """How many rows have each verdict."""
    return {name: len(verdict.of(name)) for name in VERDICTS}


def summary(verdict: Verdict) -> str:
    """One line: the answer, the counts, and the first reason of a no."""
    counted = ", ".join(f"{number} {name}" for name, number in counts(verdict).items() if number)
    if verdict.passed:
        return f"passed: {counted or 'nothing to compare'}"
    first = verdict.of(REGRESSION)[0]
    return f"failed: {counted}; first: {first.metric} {shown(first, first.base)} -> {shown(first, first.new)}"


def shown(row: Row, value: float | None) -> str:
    """A figure in the unit that people read."""
    if value is None:
        return "-"
    scale, unit, form = SCALES.get(row.unit, (1, row.unit, ",.0f"))
    return f"{value * scale:{form}} {unit}".strip()


def cells(row: Row) -> list[str]:
    """One row of the table."""
    change = "-" if row.change is None else f"{row.change:+.2%}"
    return [row.metric, shown(row, row.base), shown(row, row.new), change, row.verdict, row.reason]


def changed(verdict: Verdict) -> list[Row]:
    """Every row but the unchanged ones: regressions, then improvements, then those without enough data."""
    return [row for row in verdict.rows if row.verdict != UNCHANGED]


def table(verdict: Verdict) -> str:
    """The changed rows as text, what else differs, and the summary."""
    rows = [cells(row) for row in changed(verdict)]
    words = [i for i in range(len(HEAD)) if i not in (1, 2, 3)]
    table = [grid(HEAD, rows, words), ""] if rows else []
    return printed([*table, *(f"differs  {note}" for note in verdict.notes), summary(verdict)])


def markdown(verdict: Verdict) -> str:
    """For a pull request: the summary, the changed rows, and the unchanged ones folded away."""
    lines = [f"### edgespec: {summary(verdict)}", ""]
    if rows := changed(verdict):
        lines += [*_grid(rows), ""]
    lines += [f"- differs: {_escaped(note)}" for note in verdict.notes]
    if same := verdict.of(UNCHANGED):
        title = f"<details><summary>{len(same)} unchanged</summary>"
        lines += ["", title, "", *_grid(same), "", "</details>"]
    return "\n".join(lines) + "\n"


def _grid(rows: Iterable[Row]) -> list[str]:
    lines = [" | ".join(HEAD), " | ".join(["---", "---:", "---:", "---:", "---", "---"])]
    lines += [" | ".join(_escaped(cell) for cell in cells(row)) for row in rows]
    return [f"| {line} |" for line in lines]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def junit(verdict: Verdict) -> str:
    """A test case for each figure: a regression fails, a figure without enough data is skipped."""
    number = counts(verdict)
    sizes = {"tests": len(verdict.rows), "failures": number[REGRESSION], "skipped": number[UNKNOWN]}
    attributes = {"name": "edgespec compare"} | {k: str(v) for k, v in sizes.items()}
    suite = ElementTree.Element("testsuite", attributes)
    for row in verdict.rows:
        case = ElementTree.SubElement(suite, "testcase", classname=f"edgespec.{row.kind}", name=row.metric)
        text = f"{shown(row, row.base)} -> {shown(row, row.new)}: {row.reason}"
        if row.verdict == REGRESSION:
            ElementTree.SubElement(case, "failure", message=text).text = text
        elif row.verdict == UNKNOWN:
            ElementTree.SubElement(case, "skipped", message=row.reason)
        else:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def github(verdict: Verdict) -> list[str]:
    """GitHub's workflow commands: a line for every row but the unchanged ones, and the summary."""
    lines = []
    for row in verdict.rows:
        if row.verdict in WORDS:
            text = f"{row.metric}: {shown(row, row.base)} -> {shown(row, row.new)} ({row.reason})"
            lines.append(f"::{WORDS[row.verdict]} title=edgespec {row.verdict}::{_data(text)}")
    lines.append(f"::{'notice' if verdict.passed else 'error'} title=edgespec::{_data(summary(verdict))}")
    return lines


def _data(text: str) -> str:
    """A message as workflow commands escape it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

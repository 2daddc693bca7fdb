"""An EvalResult as a table, as JSON and as one HTML page, all from the same fields."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path

from edgespec.errors import InputError
from edgespec.evaluation_result import LABELS, EvalResult, Row, shown
from edgespec.rendering import grid, page, printed

LEGEND = (
    "text: perplexity, and KL from the un-evicted model in nats a token. Other tasks: answers whose every "
    "token is the likeliest one, and their -log p above the un-evicted model's in nats a token (in its own "
    "row: -log p itself). ± one standard error over contexts. *: the un-evicted model gets less than half "
    "right; shown, not counted."
)
Grid = tuple[str, list[list[str]]]


def grids(result: EvalResult) -> list[Grid]:
    """A title and the cells, header first, for every length and budget: policies down, tasks across."""
    found = []
    for length in sorted({r.length for r in result.rows}):
        whole = [r for r in result.rows if (r.length, r.budget) == (length, 100)]
        for budget in sorted({r.budget for r in result.rows if r.length == length} - {100}):
            here = [r for r in result.rows if (r.length, r.budget) == (length, budget)]
            tasks = list(dict.fromkeys(r.task for r in whole))
            uninformative = {r.task for r in whole if not r.informative}
            lines = [["policy", *(f"{task} *" if task in uninformative else task for task in tasks)]]
            for group in (whole, here):
                for policy in dict.fromkeys(r.policy for r in group):
                    cells = {r.task: cell(r) for r in group if r.policy == policy}
                    lines.append([LABELS.get(policy, policy), *(cells.get(task, "-") for task in tasks)])
            found.append((f"{length:,} tokens, budget {budget} %: {here[0].rows} rows survive", lines))
    return found


def cell(row: Row) -> str:
    """One figure of the table."""
    whole = row.budget == 100
    if row.accuracy is None:
        perplexity = f"{math.exp(row.nll.mean):.2f}"
        return perplexity if whole else f"{perplexity}  {shown(row.cost)}"
    cost = shown(row.nll) if whole else f"+{shown(row.cost)}".replace("+-", "-")
    return f"{row.accuracy.mean:4.0%}  {cost}"


def to_table(result: EvalResult) -> str:
    """The result as text: a table for each length and budget, who loses to whom, the advice."""
    tables = ((title, grid(head, lines), "") for title, (head, *lines) in grids(result))
    text = printed(part for parts in tables for part in parts).removesuffix("\n")
    parts = [text, LEGEND, "", *result.losses(), "", *advice_lines(result)]
    return "\n".join(parts) + "\n"


def advice_lines(result: EvalResult) -> list[str]:
    """The recommendation of each budget."""
    return [f"budget {a.budget} %: {a.policy or 'no recommendation'}: {a.reason}" for a in result.advice]


def write(result: EvalResult, folder: Path, pictures: Sequence[str]) -> None:
    """result.json and report.html in a folder; `pictures` are PNG files in it, which the page embeds."""
    images = [(name, base64.b64encode((folder / name).read_bytes()).decode()) for name in pictures]
    try:
        text = json.dumps({"schema": "edgespec.eval/1", **result.to_json()}, indent=1, allow_nan=False)
        (folder / "result.json").write_text(text + "\n", encoding="utf-8")
        html = page(
            "evaluation.html",
            result=result,
            grids=grids(result),
            legend=LEGEND,
            images=images,
            advice=advice_lines(result),
        )
        (folder / "report.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}", "choose another with -o") from None

"""A TrimResult as a table, as one HTML page and as a picture, all from the same fields."""

from __future__ import annotations

from pathlib import Path

from edgespec.errors import InputError
from edgespec.rendering import grid, page, printed
from edgespec.trim_result import TrimResult, TrimRow, best

HEAD = ("rows", "context rows", "coverage", "acceptance", "BE", "gamma", "c", "MBSU")
CURVES = ((True, "with context rows"), (False, "without"))
WIDTH, HEIGHT, MARGIN = 640, 260, 48  # of a drawing in the page


def cells(row: TrimRow) -> list[str]:
    """One line of the table."""
    return [
        f"{row.size:,}", f"{row.context_rows}", f"{row.coverage:.1%}", f"{row.acceptance:.1%}",
        f"{row.block_efficiency:.3f}", f"{row.gamma}", f"{row.c:.4f}", f"{row.mbsu:.3f}",
    ]  # fmt: skip


def apart(result: TrimResult) -> list[list[str]]:
    """A line for the chosen head on each corpus, and for the whole head."""
    return [
        [f"{name} x {result.corpora[name]:g}", *cells(row)]
        for name, rows in result.apart().items()
        for row in rows
    ]


def notes(result: TrimResult) -> list[str]:
    """What the table is about, and what was chosen."""
    corpora = ", ".join(f"{name} x {weight:g}" for name, weight in result.corpora.items())
    what = "texts" if result.texts else f"answers of {result.target} to"
    lines = [
        f"{what} {corpora}: {result.tokens_counted:,} tokens counted, {result.tokens_held_out:,} held out",
        f"acceptance by {result.measured_with}; {result.always_kept:,} tokens are always kept",
    ]
    for with_context, words in CURVES:
        rows = result.curve(with_context)
        if rows:
            top = best(rows)
            lines.append(
                f"{words}: MBSU {top.mbsu:.3f} at {top.size:,} rows (c {top.c:.4f}, gamma {top.gamma}), "
                f"{top.mbsu / rows[-1].mbsu - 1:+.1%} on the whole head"
            )
    return [*lines, f"size {result.size:,}: {result.chosen}"]


def to_table(result: TrimResult) -> str:
    """The result as text."""
    rows = (cells(row) for row in sorted(result.rows, key=lambda r: (r.context_rows, r.size)))
    tables = [grid(HEAD, rows), "", grid(("corpus", *HEAD), apart(result), left=(0,))]
    return printed(tables, 120) + "\n".join(["", *notes(result)]) + "\n"


def write_html(result: TrimResult, path: Path) -> None:
    """The table and the two curves as one page without any other file."""
    drawings = [drawing(result, "block_efficiency", "BE"), drawing(result, "mbsu", "MBSU")]
    rows = [cells(r) for r in sorted(result.rows, key=lambda r: (r.context_rows, r.size))]
    html = page(
        "trim.html",
        head=HEAD,
        rows=rows,
        corpora=apart(result),
        notes=notes(result),
        drawings=drawings,
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
    )
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another file") from None


def drawing(result: TrimResult, name: str, label: str) -> dict[str, object]:
    """A curve's lines in a drawing's own units: sizes across on a logarithmic scale, the figure upwards."""
    from math import log

    low, high = (pick(log(r.size) for r in result.rows) for pick in (min, max))
    least, most = (pick(getattr(r, name) for r in result.rows) for pick in (min, max))
    x = lambda n: MARGIN + (WIDTH - 2 * MARGIN) * (log(n) - low) / max(high - low, 1e-9)  # noqa: E731
    y = lambda v: HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (v - least) / max(most - least, 1e-9)  # noqa: E731
    lines = []
    for with_context, words in CURVES:
        rows = result.curve(with_context)
        points = [(round(x(r.size), 1), round(y(getattr(r, name)), 1)) for r in rows]
        if points:
            lines.append({"words": words, "points": points})
    ticks = [(round(x(r.size), 1), f"{r.size:,}") for r in sorted(result.rows, key=lambda r: r.size)][::4]
    return {"label": label, "lines": lines, "ticks": ticks, "least": f"{least:.3f}", "most": f"{most:.3f}"}


def write_png(result: TrimResult, path: Path) -> None:
    """BE and MBSU against the size; needs the extra `plots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, (name, label) in zip(
        figure.subplots(1, 2), (("block_efficiency", "BE"), ("mbsu", "MBSU")), strict=True
    ):
        for with_context, words in CURVES:
            rows = result.curve(with_context)
            if rows:
                panel.plot([r.size for r in rows], [getattr(r, name) for r in rows], marker="o", label=words)
        panel.axvline(result.size, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("rows of the draft's head")
        panel.set_ylabel(label)
        panel.legend()
    figure.suptitle(f"{result.target}: {result.measured_with}", fontsize=9)
    try:
        figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another file") from None

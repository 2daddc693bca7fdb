"""The plots of a benchmark's page, as SVG text. matplotlib is imported inside: it is an extra (`plots`)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from edgespec.bench_figures import ALL, figures, parts
from edgespec.bench_report import PLAIN, SPECULATIVE, Report
from edgespec.samples import Spread

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255", "#999933")
Draw = Callable[[Any, Report], bool]


def plots(report: Report) -> list[tuple[str, str]]:
    """Each plot's title and SVG element, the same for the same report; ModuleNotFoundError: no matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    found = []
    for number, (title, draw) in enumerate(PLOTS):
        figure = Figure(layout="constrained")
        settings = {"svg.hashsalt": f"plot {number}", "svg.fonttype": "none", "font.size": 9}
        with matplotlib.rc_context(settings):
            if draw(figure, report):
                out = io.StringIO()
                figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
                found.append((title, element(out.getvalue(), number)))
    return found


def element(text: str, number: int) -> str:
    """The svg element of a file, its ids made different from those of the page's other plots."""
    svg = text[text.index("<svg") :]
    names = set(re.findall(r'\bid="([^"]+)"', svg))
    for name in sorted(names, key=len, reverse=True):
        svg = re.sub(rf'(\bid="|href="#|url\(#){re.escape(name)}(?=["\)])', rf"\g<1>p{number}-{name}", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)


def speeds(figure: Any, report: Report) -> bool:
    """Tokens a second by category, plain beside speculative, with quartiles."""
    rows = [f for f in figures(report) if f.tokens_per_s and f.plain_tokens_per_s]
    if not rows:
        return False
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots()
    pairs = ((PLAIN, [f.plain_tokens_per_s for f in rows]), (SPECULATIVE, [f.tokens_per_s for f in rows]))
    for i, (name, spreads) in enumerate(pairs):
        bars(axes, i, 2, [s for s in spreads if s], name)
    labelled(axes, [f.category for f in rows], "tokens/s, measured")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def efficiency(figure: Any, report: Report) -> bool:
    """Block efficiency by category, with its quartiles over prompts."""
    rows = [f for f in figures(report) if f.block_efficiency_by_prompt]
    if not rows:
        return False
    figure.set_size_inches(9, 3.2)
    axes = figure.subplots()
    spreads = [f.block_efficiency_by_prompt for f in rows]
    bars(axes, 0, 1, [s for s in spreads if s], "")
    axes.axhline(1, color="#222222", linewidth=0.8)
    labelled(axes, [f.category for f in rows], "block efficiency, tokens a verify call")
    return True


def acceptance(figure: Any, report: Report) -> bool:
    """The share of drafts that stood by their place; one line a category, all of them thick."""
    rows = [f for f in figures(report) if f.acceptance]
    if not rows:
        return False
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots()
    for i, f in enumerate(rows):
        places = range(1, len(f.acceptance) + 1)
        thick = f.category == ALL
        style = {"linewidth": 3, "color": "#222222"} if thick else {"linewidth": 1, "color": COLOURS[i % 9]}
        axes.plot(places, f.acceptance, marker="o", markersize=3, label=f.category, **style)
    axes.set_ylim(0, 1)
    axes.set_xlabel("place in the draft")
    axes.set_ylabel("accepted, of those judged")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def breakdown(figure: Any, report: Report) -> bool:
    """Where the time goes: measured here, and predicted for every device."""
    measured = parts(report)
    rows = [("this run, measured", {p.name: p.time_s for p in measured})]
    rows += [(p.profile, {s.name: s.time_s for s in p.shares}) for p in report.predicted]
    names = list(dict.fromkeys(name for _, times in rows for name in times))
    figure.set_size_inches(9, 1.4 + 0.28 * len(rows))
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for i, name in enumerate(names):
        shares = [times.get(name, 0.0) / (sum(times.values()) or 1.0) for _, times in rows]
        axes.barh(range(len(rows)), shares, left=left, label=name, color=COLOURS[i % 9])
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the time")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def memory(figure: Any, report: Report) -> bool:
    """Peak memory on every device, hatched where it does not fit, beside the process here."""
    here = max(s.bytes_memory for s in report.samples)
    rows: list[tuple[str, float, bool | None]] = [("this run, measured", here / 2**20, None)]
    rows += [(p.profile, p.bytes_memory / 2**20, p.fits) for p in report.predicted]
    return across(
        figure, [r[0] for r in rows], [r[1] for r in rows], "peak memory, MiB", [r[2] is False for r in rows]
    )


def devices(figure: Any, report: Report) -> bool:
    """Predicted tokens a second of every device, plain beside speculative."""
    if not report.predicted:
        return False
    figure.set_size_inches(9, 1.4 + 0.34 * len(report.predicted))
    axes = figure.subplots()
    for i, (name, values) in enumerate(
        (
            ("plain", [p.plain_tokens_per_s for p in report.predicted]),
            ("speculative", [p.tokens_per_s for p in report.predicted]),
        )
    ):
        axes.barh(
            [y + 0.4 * i - 0.2 for y in range(len(values))], values, height=0.4, label=name, color=COLOURS[i]
        )
    axes.set_yticks(range(len(report.predicted)), [p.profile for p in report.predicted])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, predicted")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def across(
    figure: Any, names: Sequence[str], values: Sequence[float], label: str, marked: Sequence[bool]
) -> bool:
    """Horizontal bars with their values; marked ones are hatched."""
    figure.set_size_inches(9, 1.2 + 0.28 * len(names))
    axes = figure.subplots()
    drawn = axes.barh(range(len(names)), values, color=COLOURS[0])
    for bar, mark in zip(drawn, marked, strict=True):
        if mark:
            bar.set_hatch("//")
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.12)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return True


def bars(axes: Any, i: int, of: int, spreads: Sequence[Spread], label: str) -> None:
    """One series of vertical bars at the medians, with quartiles as whiskers."""
    width = 0.8 / of
    places = [x + width * (i - (of - 1) / 2) for x in range(len(spreads))]
    whiskers = [[s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]]
    middles = [s.median for s in spreads]
    axes.bar(places, middles, width, yerr=whiskers, label=label, color=COLOURS[i], capsize=2)


def labelled(axes: Any, names: Sequence[str], label: str) -> None:
    """Category names under the bars."""
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel(label)


PLOTS: tuple[tuple[str, Draw], ...] = (
    ("Tokens/s by category", speeds),
    ("Block efficiency", efficiency),
    ("Acceptance by position", acceptance),
    ("Latency breakdown", breakdown),
    ("Memory", memory),
    ("Devices compared", devices),
)

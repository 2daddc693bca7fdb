"""A benchmark's report as one HTML page: tables and plots, nothing outside it, no script."""

from __future__ import annotations

from edgespec.bench_plots import plots
from edgespec.bench_report import Report
from edgespec.bench_table import GRIDS, LEGEND, facts, remarks
from edgespec.rendering import page as filled


def page(report: Report) -> str:
    """The page; without matplotlib it says that the plots are missing."""
    try:
        drawn = plots(report)
    except ModuleNotFoundError:
        drawn = []
    grids = [(title, lines) for title, grid in GRIDS if len(lines := grid(report)) > 1]
    return filled(
        "bench.html",
        report=report,
        facts=facts(report),
        remarks=remarks(report),
        legend=LEGEND,
        grids=grids,
        plots=drawn,
    )

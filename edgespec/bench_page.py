"""A benchmark's report as one HTML page: tables and plots, nothing outside it, no script."""

from __future__ import annotations

from importlib.resources import files

from edgespec.bench_plots import plots
from edgespec.bench_report import Report
from edgespec.bench_table import GRIDS, LEGEND, facts, remarks


def page(report: Report) -> str:
    """The page; without matplotlib it says that the plots are missing."""
    from jinja2 import Environment

    try:
        drawn = plots(report)
    except ModuleNotFoundError:
        drawn = []
    template = files("edgespec").joinpath("bench.html").read_text(encoding="utf-8")
    form = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    grids = [(title, lines) for title, grid in GRIDS if len(lines := grid(report)) > 1]
    return form.render(
        report=report,
        facts=facts(report),
        remarks=remarks(report),
        legend=LEGEND,
        grids=grids,
        plots=drawn,
    )

"""A benchmark's report as tables of cells, for the terminal and the page; units are here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgespec.bench_figures import Figures, figures, memory_by_process, parts, scaled, texts_different
from edgespec.bench_report import Report
from edgespec.rendering import grid, printed
from edgespec.samples import Spread, spread

Grid = list[list[str]]
LEGEND = (
    "Measured: median [quartiles] (least..most) of n answers. Speed-up: plain decode time over speculative, "
    "paired by prompt and round. BE: tokens a verify call. MBSU = BE / (1 + c gamma), c the draft's bytes a "
    "call over the target's, gamma draft calls a verify call; by parameters: those as c, as in VocabTrim."
)


def spread_cell(values: Spread | None, form: str, by: float = 1.0) -> str:
    """A spread as `12.3 [11.8, 12.9] (9.1..14.0) n=15`."""
    if values is None:
        return "-"
    s = scaled(values, by)
    texts = [format(v, form) for v in (s.median, s.lower, s.upper, s.least, s.most)]
    return "{} [{}, {}] ({}..{}) n={}".format(*texts, s.n)


def by_category(report: Report) -> Grid:
    """Measured speeds, header first: a row for every category and one for all."""
    head = [
        "category",
        "prompts",
        "plain tok/s",
        "speculative tok/s",
        "speed-up",
        "with the prompt",
        "first token, ms",
    ]
    rows = [
        [
            f.category,
            str(f.prompts),
            spread_cell(f.plain_tokens_per_s, ".1f"),
            spread_cell(f.tokens_per_s, ".1f"),
            spread_cell(f.speedup, ".2f"),
            spread_cell(f.speedup_whole, ".2f"),
            spread_cell(f.time_first_token_s, ".0f", 1e3),
        ]
        for f in figures(report)
    ]
    return [head, *rows]


def drafting(report: Report) -> Grid:
    """What drafting gives, header first: BE, MBSU beside c and gamma, acceptance by position."""
    found = figures(report)
    places = max(len(f.acceptance) for f in found)
    head = [
        "category",
        "BE",
        "BE by prompt",
        "gamma",
        "c",
        "MBSU",
        "c by parameters",
        "MBSU by parameters",
        *(f"draft {i + 1}" for i in range(places)),
    ]
    return [head, *(_drafting(f, places) for f in found)]


def _drafting(f: Figures, places: int) -> list[str]:
    shares = [f"{share:.0%}" for share in f.acceptance] + ["-"] * (places - len(f.acceptance))
    numbers = [f"{f.gamma:.2f}", f"{f.c:.3f}", f"{f.mbsu:.2f}"]
    numbers += [f"{f.c_parameters:.3f}", f"{f.mbsu_parameters:.2f}"]
    return [
        f.category,
        f"{f.block_efficiency:.2f}",
        spread_cell(f.block_efficiency_by_prompt, ".2f"),
        *numbers,
        *shares,
    ]


def devices(report: Report) -> Grid:
    """Predicted figures, header first: a row for every device."""
    head = [
        "device",
        "tok/s",
        "plain tok/s",
        "speed-up",
        "first token, ms",
        "memory, MiB",
        "fits",
        "mJ/token",
        "drafts decided by",
    ]
    rows = []
    for p in report.predicted:
        energy = "-" if p.energy_j_per_token is None else f"{p.energy_j_per_token * 1e3:.2f}"
        fits = {None: "unknown", True: "yes", False: "no"}[p.fits]
        speedup = f"{p.tokens_per_s / p.plain_tokens_per_s:.2f}" if p.plain_tokens_per_s else "-"
        numbers = [
            f"{p.tokens_per_s:.2f}",
            f"{p.plain_tokens_per_s:.2f}",
            speedup,
            f"{p.time_first_token_s * 1e3:.1f}",
        ]
        rows.append([p.profile, *numbers, f"{p.bytes_memory / 2**20:,.1f}", fits, energy, p.decided_by])
    return [head, *rows]


def breakdown(report: Report) -> Grid:
    """Where the traced answers' time went, as measured, header first."""
    found = parts(report)
    whole = sum(p.time_s for p in found) or 1.0
    rows = [[p.name, str(p.calls or "-"), f"{p.time_s:.2f}", f"{p.time_s / whole:.1%}"] for p in found]
    return [["part", "calls", "seconds", "share"], *rows]


def facts(report: Report) -> list[tuple[str, str]]:
    """What was measured, where and how: names and values."""
    e, s = report.environment, report.settings
    loads = [sample.load for sample in report.samples]
    warmth = [sample.temperature_c for sample in report.samples if sample.temperature_c is not None]
    peaks = spread([float(peak) for peak in memory_by_process(report).values()])
    heat = f"{min(warmth):.0f}..{max(warmth):.0f} degrees C" if warmth else "not readable"
    return [
        (
            "bundle",
            f"{report.bundle.name} for {report.bundle.device}, manifest {report.bundle.manifest_sha256[:12]}",
        ),
        *(
            (m.name, f"{_precision(m.precision)}, weights {m.weights_sha256[:12]}")
            for m in report.bundle.models
        ),
        ("measured", f"{report.made}, run {report.run[:8]}"),
        ("machine", f"{e.cpu}, {e.cores} cores; {e.system}"),
        ("threads", str(e.threads)),
        ("load", f"{e.load_start:.1f} at the start, {min(loads):.1f}..{max(loads):.1f} while measuring"),
        ("temperature", heat),
        ("governor", e.governor or "not readable"),
        ("prompts", f"{s.prompts} of {s.suite}, {s.prompts_sha256[:12]}, at most {s.tokens} tokens each"),
        ("rounds", f"{s.rounds}; {peaks.n} processes, each after {s.warm_up} warm-up prompt"),
        ("drafts", f"drafter {s.drafter}, stop rule {s.stop_rule}, costs: {s.costs}"),
        ("peak memory", spread_cell(peaks, ",.0f", 2**-20) + " MiB, by process"),
        ("packages", ", ".join(f"{name} {version}" for name, version in e.packages.items())),
    ]


def _precision(forms: dict[str, str]) -> str:
    return ", ".join(f"{part} {form}" for part, form in forms.items())


def remarks(report: Report) -> list[str]:
    """What a reader must know first: texts that differ, prompts left out, a busy machine."""
    found = []
    if different := texts_different(report.samples):
        found.append(
            f"TEXTS DIFFER from plain decoding in {len(different)} prompts: {', '.join(different[:5])}"
        )
    found += report.left_out
    device = report.bundle.device
    others = sorted({p.kind for p in report.predicted if p.kind != device})
    found += [
        f"predictions for {kind} devices are of this bundle's graphs, made for {device}" for kind in others
    ]
    busy = max(s.load for s in report.samples)
    if busy > report.environment.cores:
        cores = f"load {busy:.1f} on {report.environment.cores} cores"
        found.append(f"the machine was busy ({cores}): close other programs")
    return found


GRIDS: tuple[tuple[str, Callable[[Report], Grid]], ...] = (
    ("Measured", by_category),
    ("Drafting, measured", drafting),
    ("Where the time goes, measured", breakdown),
    ("Predicted, by replay of the traces", devices),
)


def to_table(report: Report) -> str:
    """The report as text: facts, measured tables, predictions."""
    head = "".join(f"{name:<12} {value}".rstrip() + "\n" for name, value in facts(report))
    parts: list[Any] = []
    for title, make in GRIDS:
        names, *lines = make(report)
        if lines:
            parts += ["", title, grid(names, lines)]
    return head + printed([*parts, "", LEGEND, *remarks(report)], 220)

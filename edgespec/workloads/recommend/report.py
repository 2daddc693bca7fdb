"""A run's result as text and as one HTML page, from the same fields; the page escapes every text."""

from __future__ import annotations

from edgespec.bench_report import Prediction
from edgespec.bench_table import spread_cell
from edgespec.rendering import grid, page, printed
from edgespec.workloads.recommend.result import Cluster, Result
from edgespec.workloads.recommend.speed import Speed

HEAD = ("", "cluster", "fans", "recommended")
DEVICES = ("device", "tok/s", "plain tok/s", "speed-up", "first token, ms", "drafts decided by")
LEGEND = (
    "share: of the cluster's fans who follow, smoothed; lift: over the share of all fans. Ranked by share "
    "times the root of lift. A fan follows whom their posts name. A text is the model's where it named none "
    "but candidates and used ordinary words alone; else a plain sentence stands."
)


def to_table(result: Result, speed: Speed) -> str:
    """The result as text."""
    rows = [(str(i), c.name, f"{c.fans:,}", _artists(c)) for i, c in enumerate(result.clusters, 1)]
    parts = [grid(HEAD, rows, left=(1, 3)), ""]
    parts += [f"{i}: {c.text}" for i, c in enumerate(result.clusters, 1)]
    return printed([*parts, "", grid(DEVICES, devices(speed)), "", *notes(result), *speeds(speed)])


def to_html(result: Result, speed: Speed) -> str:
    """The result as a page that needs no other file."""
    return page(
        "recommend.html",
        result=result,
        notes=notes(result),
        speeds=speeds(speed),
        legend=LEGEND,
        head=DEVICES,
        devices=devices(speed),
        silhouettes=[(k, f"{value:.3f}") for k, value in result.silhouettes.items()],
    )


def notes(result: Result) -> list[str]:
    """What became of every line, fan and name."""
    names, texts = result.by_model
    refused = sum(len(c.refused) for c in result.clusters)
    said = [
        f"{result.lines:,} lines, {result.posts:,} posts ({result.silent:,} without a word)",
        f"{result.fans:,} fans, {len(result.clusters)} clusters, {result.unplaced:,} fans in none",
        *(f"skipped: {fault}" for fault in result.faults),
        f"the model's are {names} of {len(result.clusters)} names and {texts} of the texts, the others are "
        f"plain; {refused} answers were refused",
    ]
    if result.unnamed:
        shown = ", ".join(result.unnamed[:10]) + (", ..." if len(result.unnamed) > 10 else "")
        said.append(f"{len(result.unnamed)} of {result.artists} artists are named in no post: {shown}")
    return said + [f"artists, {note}" for note in result.notes]


def speeds(speed: Speed) -> list[str]:
    """What decoding cost here."""
    found = speed.figures
    return [
        f"tokens/s with speculation: {spread_cell(found.tokens_per_s, '.1f')}",
        f"tokens/s without: {spread_cell(found.plain_tokens_per_s, '.1f')}",
        f"speed-up: {spread_cell(found.speedup, '.2f')}; BE {found.block_efficiency:.2f}, gamma "
        f"{found.gamma:.2f}, c {found.c:.3f}; {len(speed.texts_different)} of {found.prompts} texts differ",
        f"peak memory, the model's process left out: {speed.bytes_rss_peak / 2**20:,.0f} MiB",
    ]


def devices(speed: Speed) -> list[tuple[str, ...]]:
    """A row for every device."""
    return [_device(one) for one in speed.predicted]


def _device(one: Prediction) -> tuple[str, ...]:
    ratio = one.tokens_per_s / one.plain_tokens_per_s if one.plain_tokens_per_s else 0.0
    figures = f"{one.tokens_per_s:.1f}", f"{one.plain_tokens_per_s:.1f}", f"{ratio:.2f}"
    return one.profile, *figures, f"{one.time_first_token_s * 1e3:.1f}", one.decided_by


def _artists(cluster: Cluster) -> str:
    return ", ".join(f"{r.artist} ({r.rate:.0%}, x{r.lift:.1f})" for r in cluster.recommended) or "-"

"""Estimates, replays, searches, profiles and fits as text: the only place that writes ms, GB/s and GB of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgespec.estimate import Estimate, Line
from edgespec.fit import Fit
from edgespec.memory import Memory
from edgespec.profiles import Figure, Profile
from edgespec.rendering import grid, printed
from edgespec.replay import Replay
from edgespec.search import Found

UNITS = {
    "bandwidth": (1e9, "GB/s"),
    "ops": (1e12, "TOPS"),
    "dispatch": (1e-3, "ms"),
    "host": (1e-3, "ms"),
    "bytes": (1e6, "MB"),
    "energy": (1e-12, "pJ/byte"),
}


def estimate_table(said: Estimate) -> str:
    """An estimate: the figures, what a round and the prompt are made of, memory."""
    lines = [
        f"{said.profile}, {said.precision}, context {said.context}: predicted\n",
        f"decode   {said.tokens_per_s:.1f} tok/s" + _speedup(said),
        f"prompt   {said.ttft_s * 1e3:.1f} ms to the first token of a prompt of {said.prompt} tokens",
        f"moved    {said.bytes_moved / 1e6:,.1f} MB a token",
        *_memory_lines(said.memory),
        "",
        _calls("a round", said.round_lines),
        _calls("the prompt", said.prompt_lines),
        _waits(said.resources),
    ]
    return "\n".join(lines) + "\n"


def _speedup(said: Estimate) -> str:
    if said.width == 1:
        return ""
    gain = said.tokens_per_s / said.plain_tokens_per_s
    return (
        f", {gain:.2f}x of {said.plain_tokens_per_s:.1f} without drafts"
        f" (BE {said.block_efficiency:.2f}, width {said.width}, MBSU {said.mbsu:.2f}, c {said.c:.3f})"
    )


def replay_table(run: Replay) -> str:
    """A replay: the figures, every kind of call, memory."""
    parts = [
        Line(
            f"{p.model} {p.kind}" + (f" {p.width}" if p.width else ""),
            p.calls,
            p.time_s,
            p.bytes_weights + p.bytes_kv + p.bytes_activations,
        )
        for p in run.parts
    ]
    lines = [
        f"{run.profile}: replayed, predicted; drafts decided by {run.decided_by}\n",
        f"prompt   {run.tokens_prompt} tokens, {run.ttft_s * 1e3:.1f} ms to the first token",
        f"decode   {run.tokens_new} tokens, {run.tokens_per_s:.1f} tok/s, block efficiency"
        f" {run.block_efficiency:.2f} ({run.tokens_accepted} of {run.tokens_drafted} drafts accepted)",
        f"moved    {run.bytes_moved / 1e9:,.2f} GB",
        *_memory_lines(run.memory),
        "",
        _calls("all", parts),
        _waits(run.resources),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(held: Memory) -> list[str]:
    limit = "limit unknown" if held.limit_memory is None else f"limit {held.limit_memory / 1e6:,.0f} MB"
    verdict = {None: "", True: ", fits", False: ", DOES NOT FIT"}[held.fits]
    text = (
        f"memory   {held.bytes_peak / 1e6:,.1f} MB at the peak ({limit}{verdict}): weights"
        f" {held.bytes_weights / 1e6:,.1f}, caches {held.bytes_caches / 1e6:,.1f}, spare layer"
        f" {held.bytes_spare / 1e6:,.1f}, activations {held.bytes_activations / 1e6:,.1f}"
    )
    if held.contexts and held.contexts > 1:
        return [
            text,
            f"         its graphs must be split in {held.contexts}: a compiled context holds no more",
        ]
    return [text]


def _calls(title: str, lines: Sequence[Line]) -> str:
    whole = sum(line.time_s for line in lines) or 1.0
    rows = [
        (
            line.name,
            f"{line.calls:,.4g}",
            f"{line.time_s * 1000.0:,.2f}",
            f"{line.time_s / whole:.1%}",
            f"{line.bytes_moved / 1000000.0:,.1f}",
        )
        for line in lines
    ]
    return table((title, "calls", "ms", "share", "MB moved"), rows)


def _waits(resources: dict[str, float]) -> str:
    whole = sum(resources.values()) or 1.0
    return "waits for " + ", ".join(f"{name} {s / whole:.1%}" for name, s in resources.items() if s)


def search_table(found: Iterable[Found]) -> str:
    """The settings that nothing of the same precision and budget beats; * those that nothing beats at all."""
    rows = [
        (
            f.setting.precision,
            *map(str, (f.setting.budget, f.setting.block, f.setting.width, f.setting.draft_rows or "all")),
            f"{f.block_efficiency:.2f}",
            f"{f.tokens_per_s:.1f}",
            f"{f.ttft_s * 1e3:.0f}",
            f"{f.bytes_memory / 1e6:,.0f}" + {None: "", True: "", False: " !"}[f.fits],
            "*" if f.best else "",
        )
        for f in found
    ]
    heads = ("precision", "budget", "block", "width", "draft rows", "BE", "tok/s", "ttft ms", "memory MB", "")
    return table(heads, rows) + "\n* nothing beats it in speed and memory; ! more than the device's limit\n"


def profile_list(profiles: Iterable[Profile]) -> str:
    """A line a device."""
    rows = [
        (
            p.name,
            p.title,
            p.memory,
            _shown("bandwidth_peak_bytes_per_s", p.bandwidth_peak_bytes_per_s),
            _shown("bandwidth_weights_bytes_per_s", p.bandwidth_weights_bytes_per_s),
            p.bandwidth_weights_bytes_per_s.basis,
        )
        for p in profiles
    ]
    return table(("profile", "device", "memory", "peak", "weights", "basis"), rows) + "\n"


def profile_table(profile: Profile) -> str:
    """A device's figures with their sources."""
    rows = [
        (name, _shown(name, f), f.basis, f.date, f.source) if f else (name, "unknown", "", "", "")
        for name, f in profile.figures().items()
    ]
    head = f"{profile.name}: {profile.title}, {profile.memory}, operators of {profile.operators}\n"
    return head + table(("figure", "value", "basis", "date", "source"), rows) + "\n"


def fit_table(made: Fit) -> str:
    """Fitted figures, and every row's miss in and out of the fit."""
    figures = [
        (
            f.name,
            _shown(f.name, Figure(f.value, "", "", "")),
            f"{f.deviation:.0%}",
            f"{f.deviation_prior:.0%}",
            "told by the rows" if f.identified else "not told: near its prior",
        )
        for f in made.figures
    ]
    rows = [
        (
            m.row.model,
            m.row.source,
            m.row.precision,
            m.row.kind,
            f"{m.row.time_s * 1000.0:.1f}",
            f"{m.predicted_s * 1000.0:.1f}",
            f"{m.error:+.1%}",
            "-" if m.error_left_out is None else f"{m.error_left_out:+.1%}",
        )
        for m in made.misses
    ]
    left = "nothing is left" if made.median_left_out is None else f"{made.median_left_out:.1%}"
    heads = ("model", "source", "precision", "call", "published ms", "fit ms", "error", "left out")
    return (
        table(("figure", "value", "deviation", "before", ""), figures)
        + f"\n\n{table(heads, rows)}\n\nmedian error {made.median_error:.1%}, each row predicted without its"
        f" model's rows {left}\n"
    )


def _shown(name: str, figure: Figure) -> str:
    if name == "efficiency":
        return f"{figure.value:.0%}"
    if name == "bytes_float":
        return f"{figure.value:.0f} bytes"
    size, unit = next(found for part, found in UNITS.items() if name.startswith(part))
    return f"{figure.value / size:,.4g} {unit}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned text; a column of numbers to the right."""
    rows = list(rows)

    def told(i: int) -> bool:
        """Are there words in this column?"""
        return not (rows and all(str(row[i]).lstrip("+-").replace(",", "")[:1].isdigit() for row in rows))

    left = [i for i in range(len(heads)) if told(i)]
    return printed([grid(heads, rows, left)], 400).removesuffix("\n")

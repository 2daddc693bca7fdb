"""A BundleCost as a table and as JSON, both from the same fields; the only place that writes MiB."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgespec.count import BundleCost
from edgespec.rendering import grid, printed


def to_json(cost: BundleCost) -> dict[str, Any]:
    """The cost as plain data: bytes as ints, unknown as null."""
    return asdict(cost)


def to_table(cost: BundleCost) -> str:
    """The cost as text: a line a graph, a line a model, and what the device needs."""
    sizes_of = ("weights read", "context rows", "cache", "other in/out")
    delegated, parted = any(g.delegates for g in cost.graphs), any(g.part for g in cost.graphs)
    heads = (
        *(["part"] if parted else []),
        "width",
        "bucket",
        "nodes",
        "op types",
        *(["delegates"] if delegated else []),
        *sizes_of,
    )
    graphs = []
    for g in cost.graphs:
        sizes = map(_mib, (g.bytes_weights, g.bytes_context, g.bytes_kv, g.bytes_io))
        counts: list[int | None] = [g.part + 1] if parted else []
        counts += [g.width, g.bucket, g.nodes, None if g.ops is None else len(g.ops)]
        counts += [g.delegates or 0] if delegated else []
        graphs.append((g.model, g.kind, *("-" if n is None else str(n) for n in counts), *sizes))
    models = []
    for m in cost.models:
        precision = ", ".join(f"{part} {form}" for part, form in m.precision.items())
        columns = (m.bytes_weights, m.bytes_context, m.bytes_kv, m.bytes_policy, m.bytes_graphs)
        models.append((m.model, m.source, precision, *(_mib(size) for size in columns)))
    parts = ("weights", "context rows", "caches", "for the policy", "graph files")
    compiled = [(c.soc, c.model, _mib(c.bytes_context), c.compiler) for c in cost.compiled]
    heads_compiled = ("compiled for", "model", "context", "by")
    return printed(
        [
            f"{cost.bundle} for {cost.device}{', ExecuTorch' if cost.format == 'executorch' else ''}\n",
            grid(("model", "graph", *heads), graphs, left=(0, 1)),
            "",
            grid(("model", "from", "precision", *parts), models, left=(0, 1, 2)),
            "",
            *([grid(heads_compiled, compiled, left=(0, 1, 3)), ""] if compiled else []),
            f"on disk {_mib(cost.bytes_disk)}, in the device's memory {_mib(cost.bytes_memory)}",
        ],
        120,
    )


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.2f} MiB"


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """What a generation took; measured, one run."""
    s = stats
    outside = 1 - s["time_graphs_s"] / max(s["time_prompt_s"] + s["time_decode_s"], 1e-9)
    return [
        f"prompt   {s['tokens_prompt']} tokens in {s['time_prompt_s']:.2f} s (time to the first token)",
        f"decode   {s['tokens_new']} tokens, {s['tokens_per_s']:.1f} tok/s",
        f"drafts   {s['tokens_accepted']} of {s['tokens_drafted']} accepted,"
        f" block efficiency {s['block_efficiency']:.2f}",
        f"MBSU     {s['mbsu']:.2f} (c = {s['c']:.3f}, gamma = {s['gamma']:.2f})",
        f"runtime  {outside:.1%} outside graph calls, {_mib(s['bytes_rss_peak'])} at peak",
        f"costs    {s['table']}",
    ]


def costs_lines(table: dict[str, Any]) -> list[str]:
    """A table of call costs: milliseconds, and how many plain decode calls each is worth."""
    plain = table["verify"][min(table["verify"], key=int)]
    rows = [
        ("decode" if w == "1" else f"verify {w}", us)
        for w, us in sorted(table["verify"].items(), key=lambda x: int(x[0]))
    ]
    rows += [(name.replace("_", " "), table[name]) for name in ("draft", "draft_prefill") if name in table]
    lines = [f"{name:<13} {us / 1e3:8.2f} ms {us / plain:6.2f}x" for name, us in rows]
    if "acceptance" in table:
        lines.append(f"the draft's next token is the target's in {table['acceptance']:.0%} of places")
    return lines

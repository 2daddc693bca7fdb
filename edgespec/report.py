"""A BundleCost as a table and as JSON, both from the same fields; the only place that writes MiB."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from edgespec.count import BundleCost


def to_json(cost: BundleCost) -> dict[str, Any]:
    """The cost as plain data: bytes as ints, unknown as null."""
    return asdict(cost)


def to_table(cost: BundleCost) -> str:
    """The cost as text: a line a graph, a line a model, and what the device needs."""
    from rich.console import Console
    from rich.table import Table

    graphs = Table("model", "graph", box=None, header_style="", pad_edge=False)
    for name in ("width", "bucket", "nodes", "op types", "weights read", "cache", "other in/out"):
        graphs.add_column(name, justify="right")
    for g in cost.graphs:
        sizes = (_mib(g.bytes_weights), _mib(g.bytes_kv), _mib(g.bytes_io))
        counts = (g.width, g.bucket, g.nodes, None if g.ops is None else len(g.ops))
        graphs.add_row(g.model, g.kind, *("-" if n is None else str(n) for n in counts), *sizes)
    models = Table("model", "precision", box=None, header_style="", pad_edge=False)
    for name in ("weights", "caches", "graph files"):
        models.add_column(name, justify="right")
    for m in cost.models:
        precision = ", ".join(f"{part} {form}" for part, form in m.precision.items())
        models.add_row(m.model, precision, _mib(m.bytes_weights), _mib(m.bytes_kv), _mib(m.bytes_graphs))
    out = io.StringIO()
    console = Console(file=out, width=120, highlight=False, markup=False)
    console.print(f"{cost.bundle} for {cost.device}\n")
    console.print(graphs, "", models, "", sep="\n")
    console.print(f"on disk {_mib(cost.bytes_disk)}, in the device's memory {_mib(cost.bytes_memory)}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.2f} MiB"

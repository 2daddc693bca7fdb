"""Cells as aligned text and fields as one HTML page: what every report shares. Knows rich and jinja2."""

from __future__ import annotations

import io
from collections.abc import Container, Iterable, Sequence
from importlib.resources import files
from typing import Any

FIRST = (0,)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], left: Container[int] = FIRST) -> Any:
    """A table for `printed`: columns numbered in `left` to the left, the others, figures, to the right."""
    from rich.table import Table

    made = Table(box=None, header_style="", pad_edge=False)
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i in left else "right", no_wrap=i not in left)
    for row in rows:
        made.add_row(*row)
    return made


def printed(parts: Iterable[Any], width: int = 200) -> str:
    """Texts and tables one below the other, without spaces at the lines' ends; the last line ends."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def page(template: str, **fields: Any) -> str:
    """One of the package's HTML templates, filled; every field is escaped."""
    from jinja2 import Environment

    text = files("edgespec").joinpath(template).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(**fields)

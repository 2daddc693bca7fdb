"""Qualcomm's systems on a chip that graphs can be compiled for: our names, and the numbers that its compiler
takes. Knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Soc:
    """A system on a chip: its name in flags and manifests, its NPU's architecture (HTP), and its number."""

    name: str
    htp_arch: int
    soc_model: int


SOCS = {
    soc.name: soc
    for soc in (
        Soc("8-gen-2", 73, 43),
        Soc("8-gen-3", 75, 57),
        Soc("8-elite", 79, 69),
        Soc("8-elite-gen-5", 81, 87),
    )
}
NAMES = tuple(SOCS)

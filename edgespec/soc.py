"""Qualcomm's systems on a chip that graphs can be compiled for: our names, and the numbers that its compiler
takes; and what one context may hold. Knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of weights in one compiled context. The NPU has addresses of 32 bits, 3.75 GB of which hold weights,
# caches, inputs and outputs together (github.com/powerserve-project/PowerServe, issue 6, after Qualcomm's HTP
# guidelines), and a context is larger than its weights: 331 MiB for the demo's 259, measured.
LARGEST_WEIGHTS = 2 * 2**30


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

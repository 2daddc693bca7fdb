"""A policy's name, the rows it protects and what it needs to be kept. Names only: the scores are graphs
(edgespec.exporters.scores).
"""

from __future__ import annotations

from edgespec.errors import InputError

BASES = ("tova", "snapkv", "h2o")  # scores by attention
OVER = ("caote", "fastcaote")  # scores by what the attention's output loses
NAMES = ("none", "sinks", "keydiff", "lru", *BASES, *(f"{over}({base})" for over in OVER for base in BASES))
CARRYING = ("h2o", "lru")  # their scores sum over every block since the beginning


def base_of(name: str) -> str:
    """`h2o` of `caote(h2o)`; a policy without a base is its own."""
    return name.partition("(")[2].removesuffix(")") or name


def carries(name: str) -> bool:
    """True where a score is carried from block to block with every row that survives."""
    return base_of(name) in CARRYING


def queries(name: str, block: int, window: int) -> int:
    """How many of a block's last queries the policy reads; 0 where it reads none."""
    base = base_of(name)
    if carries(name):
        return block
    return {"tova": 1, "snapkv": window}.get(base, 0)


def check(name: str, sinks: int, recent: int, budget: int, block: int, whose: str = "") -> None:
    """InputError unless a cache of this budget and block can be emptied so; `whose`: `draft-` for a draft."""
    if name not in NAMES:
        over, _, base = name.partition("(")
        what = f"unknown base {base.removesuffix(')')!r} of {over}" if over in OVER and base else None
        raise InputError(what or f"unknown policy {name!r}", f"use one of: {', '.join(NAMES)}")
    if sinks < 0 or recent < 0:
        raise InputError(
            f"sinks {sinks} and recent {recent} must not be negative", "use --sinks 4 --recent 32"
        )
    if name != "none" and sinks + recent > budget:
        raise InputError(
            f"sinks {sinks} + recent {recent} protect more rows than the budget {budget} keeps",
            f"use --{whose}budget {sinks + recent} or more, or protect fewer rows",
        )
    if carries(name) and budget % block:
        raise InputError(
            f"{name} scores every block, and budget {budget} is not a multiple of block {block}",
            f"use --{whose}budget {max(block, budget // block * block)}, or another --{whose}policy",
        )

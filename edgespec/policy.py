"""A policy's name and its protected rows. Names only: the scores are graphs (edgespec.exporters.scores)."""

from __future__ import annotations

from dataclasses import dataclass

from edgespec.errors import InputError

NAMES = ("none", "sinks", "keydiff")


@dataclass(frozen=True)
class Policy:
    """How a commit chooses: `name`; the first `sinks` positions and the last `recent` rows always stay."""

    name: str
    sinks: int
    recent: int

    @property
    def evicts(self) -> bool:
        """False where more tokens than slots are an error."""
        return self.name != "none"


def parse(name: str, sinks: int, recent: int, budget: int) -> Policy:
    """The policy of this name, checked against its budget; InputError names what is allowed."""
    if name not in NAMES:
        raise InputError(f"unknown policy {name!r}", f"use one of: {', '.join(NAMES)}")
    if sinks < 0 or recent < 0:
        raise InputError(
            f"sinks {sinks} and recent {recent} must not be negative", "use --sinks 4 --recent 32"
        )
    if name != "none" and sinks + recent > budget:
        raise InputError(
            f"sinks {sinks} + recent {recent} protect more rows than the budget {budget} keeps",
            f"use --budget {sinks + recent} or more, or protect fewer rows",
        )
    return Policy(name, sinks, recent)

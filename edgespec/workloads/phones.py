"""What phones would do with the calls that a workload made: tokens/s with drafts and without, by profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgespec.bundle import Bundle
from edgespec.predict import narrowest, plainly
from edgespec.profiles import load
from edgespec.replay import replay_work
from edgespec.trace import read_trace
from edgespec.work import of_bundle

PHONES = ("snapdragon-8-elite", "dimensity-9400", "apple-a18-pro")


@dataclass(frozen=True)
class OnPhone:
    """A phone's predicted tokens/s over the same calls, with drafts and without."""

    profile: str
    tokens_per_s: float
    plain_tokens_per_s: float

    def line(self) -> str:
        """The figures as text."""
        return (
            f"predicted on {self.profile}: {self.tokens_per_s:.1f} tok/s, "
            f"{self.plain_tokens_per_s:.1f} without drafts"
        )


def on_phones(bundle: Bundle, path: Path) -> tuple[OnPhone, ...]:
    """Each phone's figures, from the bundle and the runtime's trace; InputError where it does not compute
    so.
    """
    trace, models = read_trace(path), of_bundle(bundle)
    plain, found = plainly(trace, narrowest([trace])), []
    for name in PHONES:
        drafted, alone = (replay_work(t, load(name), models).tokens_per_s for t in (trace, plain))
        found.append(OnPhone(name, drafted, alone))
    return tuple(found)

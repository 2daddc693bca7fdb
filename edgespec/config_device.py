"""What the commands about machines can be told: build, push and tune."""

from __future__ import annotations

from dataclasses import dataclass

from edgespec.config import THREADS, TO, VIA
from edgespec.flags import between, flag


@dataclass(frozen=True)
class BuildConfig:
    """`edgespec build`."""

    sanitize: bool = flag(
        "with AddressSanitizer and UndefinedBehaviorSanitizer: slow, for finding bugs", False
    )
    arch: str = flag("for another Linux machine's processor, such as aarch64", "")


@dataclass(frozen=True)
class PushConfig:
    """`edgespec push`: which bundle, and how to reach the device."""

    bundle: str = flag("folder of the bundle", positional=True)
    via: str = flag(VIA)
    to: str = flag(TO, "")
    binary: str = flag("folder with a runtime and its library that were built for the device", "")
    threads: int = flag(THREADS, 0)

    def check(self) -> PushConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("threads", self.threads, 0, 256)
        return self


@dataclass(frozen=True)
class TuneConfig:
    """`edgespec tune`: whose calls to measure."""

    bundle: str = flag("folder of the bundle", positional=True)
    runs: int = flag("timed calls of each width", 20)
    threads: int = flag(THREADS, 0)

    def check(self) -> TuneConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("runs", self.runs, 1, 10_000)
        between("threads", self.threads, 0, 256)
        return self

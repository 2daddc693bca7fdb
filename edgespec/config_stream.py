"""What `edgespec stream` can be told, checked before any bundle is looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgespec.config import DRAFTERS, PHONES
from edgespec.config_answering import Answering
from edgespec.errors import InputError
from edgespec.flags import between, check_file, check_folder, flag

MEASURED = "measured"


@dataclass(frozen=True)
class StreamConfig(Answering):
    """`edgespec stream`: who watches what, how time passes, and where the record goes."""

    frames: str = flag("folder of images, a video or an animated image; -: a video stream on standard input")
    rate: float = flag("frames a second: of a folder, or taken from a video", 4.0)
    prompt: str | None = flag(
        "what the model is told before the first frame (default: as it was trained)", None
    )
    pace: str = flag(
        f"what steps take: {MEASURED} here, tokens/s as a number (frames for nothing), or a device's profile",
        MEASURED,
    )
    every: float | None = flag("ask the model every so many seconds, instead of letting it choose", None)
    truth: str | None = flag(
        "JSON lines of what should be said, to score by: time (in seconds) and text", None
    )
    drafter: str = flag("who drafts", "auto", choices=DRAFTERS)
    stall: float = flag("seconds without a frame after which a stream on standard input is given up", 10.0)
    profile: tuple[str, ...] = flag("with --output: devices to predict the speed for, or .toml files", PHONES)
    output: str | None = flag("folder for the record and a page about it", None, short="-o")
    max_new_tokens: int = flag("most tokens of one feedback", 48, kw_only=True)

    def check(self) -> StreamConfig:
        """Itself, or an InputError for the first value that cannot work."""
        super().check()
        if self.frames != "-" and not os.path.exists(self.frames):
            raise InputError(
                f"frames {self.frames!r} does not exist", "name a folder of images, a video, or -"
            )
        between("rate", self.rate, 0.01, 1000)
        between("stall", self.stall, 0.01, 86_400)
        if self.every is not None:
            between("every", self.every, 0.01, 86_400)
        check_file("truth", self.truth)
        if self.output is not None:
            check_folder("the record", self.output)
        speed = self.tokens_per_s
        if speed is not None and not 0 < speed < float("inf"):
            raise InputError(f"pace {self.pace} is no speed", "use --pace 12, for tokens a second")
        if self.frames == "-" and self.pace != MEASURED:
            raise InputError("a stream on standard input has a clock of its own", "leave --pace out")
        return self

    @property
    def tokens_per_s(self) -> float | None:
        """The pace as a number, where it is one."""
        try:
            return float(self.pace)
        except ValueError:
            return None

    @property
    def device(self) -> str:
        """The profile that the pace names, or nothing."""
        return "" if self.pace == MEASURED or self.tokens_per_s is not None else self.pace

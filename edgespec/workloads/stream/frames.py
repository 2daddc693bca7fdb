"""Frames on a clock: a folder of images, an animated image, a video, or a camera's stream on standard
input.

Knows Pillow and, for videos, PyAV. A frame's picture is decoded only when somebody looks at it.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any, BinaryIO

from edgespec.console import load
from edgespec.errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATED = (".gif", ".apng", ".webp")
WAITING = 64  # frames of a camera that wait to be looked at; older ones are dropped as unseen
PIPED = "send Matroska, MPEG-TS or MJPEG: an MP4's index stands at its end, where no pipe gets in time"
AGAIN = "give a folder of images, a video file, or - for a stream on standard input"


@dataclass(frozen=True)
class Frame:
    """A frame: when it came, in seconds from the first, its name, and how to get its image file's
    content.
    """

    time_s: float
    name: str
    content: Callable[[], bytes]


def frames(source: str, rate: float, stdin: BinaryIO, stall_s: float) -> Iterator[Frame]:
    """Frames of the source, `rate` a second. A folder's images are so far apart; of a video's frames, the
    first of each period is taken.

    InputError where the source is none, holds no frame or, of a stream, gives none for `stall_s` seconds.
    """
    path = Path(source)
    if source == "-":
        yield from _live(stdin, rate, stall_s)
    elif path.is_dir():
        yield from _folder(path, rate)
    elif not path.is_file():
        raise InputError(f"{source} is neither a folder of frames nor a video", AGAIN)
    elif path.suffix.lower() in ANIMATED:
        yield from _thinned(_animated(path), rate, path.name)
    else:
        yield from _thinned(_video(str(path), path.name), rate, path.name)


def _folder(folder: Path, rate: float) -> Iterator[Frame]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not found:
        raise InputError(f"{folder} holds no frames", f"files of these kinds are read: {', '.join(IMAGES)}")
    for number, path in enumerate(found):
        yield Frame(number / rate, path.name, path.read_bytes)


def _thinned(found: Iterator[Frame], rate: float, name: str) -> Iterator[Frame]:
    """The first frame of each period of 1/rate seconds; InputError where there is none at all."""
    number = -1
    for frame in found:
        if (period := int(frame.time_s * rate + 1e-6)) > number:
            number = period
            yield frame
    if number < 0:
        raise InputError(f"{name} holds no frames", AGAIN)


def _animated(path: Path) -> Iterator[Frame]:
    opened, bomb = (load("PIL.Image", n, extra="workloads") for n in ("open", "DecompressionBombError"))
    try:
        with opened(path) as image:
            time_s = 0.0
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                shown = image.convert("RGB")
                yield Frame(time_s, f"{path.name} {number}", partial(_bitmap, shown))
                time_s += float(image.info.get("duration") or 100) / 1000
    except (OSError, SyntaxError, ValueError, bomb) as error:
        raise InputError(f"{path} cannot be read ({error})", AGAIN) from None


def _video(source: Any, name: str) -> Iterator[Frame]:
    """Every frame of a video file, or of a stream."""
    opened, fault = load("av", "open", extra="workloads"), load("av", "FFmpegError", extra="workloads")
    try:
        with opened(source) as video:
            if not video.streams.video:
                raise InputError(f"{name} has no pictures", AGAIN)
            begin = None
            for number, frame in enumerate(video.decode(video=0)):
                at = float(frame.time) if frame.time is not None else number / 30
                begin = at if begin is None else begin
                yield Frame(at - begin, f"{name} {number}", partial(_decoded, frame))
    except fault as error:
        hint = AGAIN if isinstance(source, str) else PIPED
        raise InputError(f"{name} is no video that can be read ({error.strerror})", hint) from None


def _live(stdin: BinaryIO, rate: float, stall_s: float) -> Iterator[Frame]:
    """Frames as they come, each with the time at which it came; a thread reads them, so none waits for
    the model.
    """
    waiting: deque[Frame | Exception | None] = deque(maxlen=WAITING)
    came = Condition()
    begin = time.monotonic()

    def put(item: Frame | Exception | None) -> None:
        with came:
            waiting.append(item)
            came.notify()

    def read() -> None:
        stamped = (Frame(time.monotonic() - begin, f.name, f.content) for f in _video(stdin, "the stream"))
        try:
            for frame in _thinned(stamped, rate, "the stream"):
                put(frame)
            put(None)
        except Exception as error:  # told where frames are taken
            put(error)

    Thread(target=read, daemon=True).start()
    while True:
        with came:
            if not came.wait_for(lambda: waiting, stall_s):
                raise InputError(
                    f"the stream gave no frame for {stall_s:g} seconds", "is the camera still on?"
                )
            item = waiting.popleft()
        if isinstance(item, Exception):
            raise item
        if item is None:
            return
        yield item


def _decoded(frame: Any) -> bytes:
    """A video's frame as an image file's content."""
    return _bitmap(frame.to_image())


def _bitmap(image: Any) -> bytes:
    """An image as a file's content, uncompressed: that takes the least time."""
    out = io.BytesIO()
    image.save(out, "BMP")
    return out.getvalue()

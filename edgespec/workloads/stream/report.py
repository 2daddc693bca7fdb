"""What came of a stream: its figures, as JSON, as lines, and as one page with the timeline."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from edgespec.bench_report import Prediction, Traced
from edgespec.bundle import Bundle
from edgespec.console import load, written
from edgespec.errors import InputError
from edgespec.files import written_whole
from edgespec.rendering import page
from edgespec.workloads.stream.coach import Moment
from edgespec.workloads.stream.score import Said, Score, score

MOMENTS, TRACE, RESULT, PAGE = "moments.jsonl", "trace.jsonl", "result.json", "report.html"
THUMBNAIL = 128


@dataclass(frozen=True)
class StreamResult:
    """A stream's figures. `blind`: frames that came while the model spoke or was busy; `tokens_per_s`: of
    its words, on the stream's clock, None where none took time; `block_efficiency`: tokens a verify call,
    of words.
    """

    bundle: str
    frames_from: str
    pace: str
    every: float | None
    frames: int
    blind: int
    seconds: float
    feedback: int
    tokens: int
    tokens_per_s: float | None
    block_efficiency: float | None
    moments: tuple[Moment, ...]
    wanted: tuple[Said, ...] = ()
    score: Score | None = None
    predicted: tuple[Prediction, ...] = ()

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        frames_from: str,
        pace: str,
        every: float | None,
        moments: Sequence[Moment],
        wanted: Sequence[Said] | None,
    ) -> StreamResult:
        """The figures of what happened; scored where it is known what was wanted."""
        spoken = [m for m in moments if m.text]
        tokens, calls = sum(m.tokens for m in spoken), sum(m.verify_calls for m in spoken)
        spent = sum(m.ended_s - m.began_s for m in spoken)
        said = [(m.began_s, m.text) for m in spoken]
        return cls(
            bundle.path.name,
            frames_from,
            pace,
            every,
            len(moments),
            sum(not m.seen for m in moments),
            moments[-1].time_s if moments else 0.0,
            len(spoken),
            tokens,
            (tokens - len(spoken)) / spent if spent > 0 else None,
            tokens / calls if calls else None,
            tuple(moments),
            tuple(wanted or ()),
            score([(wanted, said)]) if wanted is not None else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


class Record(AbstractContextManager[TextIO]):
    """A folder that holds a stream: every moment as it comes, the runtime's trace (the context's value),
    and at the end result.json and report.html.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures = folder, list[bytes]()
        folder.mkdir(exist_ok=True)
        self.moments, self.trace = (written(str(folder / name)) for name in (MOMENTS, TRACE))

    def __enter__(self) -> TextIO:
        return self.trace

    def __exit__(self, *fault: object) -> None:
        self.moments.close()
        self.trace.close()

    def keep(self, moment: Moment, frame: Any) -> None:
        """One more moment; a small picture of the frame where words were said."""
        self.moments.write(json.dumps(moment.to_json()) + "\n")
        self.moments.flush()
        if moment.text:
            self.pictures.append(_small(frame.content()))

    @property
    def traced(self) -> Traced:
        """What the runtime recorded."""
        lines = (self.folder / TRACE).read_text(encoding="utf-8").splitlines()
        return Traced("stream", "stream", tuple(map(json.loads, lines)))

    def write(self, result: StreamResult) -> None:
        """The result and its page."""
        written_whole(
            self.folder / RESULT,
            json.dumps({"schema": "edgespec.stream/1", **result.to_json()}, indent=1) + "\n",
        )
        pictures = [base64.b64encode(data).decode() for data in self.pictures]
        spoken = [m for m in result.moments if m.text]
        html = page(
            "stream.html",
            result=result,
            lines=to_lines(result),
            said=list(zip(spoken, pictures, strict=True)),
            timeline=_timeline(result),
        )
        written_whole(self.folder / PAGE, html)


def to_lines(result: StreamResult) -> list[str]:
    """The figures as text."""
    blind = result.blind / max(1, result.frames)
    seen = f"{result.frames} frames in {result.seconds:.1f} s, {result.blind} unseen ({blind:.1%})"
    lines = [f"{seen}, pace {result.pace}"]
    spoken = f"{result.feedback} times feedback, {result.tokens} tokens"
    if result.tokens_per_s:
        spoken += f", {result.tokens_per_s:.1f} tok/s"
    if result.block_efficiency:
        spoken += f", block efficiency {result.block_efficiency:.2f}"
    lines.append(spoken)
    if s := result.score:
        found = f"precision {s.precision:.3f}, recall {s.recall:.3f}; {s.matched} of {s.wanted} wanted"
        lines.append(f"T-F-score {s.f1:.3f} ({found})")
        if s.matched:
            alike = f"ROUGE-L {s.rouge_l:.3f}, METEOR {s.meteor:.3f}"
            lines.append(f"matched: {alike}, {s.delay_s:+.2f} s late in the median")
    for p in result.predicted:
        speeds = f"{p.tokens_per_s:.1f} tok/s, {p.plain_tokens_per_s:.1f} without drafts"
        lines.append(f"predicted on {p.profile}: {speeds}")
    return lines


def truth_of(path: Path) -> tuple[Said, ...]:
    """What should be said, in order of time; InputError, with the line, where the file does not say so."""
    found, hint = [], 'one object a line: {"time": 3.5, "text": "Keep your back straight."}'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})", hint) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            time, text = float(data["time"]), str(data["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number} is no feedback ({type(error).__name__}: {error})", hint
            ) from None
        if not 0 <= time < float("inf"):
            raise InputError(f"{path}, line {number}: time is {time}", hint)
        found.append((time, text))
    return tuple(sorted(found))


def _small(content: bytes) -> bytes:
    """An image file's content as a small PNG."""
    with load("PIL.Image", "open", extra="workloads")(io.BytesIO(content)) as image:
        shown = image.convert("RGB")
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        shown.save(out, "PNG")
    return out.getvalue()


def _timeline(result: StreamResult) -> str:
    """When something was wanted, said and not seen, as an SVG's text."""
    figure = load("matplotlib.figure", "Figure", extra="workloads")(figsize=(12, 2.2), layout="constrained")
    axis = figure.subplots()
    unseen = [m.time_s for m in result.moments if not m.seen]
    rows = [("unseen frames", unseen, "tab:red", "|")]
    rows.append(("said", [m.began_s for m in result.moments if m.text], "tab:blue", "o"))
    if result.score is not None:
        rows.append(("wanted", [time for time, _ in result.wanted], "tab:green", "v"))
    for y, (_, times, colour, mark) in enumerate(rows):
        axis.plot(times, [y] * len(times), mark, color=colour, linestyle="none")
    for m in result.moments:
        if m.text:
            axis.hlines(1, m.began_s, m.ended_s, color="tab:blue")
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_xlim(0, max(result.seconds, 1e-3))
    axis.set_xlabel("seconds")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return base64.b64encode(out.getvalue().encode()).decode()

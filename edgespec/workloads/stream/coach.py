"""A model that watches frames on a clock and speaks when it should (Stream-VLM, arXiv 2407.08101).

Every frame becomes its rows of the text; the model answers with <next>, or with <feedback>, words and an
end token. While it speaks, frames go by unseen. Knows a runtime's session, no source of frames and no
score.

The paper lets 12 tokens/s pass for the model's speed; here a pace says what a step took: the clock of
this machine, a constant as in the paper, or a device's predicted calls.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TextIO

from edgespec.errors import InputError
from edgespec.replay import Running
from edgespec.trace import parse_trace
from edgespec.work import ModelWork
from edgespec.workloads.stream.frames import Frame

NEXT, FEEDBACK = "<next>", "<feedback>"
PROMPT = "Watch me exercise and coach me."


@dataclass(frozen=True)
class Step:
    """What a model did about a frame: its words (none: it wants the next frame) and what that took.

    `wall_first_s`, `wall_s`: this machine's seconds to the first word and in all; `lines`: the runtime's
    trace.
    """

    text: str
    tokens: int
    verify_calls: int
    wall_first_s: float
    wall_s: float
    lines: str


class Pace(Protocol):
    """Seconds from a frame to its first word, and to the end of the step."""

    def __call__(self, step: Step) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Moment:
    """What became of a frame. `seen` False: the model was speaking, or still busy with the one before.

    `began_s`, `ended_s`: when its words began and ended on the stream's clock.
    """

    time_s: float
    frame: str
    seen: bool
    text: str = ""
    tokens: int = 0
    verify_calls: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


class Coach:
    """A runtime's session that is shown frames, and how it generates. InputError where the bundle's model
    cannot watch.
    """

    def __init__(self, session: Any, prompt: str, settings: Any, trace: TextIO | None = None) -> None:
        self.session, self.settings, self.trace = session, settings, trace
        manifest, known = session.runtime.bundle.manifest, session.runtime.tokenizer.token_to_id
        if not manifest.vision:
            raise InputError(
                f"{session.runtime.bundle.path} reads no images", "export a vision-language model"
            )
        self.rows = [manifest.vision[0].token] * manifest.vision[0].rows
        self.next, self.feedback = (_action(known, name) for name in (NEXT, FEEDBACK))
        if self.next not in manifest.tokenizer.stop_ids:
            hint = "name it among eos_token_id in the checkpoint's generation_config.json, and export again"
            raise InputError(f"{NEXT} does not end an answer of this bundle", hint)
        ids = session.runtime.encode([{"role": "user", "content": prompt}])
        self.begun = self._generate(ids, replace(settings, max_new_tokens=0))

    def see(self, frame: Frame, speak: bool | None = None) -> Step:
        """Show it a frame. `speak` decides for it: True has it say something, False has it go on."""
        begin = time.perf_counter()
        image = (frame.name, frame.content())
        if speak is None:
            return self._generate(self.rows, self.settings, image, begin)
        settings = self.settings if speak else replace(self.settings, max_new_tokens=0)
        ids = [*self.rows, self.feedback if speak else self.next]
        return self._generate(ids, settings, image, begin)

    def _generate(
        self, ids: list[int], settings: Any, image: tuple[str, bytes] | None = None, begin: float = 0.0
    ) -> Step:
        begin, first, lines = begin or time.perf_counter(), 0.0, io.StringIO()
        images = () if image is None else (image,)
        for _ in self.session.stream(ids, settings, trace=lines, images=images):
            first = first or time.perf_counter() - begin
        spent, answer = time.perf_counter() - begin, self.session.answer
        if self.trace is not None:
            self.trace.write(lines.getvalue())
        calls = int(answer.stats.get("verify_calls", 0))
        return Step(answer.text.strip(), len(answer.tokens), calls, first or spent, spent, lines.getvalue())


def watch(
    frames: Iterable[Frame], coach: Coach, pace: Pace, every_s: float | None = None
) -> Iterator[tuple[Moment, Frame]]:
    """What becomes of each frame, on a clock that the pace drives; nobody waits for it.

    `every_s`: the model is asked every so many seconds, as turn-taking models are, and does not choose.
    """
    pace(coach.begun)  # absorbed before the clock starts, but a device's caches hold it
    free, asked = 0.0, every_s or 0.0
    for frame in frames:
        if frame.time_s < free:
            yield Moment(frame.time_s, frame.name, False), frame
            continue
        speak = None if every_s is None else frame.time_s >= asked
        if speak:
            asked = frame.time_s + (every_s or 0.0)
        step = coach.see(frame, speak)
        first, whole = pace(step)
        free = frame.time_s + whole
        said = (step.text, step.tokens, step.verify_calls, frame.time_s + first, free)
        yield Moment(frame.time_s, frame.name, True, *said), frame


def measured(step: Step) -> tuple[float, float]:
    """What the step took here."""
    return step.wall_first_s, step.wall_s


@dataclass(frozen=True)
class Constant:
    """So many tokens a second, and frames for nothing: the paper's clock."""

    tokens_per_s: float

    def __call__(self, step: Step) -> tuple[float, float]:
        """The pace of a step."""
        return min(step.tokens, 1) / self.tokens_per_s, step.tokens / self.tokens_per_s


class Predicted:
    """A device's pace: the step's calls as its profile times them, over a cache that fills as the stream
    goes.
    """

    def __init__(self, profile: Any, models: Mapping[str, ModelWork]) -> None:
        self.running = Running(profile, models)

    def __call__(self, step: Step) -> tuple[float, float]:
        """The pace of a step."""
        first, rest = 0.0, 0.0
        for turn in parse_trace(step.lines.splitlines(), "the stream's trace").turns:
            before, after = self.running.turn(turn)
            first, rest = first + before, rest + after
        return first, first + rest


def _action(known: Any, name: str) -> int:
    """The id of an action token."""
    found = known(name)
    if found is None:
        hint = "export a model that was trained to watch: scripts/stream_coach makes one"
        raise InputError(f"the bundle's model has no action token {name}", hint)
    return int(found)

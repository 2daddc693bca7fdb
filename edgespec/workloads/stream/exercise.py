"""Exercise clips that are made, not filmed: what an athlete does, what a coach says of it and when, and
each frame.

They stand in for QEVD (arXiv 2407.08101), whose videos are not to be had offline: a stick figure does
squats, jumping jacks and lunges, at changing speed under a changing camera, some with a mistake; every
feedback has one cause and one wording.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import pi, sin
from random import Random
from typing import Any

from edgespec.workloads.stream.figure import Camera, Pose, draw, jack, lunge, squat

EXERCISES = ("squat", "jack", "lunge")
MISTAKES = {"squat": ("shallow", "lean"), "jack": ("arms", "feet"), "lunge": ("short", "lean")}
START = {"squat": "Squats, here we go.", "jack": "Jumping jacks, nice.", "lunge": "Good, now lunges."}
CORRECTION = {
    ("squat", "shallow"): "Go deeper in your squats.",
    ("squat", "lean"): "Keep your chest up.",
    ("jack", "arms"): "Raise your arms all the way up.",
    ("jack", "feet"): "Jump your feet wider apart.",
    ("lunge", "short"): "Take a longer step forward.",
    ("lunge", "lean"): "Keep your back straight.",
}
PRAISE = {
    ("squat", "shallow"): "Great depth, keep it.",
    ("squat", "lean"): "Much better, chest is up.",
    ("jack", "arms"): "Yes, arms are high now.",
    ("jack", "feet"): "Good, feet are wide now.",
    ("lunge", "short"): "That step is long enough.",
    ("lunge", "lean"): "Your back looks straight now.",
}
TOLD = 0.72  # the part of a repetition after which it can be judged: its deepest point lies at a half
MOST = 4  # repetitions of one mistake


@dataclass(frozen=True)
class Repetition:
    """One repetition; `mistake` empty where it is right. `start` and `length` in seconds."""

    exercise: str
    mistake: str
    start: float
    length: float

    @property
    def told_s(self) -> float:
        """When a coach can judge it."""
        return self.start + TOLD * self.length


@dataclass(frozen=True)
class Feedback:
    """What a coach says, and when."""

    time_s: float
    text: str


class Clip:
    """One clip, the same for the same seed. `reps` is what happens in it, `feedback` what there is to
    say.
    """

    def __init__(self, seed: int, seconds: float) -> None:
        chance = Random(seed)
        self.seconds = seconds
        self.reps = tuple(_planned(chance, seconds))
        self.feedback = tuple(_said(self.reps))
        self.camera, self.drift = _seen(chance)

    def at(self, time_s: float) -> tuple[Repetition | None, float]:
        """The repetition under way, if any, and how far into it the figure is: 0 stands, 1 is its
        deepest.
        """
        for rep in self.reps:
            if rep.start <= time_s < rep.start + rep.length:
                return rep, sin(pi * (time_s - rep.start) / rep.length)
        return None, 0.0

    def pose(self, time_s: float) -> Pose:
        """The figure at this time."""
        rep, depth = self.at(time_s)
        if rep is None:
            return squat(0.0)
        wrong = {name: float(rep.mistake == name) for name in MISTAKES[rep.exercise]}
        if rep.exercise == "squat":
            return squat(depth * (1 - 0.5 * wrong["shallow"]), wrong["lean"])
        if rep.exercise == "lunge":
            return lunge(depth, wrong["lean"], wrong["short"])
        return jack(depth, 1 - 0.5 * wrong["arms"], 1 - 0.7 * wrong["feet"])

    def frame(self, time_s: float, size: int = 128) -> Any:
        """The picture at this time, a Pillow image [size x size]."""
        part = time_s / max(self.seconds, 1e-9)
        camera = replace(
            self.camera,
            x=self.camera.x + self.drift[0] * part,
            scale=self.camera.scale * (1 + self.drift[1] * part),
        )
        return draw(self.pose(time_s), camera, size)


def _planned(chance: Random, seconds: float) -> list[Repetition]:
    """Blocks of an exercise, the first repetition of each a right one; mistakes come in runs."""
    reps: list[Repetition] = []
    time, exercise, mistake, run = chance.uniform(0.5, 3), chance.choice(EXERCISES), "", 0
    pace, fresh = chance.uniform(1.8, 3.6), True
    while True:
        length = pace * chance.uniform(0.85, 1.15)
        if time + length > seconds:
            return reps
        if not fresh and chance.random() < 0.12:
            exercise = chance.choice([e for e in EXERCISES if e != exercise])
            time, pace, fresh, mistake = time + chance.uniform(1, 2.5), chance.uniform(1.8, 3.6), True, ""
            continue
        if fresh or (mistake and (run >= MOST or chance.random() < 0.45)):
            mistake = ""
        elif not mistake and chance.random() < 0.25:
            mistake, run = chance.choice(MISTAKES[exercise]), 0
        run += 1
        reps.append(Repetition(exercise, mistake, time, length))
        time, fresh = time + length + chance.uniform(0.1, 0.6), False


def _said(reps: tuple[Repetition, ...]) -> list[Feedback]:
    """A start for each block, a correction where a mistake begins, a praise where it ends."""
    said, before = [], None
    for rep in reps:
        if before is None or before.exercise != rep.exercise:
            said.append(Feedback(rep.told_s, START[rep.exercise]))
        elif rep.mistake and rep.mistake != before.mistake:
            said.append(Feedback(rep.told_s, CORRECTION[rep.exercise, rep.mistake]))
        elif before.mistake and not rep.mistake:
            said.append(Feedback(rep.told_s, PRAISE[rep.exercise, before.mistake]))
        before = rep
    return said


def _seen(chance: Random) -> tuple[Camera, tuple[float, float]]:
    """A camera, and how far it goes sideways and nearer by the end of the clip."""
    dark, light = _colour(chance, 0, 90), _colour(chance, 165, 255)
    if chance.random() < 0.3:
        dark, light = light, dark
    camera = Camera(
        scale=chance.uniform(0.6, 0.85),
        x=chance.uniform(0.42, 0.58),
        y=chance.uniform(0.88, 0.96),
        roll=chance.uniform(-6, 6),
        mirrored=chance.random() < 0.5,
        width=chance.uniform(0.02, 0.04),
        figure=dark,
        ground=light,
    )
    return camera, (chance.uniform(-0.08, 0.08), chance.uniform(-0.1, 0.1))


def _colour(chance: Random, least: int, most: int) -> tuple[int, int, int]:
    return chance.randint(least, most), chance.randint(least, most), chance.randint(least, most)

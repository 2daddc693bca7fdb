"""A figure drawn from the angles of its joints. Knows poses and Pillow, no exercise plan.

Lengths are parts of the body's height; x is to the figure's front (side views) or its left (front view),
y up from the ground.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import acos, cos, hypot, pi, radians, sin
from typing import Any

SHANK, THIGH, TORSO, ARM, HEAD = 0.25, 0.25, 0.32, 0.32, 0.065
Point = tuple[float, float]
Limb = tuple[Point, ...]


@dataclass(frozen=True)
class Pose:
    """Limbs as lines through joints, the head's middle, and the hip between them."""

    limbs: tuple[Limb, ...]
    head: Point


@dataclass(frozen=True)
class Camera:
    """How a figure is seen. `scale`: its height in the picture's; `x`, `y`: where its feet are, in the
    picture's sides; `roll` in degrees; `width`: of a limb, in the picture's sides; colours are RGB.
    """

    scale: float = 0.75
    x: float = 0.5
    y: float = 0.92
    roll: float = 0.0
    mirrored: bool = False
    width: float = 0.03
    figure: tuple[int, int, int] = (30, 30, 30)
    ground: tuple[int, int, int] = (235, 235, 235)


def squat(depth: float, lean: float = 0.0) -> Pose:
    """From the side. depth 0 stands, 1 has the thighs level; `lean` 0..1 tips the torso too far forward."""
    ankle = (0.0, 0.0)
    knee = _from(ankle, SHANK, radians(35 * depth))
    hip = _from(knee, THIGH, radians(-85 * depth))
    return _upper((ankle, knee, hip), hip, radians((30 + 40 * lean) * depth), radians(180 - 90 * depth))


def lunge(depth: float, lean: float = 0.0, short: float = 0.0) -> Pose:
    """From the side, one leg forward. `short` 0..1: a step that is too short."""
    step = (0.62 - 0.34 * short) * depth**0.7
    hip = (0.0, SHANK + THIGH - 0.01 - (0.2 - 0.06 * short) * depth)
    front, back = (step / 2, 0.0), (-step / 2, 0.0)
    ahead, behind = (front, _knee(front, hip), hip), (back, _knee(back, hip), hip)
    upper = _upper(ahead, hip, radians(45 * lean * depth), radians(175))
    return Pose((behind, *upper.limbs), upper.head)


def jack(spread: float, arms: float = 1.0, feet: float = 1.0) -> Pose:
    """A jumping jack from the front. spread 0 stands, 1 is the star; `arms` and `feet`: how much of their
    way they go.
    """
    hip = (0.0, SHANK + THIGH + 0.05 * spread)
    shoulder = (0.0, hip[1] + TORSO)
    leg, arm = radians(3 + 27 * spread * feet), radians(12 + 155 * spread * arms)
    limbs: list[Limb] = [(hip, shoulder)]
    for side in (-1, 1):
        limbs.append((hip, _from(hip, SHANK + THIGH, pi - side * leg)))
        limbs.append((shoulder, _from(shoulder, ARM, pi - side * arm)))
    return Pose(tuple(limbs), _from(shoulder, 0.1, 0.0))


def draw(pose: Pose, camera: Camera, size: int) -> Any:
    """The picture, a Pillow image [size x size] in RGB."""
    from PIL import Image, ImageDraw

    big = 2 * size  # drawn twice as large: its edges are smooth once it is made smaller
    image = Image.new("RGB", (big, big), camera.ground)
    pen, width = ImageDraw.Draw(image), max(1, round(camera.width * big))
    tilt, side = radians(camera.roll), -1 if camera.mirrored else 1

    def seen(point: Point) -> Point:
        x, y = side * point[0] * camera.scale, point[1] * camera.scale
        return (camera.x + x * cos(tilt) - y * sin(tilt)) * big, (
            camera.y - x * sin(tilt) - y * cos(tilt)
        ) * big

    for limb in pose.limbs:
        points = [seen(point) for point in limb]
        pen.line(points, fill=camera.figure, width=width, joint="curve")
        for x, y in points:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=camera.figure)
    (x, y), r = seen(pose.head), HEAD * camera.scale * big
    pen.ellipse((x - r, y - r, x + r, y + r), fill=camera.figure)
    return image.resize((size, size), Image.Resampling.BOX)


def _from(point: Point, length: float, angle: float) -> Point:
    """The point that lies so far from another, the angle being from straight up towards x."""
    return point[0] + length * sin(angle), point[1] + length * cos(angle)


def _knee(foot: Point, hip: Point) -> Point:
    """The knee of a leg whose ends are known, bent to the front."""
    x, y = hip[0] - foot[0], hip[1] - foot[1]
    away = min(hypot(x, y), SHANK + THIGH - 1e-6)
    bend = acos((SHANK**2 + away**2 - THIGH**2) / (2 * SHANK * away))
    straight = pi / 2 - acos(max(-1.0, min(1.0, x / away)))
    return _from(foot, SHANK, straight + bend)


def _upper(leg: Limb, hip: Point, lean: float, arm: float) -> Pose:
    """Torso, arm and head on a hip."""
    shoulder = _from(hip, TORSO, lean)
    return Pose((leg, (hip, shoulder), (shoulder, _from(shoulder, ARM, arm))), _from(shoulder, 0.1, lean))

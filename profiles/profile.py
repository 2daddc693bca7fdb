"""A device's figures, each with where it comes from: read from a TOML file, checked for sense, written
back.

Knows no graph and no model. Inside, sizes are bytes and times seconds, so a file says `84.8e9`, never
`84.8` and GB/s; a figure a thousand times off falls outside its range and is refused.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from edgespec.errors import InputError

SCHEMA = 1
BASES = ("read", "arithmetic", "fit", "measured", "estimate")
KINDS = ("npu", "cpu")
THIS_MACHINE = "this-machine"
# Least and most of each figure, less than a thousandfold apart: a slip of the unit always shows. Only the
# host's share may be nothing.
RANGES: dict[str, tuple[float, float]] = {
    "bandwidth_peak_bytes_per_s": (3e9, 1e12),
    "bandwidth_weights_bytes_per_s": (1e9, 8e11),
    "bandwidth_widened_bytes_per_s": (5e8, 4e11),
    "bandwidth_kv_bytes_per_s": (3e8, 2.5e11),
    "bandwidth_activations_bytes_per_s": (3e8, 2.5e11),
    "bandwidth_host_bytes_per_s": (5e8, 2e11),
    "dispatch_s": (5e-6, 0.004),
    "host_s": (0, 0.06),
    "ops_int8_per_s": (1e12, 9e14),
    "ops_int16_per_s": (1e12, 9e14),
    "ops_float_per_s": (5e11, 4e14),
    "efficiency": (0.02, 1),
    "bytes_float": (2, 4),
    "bytes_on_chip": (1e5, 6e7),
    "bytes_context": (6e8, 5e11),
    "bytes_memory": (6e8, 5e11),
    "energy_j_per_byte": (1e-12, 9e-10),
}
CPU_SLOWER = 100  # a processor's rates of arithmetic, against an NPU's


@dataclass(frozen=True)
class Figure:
    """A value, the source that gives it, the date of that source, and how it follows from it (`BASES`)."""

    value: float
    source: str
    date: str
    basis: str


@dataclass(frozen=True)
class Profile:
    """A device: `kind` npu or cpu, its memory in words, the operators it takes (profiles/ops), its figures.

    call = dispatch + max(weights/bandwidth + kv/bandwidth + activations/bandwidth, ops/(rate · efficiency));
    `host_s` is the processor's share of a round (choosing a token, the loop), `bandwidth_host` that of its
    copies. `bytes_float`: what a float of a cache or an activation takes there; `bytes_context`: most that
    one compiled graph with its weights may hold; `bytes_memory`: most that one program may hold. A figure
    that is None is unknown, and what needs it is not computed: never a default in its place.
    """

    name: str
    title: str
    kind: str
    memory: str
    operators: str
    bandwidth_peak_bytes_per_s: Figure
    bandwidth_weights_bytes_per_s: Figure
    bandwidth_widened_bytes_per_s: Figure
    bandwidth_kv_bytes_per_s: Figure
    bandwidth_activations_bytes_per_s: Figure
    bandwidth_host_bytes_per_s: Figure
    dispatch_s: Figure
    host_s: Figure
    efficiency: Figure
    bytes_float: Figure
    ops_int8_per_s: Figure | None
    ops_int16_per_s: Figure | None
    ops_float_per_s: Figure | None
    bytes_on_chip: Figure | None
    bytes_context: Figure | None
    bytes_memory: Figure | None
    energy_j_per_byte: Figure | None

    def figures(self) -> dict[str, Figure | None]:
        """Every figure by its name."""
        return {name: getattr(self, name) for name in RANGES}

    def value(self, name: str) -> float | None:
        """A figure's value, None where it is unknown."""
        figure = getattr(self, name)
        return None if figure is None else figure.value

    def with_figure(self, name: str, figure: Figure) -> Profile:
        """The same with another figure of this name."""
        return replace(self, **{name: figure})  # type: ignore[arg-type]

    def precisions(self) -> tuple[str, ...]:
        """The arithmetics that the device has a rate for: int8, int16, float."""
        kinds = ("int8", "int16", "float")
        return tuple(kind for kind in kinds if getattr(self, f"ops_{kind}_per_s") is not None)

    def to_json(self) -> dict[str, Any]:
        """Words and figures as plain data."""
        words = {name: getattr(self, name) for name in WORDS}
        return words | {name: figure and vars(figure) for name, figure in self.figures().items()}


WORDS = ("name", "title", "kind", "memory", "operators")
OPTIONAL = tuple(name for name, hint in get_type_hints(Profile).items() if name in RANGES and hint != Figure)


def names() -> tuple[str, ...]:
    """The shipped profiles, and `this-machine` where it was measured."""
    shipped = [item.name for item in _shipped().iterdir() if item.name.endswith(".toml")]
    own = [f"{THIS_MACHINE}.toml"] if own_path().is_file() else []
    return tuple(sorted(name.removesuffix(".toml") for name in shipped + own))


def load(name: str | Path) -> Profile:
    """A shipped profile by its name, or one in a .toml file; InputError for what is unknown or
    senseless.
    """
    text = str(name)
    if text.endswith(".toml") or os.sep in text:
        return parse(_read(Path(text)), text)
    if text == THIS_MACHINE:
        return parse(_read(own_path()), str(own_path()))
    if text not in names():
        near = difflib.get_close_matches(text, names(), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of: {', '.join(names())}"
        raise InputError(f"no profile is called {text!r}", hint)
    return parse(_shipped().joinpath(f"{text}.toml").read_text("utf-8"), f"{text}.toml")


def own_path() -> Path:
    """Where `edgespec profile measure` keeps the profile of this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "edgespec" / "profiles" / f"{THIS_MACHINE}.toml"


def parse(text: str, where: str) -> Profile:
    """The profile in this TOML text; `where` only names it in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _fault(where, f"is not TOML: {error}", "compare it with edgespec profile show") from None
    if data.get("schema") != SCHEMA:
        raise _fault(where, f"has schema {data.get('schema')!r}, not {SCHEMA}", f"write schema = {SCHEMA}")
    given = data.get("figures", {})
    if not isinstance(given, dict):
        raise _fault(where, "figures is no table", "write them under [figures]")
    if unknown := sorted((set(data) - {"schema", "figures", *WORDS}) | (set(given) - set(RANGES))):
        raise _fault(where, f"unknown field {unknown[0]!r}", f"use one of: {', '.join((*WORDS, *RANGES))}")
    for name in WORDS:
        if not isinstance(data.get(name), str) or not data[name]:
            raise _fault(where, f"{name} is missing", f'write {name} = "..."')
    if data["kind"] not in KINDS:
        raise _fault(where, f"kind {data['kind']!r} is unknown", f"use {' or '.join(KINDS)}")
    slower = CPU_SLOWER if data["kind"] == "cpu" else 1
    figures = {name: _figure(where, name, given.get(name), slower) for name in RANGES}
    profile = Profile(**{name: data[name] for name in WORDS}, **figures)  # type: ignore[arg-type]
    _check_together(where, profile)
    return profile


def to_toml(profile: Profile) -> str:
    """The profile as the text of a file that `load` reads."""
    quoted = lambda text: json.dumps(text, ensure_ascii=False)  # noqa: E731
    lines = [f"schema = {SCHEMA}", *(f"{name} = {quoted(getattr(profile, name))}" for name in WORDS)]
    lines += ["", "[figures]"]
    for name, figure in profile.figures().items():
        if figure is not None:
            words = ", ".join(
                f"{key} = {quoted(text)}" for key, text in vars(figure).items() if key != "value"
            )
            value = f"{figure.value:.0f}" if name.startswith("bytes") else f"{figure.value:.4g}"
            lines.append(f"{name} = {{ value = {value}, {words} }}")
    return "\n".join(lines) + "\n"


def _figure(where: str, name: str, data: Any, slower: float) -> Figure | None:
    if data is None:
        if name in OPTIONAL:
            return None
        raise _fault(where, f"figure {name} is missing", f"write {name} = {{ value, source, date, basis }}")
    wanted = {item.name for item in fields(Figure)}
    if not isinstance(data, dict) or set(data) != wanted:
        raise _fault(where, f"{name} needs value, source, date and basis", "say where the figure comes from")
    value, (least, most) = data["value"], RANGES[name]
    if name.startswith("ops"):
        least, most = least / slower, most / slower
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise _fault(
            where, f"{name} is {value!r}, which is no positive number", "measure it, or leave it out"
        )
    if not least <= value <= most:
        hint = f"write it in {_unit(name)}: is it a thousand times off?"
        raise _fault(where, f"{name} {value:g} is not {least:g} to {most:g}", hint)
    for word in ("source", "date"):
        if not isinstance(data[word], str) or not data[word].strip():
            raise _fault(where, f"{name} has no {word}", "say where the figure comes from, and when")
    if data["basis"] not in BASES:
        raise _fault(where, f"{name} has the basis {data['basis']!r}", f"use one of: {', '.join(BASES)}")
    return Figure(float(value), data["source"], data["date"], data["basis"])


def _check_together(where: str, profile: Profile) -> None:
    """Nothing streams weights faster than the memory's peak."""
    peak, weights = profile.bandwidth_peak_bytes_per_s.value, profile.bandwidth_weights_bytes_per_s.value
    if weights > peak:
        raise _fault(
            where,
            f"bandwidth_weights_bytes_per_s {weights:g} is more than the peak {peak:g}",
            "what a device sustains is below its peak: correct one of them",
        )


def _unit(name: str) -> str:
    if name.startswith(("bandwidth", "ops")):
        return "bytes a second" if name.startswith("bandwidth") else "operations a second"
    return {"dispatch_s": "seconds", "host_s": "seconds", "efficiency": "parts of 1"}.get(
        name, "bytes" if name.startswith("bytes") else "joules a byte"
    )


def _shipped() -> Any:
    return files("edgespec.profiles").joinpath("devices")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        own = path == own_path()
        hint = "make it: edgespec profile measure BUNDLE" if own else "see edgespec profile list"
        raise InputError(f"{path} does not exist", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a TOML file") from None


def _fault(where: str, what: str, hint: str) -> InputError:
    return InputError(f"profile {where}: {what}", hint)

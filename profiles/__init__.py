"""What is known of devices, as data: the operators that each takes (ops/*.toml), and its figures
(devices/*.toml, read by profile.py). Knows nothing of graphs.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from edgespec.errors import InputError
from edgespec.profiles.profile import Figure, Profile, load, names

__all__ = ["Figure", "Profile", "devices", "load", "names", "operators", "reasons", "refused"]

DOMAINS = {"ai.onnx": ""}  # a graph spells the standard domain as the empty string
Operator = tuple[str, str]


def operators(device: str) -> frozenset[Operator]:
    """The (domain, type) pairs of the operators that a device takes; InputError for an unknown device."""
    return frozenset(reasons(device))


def reasons(device: str) -> dict[Operator, str]:
    """Each operator that a device takes: what needs it, and how it is known to run."""
    data = _load(device)
    return (reasons(data["extends"]) if "extends" in data else {}) | _pairs(data)


def refused(device: str) -> dict[Operator, str]:
    """Operators that a device's graphs never hold although one might think so: why not."""
    return _pairs(_load(device).get("never", {}))


def devices() -> tuple[str, ...]:
    """The devices that have a list of operators."""
    names = (item.name for item in files("edgespec.profiles").joinpath("ops").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def _load(device: str) -> dict[str, Any]:
    if device not in devices():
        raise InputError(f"no operators are listed for device {device!r}", f"use {' or '.join(devices())}")
    return tomllib.loads(files("edgespec.profiles").joinpath("ops", f"{device}.toml").read_text("utf-8"))


def _pairs(tables: dict[str, Any]) -> dict[Operator, str]:
    """(domain, type) -> reason, of the tables that are named after a domain."""
    domains = [name for name in tables if name != "never" and isinstance(tables[name], dict)]
    return {(DOMAINS.get(name, name), op): text for name in domains for op, text in tables[name].items()}

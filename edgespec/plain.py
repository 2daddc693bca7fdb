"""Frozen facts as plain JSON data and back, from data that nobody vouches for."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from edgespec.errors import BundleError

LARGEST_INT = 2**48
LONGEST_TEXT = 4096


def to_json(value: Any) -> Any:
    """A frozen fact as plain JSON data."""
    return asdict(value)


def from_json(kind: Any, data: Any, where: str = "manifest") -> Any:
    """Build `kind` from JSON data that nobody vouches for; the first fault is a BundleError naming its field.

    A field unknown, missing or of another type is a fault (a bool is not an int), and so are an int below 0
    or above 2^48 and a text that is not UTF-8, holds a control character or is longer than 4,096 characters.
    `Any` is not looked into.
    """
    if kind is Any:
        return data
    if is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        if unknown := sorted(set(_expect(dict, data, where)) - set(hints)):
            raise _fault(where, f"unknown field {_short(unknown[0])}")
        if missing := [name for name in hints if name not in data]:
            raise _fault(where, f"field {missing[0]!r} is missing")
        return kind(**{name: from_json(hints[name], data[name], f"{where}.{name}") for name in hints})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(
            from_json(item, value, f"{where}[{i}]") for i, value in enumerate(_expect(list, data, where))
        )
    if get_origin(kind) is dict:
        item = get_args(kind)[1]
        pairs = _expect(dict, data, where).items()
        return {
            _scalar((str,), key, where): from_json(item, value, f"{where}[{_short(key)}]")
            for key, value in pairs
        }
    return _scalar(get_args(kind) or (kind,), data, where)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _scalar(choices: tuple[type, ...], data: Any, where: str) -> Any:
    if type(data) not in choices:
        raise _fault(where, f"is {_name(type(data))}, not {' or '.join(_name(c) for c in choices)}")
    if type(data) is int and not 0 <= data < LARGEST_INT:
        raise _fault(where, f"is {'negative' if data < 0 else 'absurdly large'}")
    if type(data) is str and (
        len(data) > LONGEST_TEXT or any(c < " " or "\ud800" <= c <= "\udfff" for c in data)
    ):
        raise _fault(where, f"{_short(data)} is too long or holds a control character")
    return data


def _expect(kind: type, data: Any, where: str) -> Any:
    if type(data) is not kind and not (kind is list and type(data) is tuple):
        raise _fault(where, f"is {_name(type(data))}, not {_name(kind)}")
    return data


def _name(kind: type) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(kind, kind.__name__)


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _fault(where: str, what: str) -> BundleError:
    return BundleError(f"{where}: {what}", "export the bundle again with this version of edgespec")

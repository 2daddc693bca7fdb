"""Command-line flags made from frozen dataclasses, and the checks that their values share.

A field's metadata holds its help text: a flag that does nothing cannot exist. Knows no command.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from edgespec.errors import InputError


def flag(text: str, default: Any = MISSING, kw_only: bool = False, **more: Any) -> Any:
    given = {} if default is MISSING else {"default": default}
    return field(metadata={"help": text, **more}, kw_only=kw_only, **given)


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give the parser one argument for each field of a config."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        _add_flag(parser, item, hints[item.name])


def _add_flag(parser: argparse.ArgumentParser, item: Field, hint: Any) -> None:
    extra: dict[str, Any] = {"help": item.metadata["help"]}
    if choices := item.metadata.get("choices"):
        extra["choices"] = choices
    if item.metadata.get("positional"):
        extra |= {"nargs": "+", "action": _Tuple} if item.metadata.get("many") else {}
        parser.add_argument(item.name, metavar=item.name.upper(), **extra)
        return
    long = item.metadata.get("flag", flag_name(item.name))
    names = [item.metadata["short"], long] if "short" in item.metadata else [long]
    if hint is bool:
        parser.add_argument(*names, action="store_true", dest=item.name, **extra)
        return
    if item.metadata.get("many"):
        extra |= {"nargs": "+", "action": _Tuple}
    extra |= {"dest": item.name, "required": item.default is MISSING, "default": item.default}
    if item.default is MISSING:
        extra.pop("default")
    elif item.default not in (None, ()):
        shown = listed(item.default) if isinstance(item.default, tuple) else item.default
        extra["help"] += f" (default: {shown})"
    if item.metadata.get("repeated"):
        parser.add_argument(*names, **(extra | {"metavar": "FILE", "action": _Another}))
        return
    if "choices" not in extra:
        words = {
            int: "N",
            int | None: "N",
            float: "X",
            float | None: "X",
            tuple[int, ...]: "N,N,...",
            tuple[str, ...]: "NAME,...",
        }
        extra["metavar"] = words.get(hint, item.name.upper())
    if item.metadata.get("many"):
        parser.add_argument(*names, **(extra | {"metavar": "FILE"}))
        return
    parser.add_argument(*names, type=_parser_of(hint), **extra)


class _Tuple(argparse.Action):
    """Several words after one flag, such as a shell's *.jsonl."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Another(argparse.Action):
    """One more word each time that a flag is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), values))


def from_values(kind: type, values: dict[str, Any]) -> Any:
    """The config of these values, types checked; a key that is no field is an InputError."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise InputError(f"unknown setting {unknown[0]!r}", f"use one of: {', '.join(hints)}")
    for item in fields(kind):
        if item.default is MISSING and item.name not in values:
            raise InputError(f"{item.name} is missing", f"give {flag_name(item.name)}")
    for name, value in values.items():
        wanted = get_args(hints[name]) or (hints[name],)
        right = (
            isinstance(value, tuple) and all(type(v) is wanted[0] for v in value)
            if get_origin(hints[name]) is tuple
            else type(value) in wanted
        )
        if not right:
            raise InputError(
                f"{name} is {value!r}, which has the wrong type", f"see edgespec --help for {name}"
            )
    return kind(**values)


def _parser_of(hint: Any) -> Any:
    if hint in (int, float):
        return hint
    return {
        int | None: int,
        float | None: float,
        tuple[int, ...]: _int_list,
        tuple[str, ...]: _word_list,
    }.get(hint, str)


def _word_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _int_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,4,8") from None


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_of(kind: type, name: str) -> Any:
    return next(item.default for item in fields(kind) if item.name == name)


def listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InputError(f"{name} {value} is not {least} to {most}", f"use another {flag_name(name)}")


def ascending(name: str, values: tuple[int, ...]) -> None:
    if list(values) != sorted(set(values)):
        tidy = listed(tuple(sorted(set(values))))
        raise InputError(f"{name} {listed(values)} must ascend", f"use {flag_name(name)} {tidy}")


def one_of(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise InputError(f"unknown {name} {value!r}", f"use one of: {', '.join(words)}")


RANDOM = "random:"  # before a folder: its config.json, with random weights


def check_model(name: str, value: str | None, words: tuple[str, ...] = ("demo",)) -> None:
    """InputError where a model is none of the words and no path that exists, `random:` before it or not."""
    if value is not None and value not in words and not os.path.exists(value.removeprefix(RANDOM)):
        named = f"the word {' or '.join(words)}"
        raise InputError(f"{name} {value!r} does not exist", f"give a model folder, a .gguf file, or {named}")


def check_place(what: str, path: str) -> None:
    """InputError where the folder that something should go into is none."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise InputError(f"{parent}, where {what} should go, is not a folder", f"mkdir -p {parent}")


def check_folder(what: str, path: str) -> None:
    """InputError where a folder of results cannot be made or gone on with."""
    check_place(what, path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"{path} exists and is no folder", "choose another folder with -o")


def check_file(name: str, value: str | None) -> None:
    if value is not None and not os.path.isfile(value):
        raise InputError(f"{name} {value!r} is not a file", f"give an existing file to {flag_name(name)}")

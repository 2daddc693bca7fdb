"""The commands: flags in, one function each, results on stdout, everything else on stderr.

Exit codes: 0 yes; 1 the answer is no; 2 your input, file or setup; 101 our bug. Heavy imports stand inside
the functions, so `edgespec --help` needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from edgespec.config import CheckConfig, ExportConfig, GenerateConfig, InspectConfig, add_flags, from_values
from edgespec.errors import BackendError, EdgespecError, InputError
from edgespec.progress import Progress

OUR_BUG = 101


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminated)
    try:
        values = vars(_parser().parse_args(argv))
        command, kind = values.pop("command"), values.pop("kind")
        as_json, quiet = values.pop("json"), values.pop("quiet")
        code = command(from_values(kind, values), as_json, Progress(quiet=quiet))
        sys.stdout.flush()
        return code
    except EdgespecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader left (`edgespec inspect x | head -1`): nobody is there to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("error: interrupted\nhint:  nothing was left behind; run it again", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error} (a bug of edgespec)", file=sys.stderr)
        print("hint:  report it with the lines above and the command you typed", file=sys.stderr)
        return OUR_BUG


def export(config: ExportConfig, as_json: bool, progress: Progress) -> int:
    """Make a bundle."""
    config.check()
    run = _load("edgespec.exporters", "export")
    bundle = run(config, progress, _load("edgespec.runtime.engine", "Engine"))
    if as_json:
        _print_json("export", {"bundle": str(bundle.path), "files": len(bundle.manifest.files)})
    else:
        print(bundle.path)
    progress.note(f"next: edgespec inspect {bundle.path}")
    return 0


def inspect(config: InspectConfig, as_json: bool, progress: Progress) -> int:
    """Print what a bundle holds and what it costs a device."""
    from edgespec.bundle import open_bundle
    from edgespec.count import count
    from edgespec.report import to_json, to_table

    with progress.stage("checksums"):
        bundle = open_bundle(config.bundle)
    costs = count(bundle)
    if as_json:
        _print_json("inspect", to_json(costs))
    else:
        print(to_table(costs), end="")
    progress.note(f"next: edgespec check {config.bundle}")
    return 0


def check(config: CheckConfig, as_json: bool, progress: Progress) -> int:
    """Prove a bundle; exit 1 if it does not do what its source does."""
    config.check()
    from edgespec.bundle import open_bundle

    with progress.stage("checksums"):
        bundle = open_bundle(config.bundle)
    from edgespec.profiles import operators

    run = _load("edgespec.exporters.check", "check")
    engine = _load("edgespec.runtime.engine", "Engine")
    allowed = operators(config.ops or bundle.manifest.device)
    result = run(bundle, engine, allowed, config.source, config.text, config.self_only, progress)
    if as_json:
        _print_json("check", result.to_json())
    else:
        print("\n".join(result.lines()))
    verdict = f'edgespec generate {config.bundle} "..."' if result.passed else "export the bundle again"
    progress.note(f"next: {verdict}")
    return 0 if result.passed else 1


def generate(config: GenerateConfig, as_json: bool, progress: Progress) -> int:
    """Continue a prompt."""
    config.check()
    from edgespec.bundle import open_bundle

    open_bundle(config.bundle, verify=False)
    session_type = _load("edgespec.runtime.session", "Session", extra="onnx")
    with progress.stage("opening"):
        session = session_type.open(Path(config.bundle))
    answer = session.generate(config.prompt, tokens=config.tokens, raw=config.raw)
    if as_json:
        _print_json("generate", answer.to_json())
    else:
        print(answer.text)
    progress.note(f"next: edgespec generate {config.bundle} --help")
    return 0


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (export, ExportConfig),
    (inspect, InspectConfig),
    (check, CheckConfig),
    (generate, GenerateConfig),
)


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in our two lines."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("edgespec", description="Fixed-shape export and lossless speculative decoding.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command, kind in COMMANDS:
        text = (command.__doc__ or "").strip()
        one = commands.add_parser(command.__name__, help=text, description=text, allow_abbrev=False)
        one.set_defaults(command=command, kind=kind)
        add_flags(one, kind)
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    return parser


def _load(module: str, name: str, extra: str = "export") -> Any:
    """A part that needs an extra, or a BackendError that names the extra."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgespec"):
            raise
        raise BackendError(f"{error.name} is not installed", f"pip install 'edgespec[{extra}]'") from None


def _print_json(command: str, result: dict[str, Any]) -> None:
    print(json.dumps({"schema": f"edgespec.{command}/1", **result}, indent=1, allow_nan=False))


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt

"""The command line: flags in, one command run, its exit code out.

Exit codes: 0 yes; 1 the answer is no; 2 your input, file or setup; 101 our bug.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from edgespec.commands import COMMANDS, GROUPS
from edgespec.console import terminated
from edgespec.errors import EdgespecError, InputError
from edgespec.flags import add_flags, from_values
from edgespec.progress import Progress

OUR_BUG = 101


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, terminated)
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
        print("error: interrupted\nhint:  nothing half-made was left behind; run it again", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error} (a bug of edgespec)", file=sys.stderr)
        print("hint:  report it with the lines above and the command you typed", file=sys.stderr)
        return OUR_BUG


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in our two lines."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    """Every command's parser; the name `profile_list` is the word `list` under the word `profile`, and
    `vision_train_selector` the word `train-selector` under `vision`."""
    parser = _Parser("edgespec", description="Fixed-shape export and lossless speculative decoding.")
    words = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    groups: dict[str, Any] = {}
    for command, kind in COMMANDS:
        group, _, name = command.__name__.partition("_")
        group, name = (group, name.replace("_", "-")) if name else ("", group)
        if group and group not in groups:
            text = GROUPS[group]
            one = words.add_parser(group, help=text, description=text, allow_abbrev=False)
            groups[group] = one.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
        text = (command.__doc__ or "").strip()
        one = groups.get(group, words).add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(command=command, kind=kind)
        add_flags(one, kind)
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    return parser

"""`optimum-cli export edgespec`: our export under Optimum's command line; the work is edgespec.cli's.

Optimum 2.3 finds it through optimum_register/edgespec.py, which installs in optimum/commands/register, the
one folder that it reads the commands of others from. Its older way, `@optimum_cli_subcommand` in the module
`subpackage` of a distribution, is closed to all but two that optimum/subpackages.py names.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from edgespec.config import ExportConfig
from edgespec.flags import add_flags

COMMAND = "edgespec"


class EdgespecExport(BaseOptimumCLICommand):
    """The command; loaded at every start of optimum-cli, so nothing heavy is imported before `run`."""

    COMMAND = CommandInfo(COMMAND, "Export fixed-shape graphs for speculative decoding on a small device.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The flags of `edgespec export`."""
        add_flags(parser, ExportConfig)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")

    def run(self) -> None:
        """`edgespec export` with the words that follow `edgespec`; exits with its code."""
        from edgespec.cli import main

        words = sys.argv[sys.argv.index(COMMAND) + 1 :]
        raise SystemExit(main(["export", *words]))

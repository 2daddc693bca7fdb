"""Read by optimum-cli from optimum/commands/register. No __init__.py may stand here (a namespace package)."""

from optimum.commands.export.base import ExportCommand

from edgespec.exporters.optimum_command import EdgespecExport

REGISTER_COMMANDS = [(EdgespecExport, ExportCommand)]

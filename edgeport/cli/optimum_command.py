"""`optimum-cli edgeport ...`: edgeport's own command line as a subcommand of optimum's.

The wheel installs this file as `optimum/commands/register/register_edgeport.py`, where optimum looks for
subcommands (see `load_optimum_namespace_cli_commands` in optimum/commands/optimum_cli.py).
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class EdgeportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands everything after `optimum-cli edgeport` to `edgeport`."""

    COMMAND = CommandInfo(name="edgeport", help="Ship a model to phones and edge boards, with proof that it works.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take every argument as it is: with no prefix character, argparse sees no option of its own."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Run edgeport and end with its exit code."""
        from edgeport.cli.main import main

        sys.exit(main(self.args.arguments))


REGISTER_COMMANDS = [EdgeportCommand]

"""The ``panda`` command: what is done before and after ``lightning fit``. One tool a file.

A tool's module has ``HELP``, a sentence; ``arguments(parser)``, which adds what it accepts; and ``run(config)``, which
returns the exit status.
"""

import sys

from panda_lightning.cli import OneSentenceParser, silence
from panda_lightning.tools import check_data, fisher
from panda_lightning.types import PandaError

TOOLS = {"check-data": check_data, "fisher": fisher}


def main(args: list[str] | None = None) -> int:
    """Run one of the tools.

    Args:
        args: Words in place of sys.argv, for Python and tests.

    Returns:
        The exit status, 0 when nothing is wrong.
    """
    silence()
    parser = OneSentenceParser(prog="panda", description="Tools around `lightning fit`.")
    commands = parser.add_subcommands()
    for name, tool in TOOLS.items():
        accepted = OneSentenceParser(description=tool.HELP)
        tool.arguments(accepted)
        commands.add_subcommand(name, accepted, help=tool.HELP)
    try:
        config = parser.instantiate_classes(parser.parse_args(args))
        status: int = TOOLS[config.subcommand].run(config[config.subcommand])
        return status
    except ValueError as error:
        refusal = error if isinstance(error, PandaError) else error.__cause__  # jsonargparse wraps a constructor's
        if not isinstance(refusal, PandaError):
            raise
        sys.exit(f"error: {refusal}")

"""The ``panda`` command: what is done before and after ``lightning fit``. One tool a file.

A tool's module has ``HELP``, a sentence; ``arguments(parser)``, which adds what it accepts; and ``run(config)``, which
returns the exit status.
"""

import sys
from pathlib import Path

from panda_lightning.command.endings import end_in_a_sentence, pass_over_imports, silence
from panda_lightning.command.parser import VERSION, OneSentenceParser
from panda_lightning.command.words import find_own_classes
from panda_lightning.runtime.whole import require_folder
from panda_lightning.tools import bank, check_data, export, fisher, gallery, suspects, table
from panda_lightning.types import PandaError

TOOLS = {
    "bank": bank,
    "check-data": check_data,
    "export": export,
    "fisher": fisher,
    "gallery": gallery,
    "suspects": suspects,
    "table": table,
}


def main(args: list[str] | None = None) -> int:
    """Run one of the tools.

    Args:
        args: Words in place of sys.argv, for Python and tests.

    Returns:
        The exit status, 0 when nothing is wrong.
    """
    silence()
    pass_over_imports()
    find_own_classes()
    parser = OneSentenceParser(prog="panda", description="Tools around `lightning fit`.", version=VERSION)
    commands = parser.add_subcommands()
    accepted = {name: OneSentenceParser(description=tool.HELP) for name, tool in TOOLS.items()}
    for name, tool in TOOLS.items():
        tool.arguments(accepted[name])
        commands.add_subcommand(name, accepted[name], help=tool.HELP)
    try:
        config = parser.instantiate_classes(parser.parse_args(args))
        chosen = config[config.subcommand]
        accepted[config.subcommand].require_bounds(chosen)
        output = chosen.get("output")
        if output is not None:
            if Path(output).is_dir():
                raise PandaError(f"--output={output} is a folder: name a file.")
            require_folder("--output", Path(output).parent)
        status: int = TOOLS[config.subcommand].run(chosen)
        sys.stdout.flush()
        return status
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        end_in_a_sentence(error)

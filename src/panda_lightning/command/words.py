"""Words of a command line: those that are left out, those that have no effect, and ``~`` for the home folder."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from panda_lightning.command.checkpoints import is_checkpoint, require_checkpoint
from panda_lightning.datamodules import UnlabelledImages
from panda_lightning.runtime.agreement import made_with, same
from panda_lightning.types import PandaError


def find_own_classes() -> None:
    """Let commands name classes of files in the current folder, as ``python -m`` does, after installed packages."""
    if "" not in sys.path:
        sys.path.append("")


def completed(words: list[str]) -> list[str]:
    """The words of a command line with the class of the model, where the checkpoint alone says it, and of loose images.

    Raises:
        PandaError: If the checkpoint cannot be read.
    """

    def places(flag: str) -> list[int]:
        return [i for i, word in enumerate(words) if re.match(rf"--{flag}(=|$)", word)]

    if words[:1] == ["predict"] and places(r"data\.images") and not places("data"):
        first = next(i for i, word in enumerate(words) if word.startswith("--data."))
        words = [*words[:first], f"--data={UnlabelledImages.__name__}", *words[first:]]
    path = places("ckpt_path")
    if path and not places("model") and not _files_and_flags(words)[0]:
        name = words[path[-1]].partition("=")[2] or "".join(words[path[-1] + 1 : path[-1] + 2])
        if is_checkpoint(name):
            file = at_home(Path(name))
            require_checkpoint(file)
            found = made_with(file)[1]["model"].get("_class_path")
            words = [words[0], f"--model={found}", *words[1:]] if found else words
    return words


def require_that_flags_count(parser: Any, words: list[str], config: Namespace, asked: Namespace) -> None:
    """Refuse flags that have no effect, or another one than they seem to.

    Args:
        parser: Of the whole command line.
        words: A command line, the verb first.
        config: What it says, with defaults, without the verb.
        asked: The same without defaults.

    Raises:
        PandaError: Naming the flag.
    """
    files, flags = _files_and_flags(words[1:])
    if words[1:] != [*files, *flags]:
        meant = parser.parse_args([*words[:1], *files, *flags], defaults=False)
        lost = [f"--{k} {v}" for k, v in meant[meant.subcommand].items() if k != "config" and not same(asked.get(k), v)]
        if lost:
            raise PandaError(f"{lost[0]} is overridden by a later --config: put flags after configuration files.")
    loggers = config.trainer.logger
    flag = next((word.split("=")[0] for word in words if word.startswith("--trainer.logger.")), None)
    if flag and isinstance(loggers, list) and len(loggers) > 1:
        raise PandaError(
            f"{flag} would be set only for the last of {len(loggers)} loggers: name the one logger to use, as in "
            "--trainer.logger CSVLogger --trainer.logger.save_dir runs, or write them in a file."
        )


def _files_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that name configuration files, and the others, each in their order."""
    files: list[str] = []
    flags: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        (files if re.match(r"(-c|--config)(=|$)", word) or before in ("-c", "--config") else flags).append(word)
    return files, flags


def at_home(value: Any) -> Any:
    """A value of a configuration, or a whole one, with the home folder for ``~`` in ``~/x`` and ``local-dir:~/x``."""
    if isinstance(value, str):
        return re.sub(r"(^|:)~(?=/|$)", lambda found: found[1] + os.path.expanduser("~"), value)
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, Namespace):
        vars(value).update({key: at_home(part) for key, part in vars(value).items()})
    elif isinstance(value, dict):
        return {key: at_home(part) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        return type(value)(at_home(part) for part in value)
    return value

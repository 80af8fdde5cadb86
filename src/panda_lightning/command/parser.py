"""Arguments as commands read them: help that comes to the point, and errors of one sentence."""

import re
import sys
import textwrap
from argparse import SUPPRESS
from importlib.metadata import version
from inspect import isabstract, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import pytorch_lightning as pl
from docstring_parser import parse
from jsonargparse import DefaultHelpFormatter
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from typing_extensions import override

from panda_lightning.arguments import Checked, require, subclasses
from panda_lightning.callbacks import Predictions
from panda_lightning.command.words import at_home
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import Detector

VERSION = f"{version('panda-lightning')} (panda-lightning)"
ABOUT = "PANDA and its family: image anomaly detection with adapted pretrained features."
EXAMPLE = r"""
  lightning fit --data ImageFolder --data.root data/bottles \
      --model PANDA --model.backbone panda_tiny --trainer.max_epochs 9

`lightning fit --model.help PANDA` lists the arguments of a class.
"""
REFERENCE = re.compile(r"See (?P<cls>\w+)(?P<link>[.:;,])(?P<own>.*)", re.DOTALL)
OPTIONS = tuple(signature(Predictions).parameters)  # of predict alone
# What a configuration file of `lightning` may hold, whatever the verb that wrote it.
KEYS = {"seed_everything", "trainer", "model", "data", *OPTIONS}.union(
    *(set(signature(getattr(pl.Trainer, verb)).parameters) - skip for verb, skip in LightningCLI.subcommands().items())
)


def explained(name: str, text: str) -> str:
    """What is said of an argument, with what another class says of it where this one says "See DN2"."""
    known = {cls.__name__: cls for cls in subclasses(Checked)}  # others, and addresses, stay as they are
    while (found := REFERENCE.match(text)) and (there := known.pop(found["cls"], None)):
        told = next((one.description for one in parse(there.__doc__ or "").params if one.arg_name == name), None)
        if told is None:
            break
        own = found["own"].strip()
        rest = f"; {own}" if found["link"] == ";" else "."
        text = own if found["link"] == ":" else told.rstrip(".") + rest
    return text


class PlainHelp(DefaultHelpFormatter):
    """Help whose descriptions keep their lines, and whose arguments need no other page."""

    @override
    def _get_help_string(self, action: Any) -> str:
        action.help = explained(action.dest.split(".")[-1], action.help or "")
        return super()._get_help_string(action)

    @override
    def _get_type_str(self, action: Any) -> str | None:
        hint = action.type or getattr(action, "_typehint", None)
        listed = hint is bool or get_origin(hint) is Literal  # beside the argument's name
        return None if hint is None or listed else _shown(hint)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (textwrap.fill(line, width - len(indent)) for line in text.splitlines())
        return textwrap.indent("\n".join(lines), indent)


class OneSentenceParser(LightningArgumentParser):
    """Says what is wrong with an argument without pages of usage and inner types around it."""

    NOISE = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Expected a <class 'NoneType'>",
        "Given value type",
        "Expected a path",
    )

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        alone = str(kwargs.get("description")).startswith("Help for ")  # of a class, whose flags all follow
        super().__init__(*args, **{"formatter_class": PlainHelp} | ({"usage": SUPPRESS} if alone else {}) | kwargs)

    @override
    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Remember the type, whose bounds are checked by ``require_bounds``."""
        action = super().add_argument(*args, **kwargs)
        if "type" in kwargs:
            vars(self).setdefault("declared", {})[action.dest] = kwargs["type"]
        return action

    def require_bounds(self, config: Any) -> None:
        """Refuse values that the types of ``add_argument`` do not allow."""
        for name, hint in vars(self).get("declared", {}).items():
            require(f"--{name}", config[name], hint)

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, with the home folder for ``~`` in whatever a file or a flag says."""
        try:
            return at_home(super().parse_args(*args, **kwargs))
        except UnicodeDecodeError as error:
            self.error(f"a configuration file is not text ({error})")

    @override
    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        """Read a configuration file without what other verbs alone know: a run's own then serves them all."""
        config = super().parse_string(*args, **kwargs)
        known = {action.dest for action in self._actions}
        for key in KEYS - known if KEYS & known else ():
            config.pop(key, None)
        return config

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip(" -") for line in message.splitlines()]
        sentence = " ".join(line for line in lines if line and not line.startswith(self.NOISE))
        for theirs, ours in (
            ("Expected a typing.Literal", "expected one of "),
            ("Parser key ", ""),
            (" Given value: ", ". Got value: "),
        ):
            sentence = sentence.replace(theirs, ours)
        sentence = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", sentence)
        sentence = re.sub(r"Expected a tuple with (\d) elements", r"expected a list of \1", sentence)
        sentence = re.sub(r"(expected \w+)(?:,|\. Got value: \w+)? expected ", r"\1, or ", sentence)  # of a union
        if "is not accepted" in sentence:  # this parser is then that of the class itself
            accepted = ", ".join(a.dest for a in self._actions if a.dest not in ("help", "config"))
            first = "Put --config FILE, or --data CLASS and --model CLASS, before it"
            sentence += f". Accepted are {accepted}" if accepted else f". {first}"
        if "dot import path" in sentence:
            kinds: dict[str, type[Any]] = {"detectors": Detector, "data sets": AnomalyDataModule}
            if '"trainer.' in sentence:
                kinds = {"loggers": Logger, "callbacks": pl.Callback}
            sentence += ". Available are the " + " and the ".join(
                f"{kind} {names(base)}" for kind, base in kinds.items()
            )
        sys.stderr.write(f"error: {sentence.rstrip('.')}. `--help` and `--print_config` show what is accepted.\n")
        self.exit(2)


def _shown(hint: Any) -> str:
    """A type as help shows it: ``int (1 or more) | null``."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return f"{_shown(parts[0])} ({', '.join(map(str, parts[1:]))})"
    if kind in (Union, UnionType):
        return " | ".join(map(_shown, parts))
    if kind is Literal:
        return ", ".join(map(str, parts))
    name = "null" if hint is NoneType else "..." if hint is ... else getattr(kind or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(_shown, parts))}]" if parts else name


def helpful(description: str) -> dict[str, Any]:
    """Settings of the parser of `lightning`, or of a verb: which classes there are, and an example, come first.

    Args:
        description: Lightning's, which begins with what a verb does; the usage of a verb would be two pages of flags.
    """
    verb = description.split(". ")[0].rstrip(".")
    usage = "%(prog)s [--config FILE] [--KEY VALUE ...]" if verb else None
    there = f"Detectors: {names(Detector)}.\nData sets: {names(AnomalyDataModule)}.\n{EXAMPLE}"
    said = f"{verb + '.' if verb else ABOUT}\n\n{there}"
    return {"prog": "lightning", "usage": usage, "description": said}


def names(base: type[Any]) -> str:
    """The classes below this one that can be chosen."""
    return ", ".join(sorted(cls.__name__ for cls in subclasses(base) if not isabstract(cls)))

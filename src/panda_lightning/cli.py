"""The command line: ``lightning fit | validate | test | predict --config conf/X.yaml``."""

import atexit
import errno
import gc
import logging
import os
import re
import sys
import textwrap
import warnings
from functools import cache
from importlib.metadata import version
from inspect import isabstract, signature
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from typing_extensions import override

from panda_lightning.arguments import Seed, require, subclasses
from panda_lightning.callbacks import Predictions
from panda_lightning.datamodules import AnomalyDataModule, UnlabelledImages
from panda_lightning.detectors import Detector
from panda_lightning.runtime.agreement import differences, made_with, newest_alike, same
from panda_lightning.runtime.checkpoints import require_whole
from panda_lightning.types import PandaError

VERSION = f"{version('panda-lightning')} (panda-lightning)"
ABOUT = "PANDA and its family: image anomaly detection with adapted pretrained features."
EXAMPLE = r"""
  lightning fit --data ImageFolder --data.root data/bottles \
      --model PANDA --model.backbone panda_tiny --trainer.max_epochs 9

`lightning fit --model.help PANDA` lists the arguments of a class.
"""
OPTIONS = tuple(signature(Predictions).parameters)  # of predict alone
# What a configuration file of `lightning` may hold, whatever the verb that wrote it.
KEYS = {"seed_everything", "trainer", "model", "data", *OPTIONS}.union(
    *(set(signature(getattr(pl.Trainer, verb)).parameters) - skip for verb, skip in LightningCLI.subcommands().items())
)


class Paragraphs(DefaultHelpFormatter):
    """Help whose descriptions keep their lines."""

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
        if "is not accepted" in sentence:  # this parser is then that of the class itself
            sentence += ". Accepted are " + ", ".join(a.dest for a in self._actions if a.dest not in ("help", "config"))
        if "dot import path" in sentence:
            kinds: dict[str, type[Any]] = {"detectors": Detector, "data sets": AnomalyDataModule}
            if '"trainer.' in sentence:
                kinds = {"loggers": Logger, "callbacks": pl.Callback}
            sentence += ". There are the " + " and the ".join(f"{kind} {_names(base)}" for kind, base in kinds.items())
        sys.stderr.write(f"error: {sentence.rstrip('.')}. `--help` and `--print_config` show what is accepted.\n")
        self.exit(2)


class PandaCLI(LightningCLI):
    """Lightning's command line, except that a checkpoint brings its network and must agree with what is asked for."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Say first which classes there are, with an example; the usage of a verb would be two pages of flags."""
        verb = (kwargs.get("description") or "").split(". ")[0].rstrip(".")
        usage = "%(prog)s [--config FILE] [--KEY VALUE ...]" if verb else None
        there = f"Detectors: {_names(Detector)}.\nData sets: {_names(AnomalyDataModule)}.\n{EXAMPLE}"
        more = {"usage": usage, "description": f"{verb + '.' if verb else ABOUT}\n\n{there}"}
        return super().init_parser(prog="lightning", formatter_class=Paragraphs, **kwargs | more)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let ``predict`` take the options of its table."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_class_arguments(Predictions)
        return parser

    @override
    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        given = [str(word) for word in args] if isinstance(args, list) else sys.argv[1:]
        words = completed(given)
        super().parse_arguments(parser, args if words == given else words)
        asked = parser.parse_args(words, defaults=False)
        self.asked = asked[self.config.subcommand]  # in files and by flags, without defaults
        self._require_that_flags_count(parser, words)
        require("seed_everything", self.asked.get("seed_everything", True), bool | Seed)
        path = self._ckpt_path
        if path == "last":
            free = {"model": Detector.COMPUTING, "data": AnomalyDataModule.COMPUTING} if self._detects else {}
            path = newest_alike(self.config[self.config.subcommand], free, self._checkpoint_folders())
            self.config[self.config.subcommand].ckpt_path = path
            if path is None:
                return
        if path is None or not _is_checkpoint(path):
            return
        _require_checkpoint(path)
        if not self._detects:
            return
        found = differences(self.asked, made_with(path)[1], {"model": Detector.COMPUTING})
        if found:
            raise PandaError(
                f"the checkpoint {path} was made with other settings than those asked for ({'; '.join(found)}): "
                "leave them out, in config files too, or train anew."
            )

    def _require_that_flags_count(self, parser: Any, words: list[str]) -> None:
        """Refuse flags that have no effect, or another one than they seem to."""
        files, flags = _files_and_flags(words[1:])
        if words[1:] != [*files, *flags]:
            meant = parser.parse_args([*words[:1], *files, *flags], defaults=False)[self.config.subcommand]
            lost = [f"--{k} {v}" for k, v in meant.items() if k != "config" and not same(self.asked.get(k), v)]
            if lost:
                raise PandaError(f"{lost[0]} is overridden by a later --config: put flags after configuration files.")
        loggers = self.config[self.config.subcommand].trainer.logger
        flag = next((word.split("=")[0] for word in words if word.startswith("--trainer.logger.")), None)
        if flag and isinstance(loggers, list) and len(loggers) > 1:
            raise PandaError(
                f"{flag} would be set for the last of {len(loggers)} loggers alone: name the one logger to use, "
                "as in --trainer.logger CSVLogger --trainer.logger.save_dir runs, or write them in a file."
            )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            said = " ".join(str(_refusal(error) or error).split())
            raise PandaError(f"the trainer's arguments are not possible here: {said}") from error
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        if self.config.subcommand == "predict" and not any(isinstance(c, Predictions) for c in callbacks):
            callbacks.append(Predictions(**{name: self.config.predict[name] for name in OPTIONS}))
        return trainer

    def _checkpoint_folders(self) -> list[Path]:
        """Where runs of this configuration keep their checkpoints: as ModelCheckpoint says, or in the log's folders."""
        trainer = self.config[self.config.subcommand].trainer
        named, logs = ([part.init_args for part in _listed(parts)] for parts in (trainer.callbacks, trainer.logger))
        folders = [Path(args.dirpath) for args in named if args.get("dirpath")]
        roots = [Path(args.save_dir) / (args.get("name") or "") for args in logs if args.get("save_dir")]
        root = roots[0] if roots else Path(trainer.default_root_dir or ".") / "lightning_logs"
        return folders or list(root.glob("version_*/checkpoints"))

    @override
    def before_instantiate_classes(self) -> None:
        if self.config.subcommand == "predict" and self.config.predict.return_predictions is None:
            self.config.predict.return_predictions = False  # they are written, batch by batch: maps would fill memory
        # Lightning has by now laid the checkpoint's hyper-parameters over the configuration.
        for key in Detector.COMPUTING:
            if (asked := self.asked.get(f"model.init_args.{key}")) is not None:
                self.config.update(asked, f"{self.config.subcommand}.model.init_args.{key}")

    @override
    def after_instantiate_classes(self) -> None:
        path = self._ckpt_path
        if path and Path(path).is_file() and isinstance(self.model, Detector):
            self.model.set_extra_state(made_with(path)[0])  # now, so that the source of its weights is not needed
        if self.config.subcommand == "fit":
            self.config.fit.ckpt_path = None  # for config.yaml: where training went on is not the checkpoint to score

    @property
    def _detects(self) -> bool:
        """Whether the model is one of our detectors, whose checkpoints say what they were made from."""
        name = str(self.config[self.config.subcommand].model.class_path).split(".")[-1]
        return name in {cls.__name__ for cls in subclasses(Detector)}

    @property
    def _ckpt_path(self) -> str | None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        return None if path is None else str(path)


def completed(words: list[str]) -> list[str]:
    """The words of a command line with the class of the model, where the checkpoint alone says it, and of loose images.

    Raises:
        PandaError: If the checkpoint cannot be read.
    """

    def places(flag: str) -> list[int]:
        return [i for i, word in enumerate(words) if re.match(rf"--{flag}(=|$)", word)]

    path = places("ckpt_path")
    if words[:1] == ["predict"] and places(r"data\.images") and not places("data"):
        first = next(i for i, word in enumerate(words) if word.startswith("--data."))
        words = [*words[:first], f"--data={UnlabelledImages.__name__}", *words[first:]]
    if path and not places("model") and not _files_and_flags(words)[0]:
        name = words[path[-1]].partition("=")[2] or "".join(words[path[-1] + 1 : path[-1] + 2])
        if _is_checkpoint(name):
            file = at_home(Path(name))
            _require_checkpoint(file)
            found = made_with(file)[1]["model"].get("_class_path")
            words = [words[0], f"--model={found}", *words[1:]] if found else words
    return words


def _is_checkpoint(path: str | None) -> bool:
    """Whether ckpt_path names a file of this machine."""
    return path not in (None, "", "last", "best", "hpc") and "://" not in str(path)


def _require_checkpoint(path: str | Path) -> None:
    if not Path(path).is_file():
        raise PandaError(f"ckpt_path={path} is not a file: name a checkpoint, usually .../checkpoints/last.ckpt.")
    require_whole(path)


def _files_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that name configuration files, and the others, each in their order."""
    files: list[str] = []
    flags: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        (files if re.match(r"(-c|--config)(=|$)", word) or before in ("-c", "--config") else flags).append(word)
    return files, flags


def _listed(parts: Any) -> list[Any]:
    """Loggers or callbacks of a configuration, where it may hold one, several or none, with their arguments."""
    parts = parts if isinstance(parts, list) else [parts]
    return [part for part in parts if hasattr(part, "init_args")]


def _names(base: type[Any]) -> str:
    return ", ".join(sorted(cls.__name__ for cls in subclasses(base) if not isabstract(cls)))


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


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Words in place of sys.argv, for Python and tests.
    """
    silence()
    pass_over_imports()
    try:
        run(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        end_in_a_sentence(error)


def run(args: ArgsType = None, kind: type[PandaCLI] = PandaCLI) -> PandaCLI:
    """Run the command line, errors and all.

    Returns:
        What has run, with its trainer, model and data module.
    """
    return kind(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=OneSentenceParser,
        auto_configure_optimizers=False,
        trainer_defaults={"num_sanity_val_steps": 0},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"version": VERSION},
        args=args,
    )


def _refusal(error: BaseException | None) -> PandaError | None:
    """The sentence behind an error: jsonargparse wraps it, and on a full disk the report fails after the checkpoint."""
    while error is not None and not isinstance(error, PandaError):
        error = error.__cause__ or error.__context__
    return error


def end_in_a_sentence(error: Exception) -> NoReturn:
    """Leave with what to do about an error of the user or the machine; any other is raised, for its traceback."""
    told = _refusal(error) or _sentence(error)
    if told is None:
        raise error
    sys.exit(f"error: {told}")


def _sentence(error: BaseException) -> str | None:
    """What to do about an error of the machine; None for any other."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room and go on with --ckpt_path last."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
        return f"{error}. Choose another place, or make this one readable and writable."
    if found := re.search(r"class_path '[\w.]*?(\w+Logger)':.*pip install -U '([\w-]+)", str(error), re.DOTALL):
        logger, package = found.groups()
        return (
            f"{logger} needs the package {package}, which is not installed: `pip install {package}`, or choose another "
            "logger, such as CSVLogger."
        )
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or re.search("not enough memory|can't allocate memory|out of memory", said):
        return (
            f"out of memory ({said[:200].rstrip('.')}): lower data.batch_size, data.eval_batch_size, data.memory_gb, "
            "data.image_size or model.index_memory_mb."
        )
    if "ckpt_path" in said or isinstance(error, FileNotFoundError):  # Lightning looks for best, hpc and addresses
        return said
    return None


@cache
def pass_over_imports() -> None:
    """Let no search for garbage go through what imports have made: it takes a second, in a run and at its end."""
    gc.freeze()
    atexit.register(gc.freeze)


def silence() -> None:
    """Leave out what is not meant for our users: an advertisement, and warnings about what we do on purpose."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    for message in (
        ".*in eval mode at the start of training.*",  # BatchNorm keeps its pretrained statistics
        ".*does not have many workers.*",  # decoded images lie in memory
        ".*smaller than the logging interval.*",  # everything is logged by epoch
        ".*args parameter is intended to run from within Python.*",  # words of the terminal, completed
        ".*sync_dist=True.*",  # what we log is the same on every process already
        ".*LeafSpec.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message)

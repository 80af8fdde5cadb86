"""The command line: ``lightning fit | validate | test | predict --config conf/X.yaml``."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from panda_lightning.arguments import Seed, require
from panda_lightning.callbacks import Predictions
from panda_lightning.command import checkpoints
from panda_lightning.command.endings import end_in_a_sentence, pass_over_imports, silence, trainer_arguments
from panda_lightning.command.parser import OPTIONS, VERSION, OneSentenceParser, helpful
from panda_lightning.command.words import completed, find_own_classes, require_that_flags_count
from panda_lightning.detectors import Detector
from panda_lightning.networks import pretraining  # noqa: F401  # its classes are known by their short names
from panda_lightning.runtime.agreement import made_with
from panda_lightning.types import PandaError


class PandaCLI(LightningCLI):
    """Lightning's command line, except that a checkpoint brings its network and must agree with what is asked for."""

    def __init__(self, model: Any, data: Any, *, args: ArgsType = None, **options: Any) -> None:
        given = [str(word) for word in args] if isinstance(args, list) else sys.argv[1:]
        self.words = completed(given)
        super().__init__(model, data, args=args if self.words == given else self.words, **options)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """The verb that is asked for alone: parsers of the others take a quarter of a second."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in self.words[:1] if verb in verbs} or verbs

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Say first which classes there are, with an example."""
        return super().init_parser(**kwargs | helpful(kwargs.get("description") or ""))

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let ``predict`` take the options of its table."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_class_arguments(Predictions)
        return parser

    @override
    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        asked = parser.parse_args(self.words, defaults=False)
        self.asked = asked[self.config.subcommand]  # in files and by flags, without defaults
        config = self.config[self.config.subcommand]
        require_that_flags_count(parser, self.words, config, self.asked)
        require("seed_everything", self.asked.get("seed_everything", True), bool | Seed)
        path = self._ckpt_path
        if path == "last":
            path = config.ckpt_path = checkpoints.last(config)
        if path is not None:
            checkpoints.require_agreement(path, config, self.asked)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        with trainer_arguments():
            trainer = super().instantiate_trainer(**kwargs)
        if getattr(trainer.strategy.launcher, "_start_method", None) in ("spawn", "forkserver"):
            raise PandaError("a command cannot hand its classes to spawned processes: set trainer.strategy=ddp.")
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        if self.config.subcommand == "predict" and not any(isinstance(c, Predictions) for c in callbacks):
            callbacks.append(Predictions(**{name: self.config.predict[name] for name in OPTIONS}))
        return trainer

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
    def _ckpt_path(self) -> str | None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        return None if path is None else str(path)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Words in place of sys.argv, for Python and tests.
    """
    silence()
    pass_over_imports()
    find_own_classes()
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
        trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"version": VERSION},
        args=args,
    )

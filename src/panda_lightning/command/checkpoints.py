"""The checkpoint that a command line names: which one is meant, and whether it agrees with what is asked for."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from panda_lightning.arguments import subclasses
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import Detector
from panda_lightning.runtime.agreement import differences, made_with, newest_alike
from panda_lightning.runtime.checkpoints import require_whole
from panda_lightning.types import PandaError


def last(config: Namespace) -> str | None:
    """The newest checkpoint of runs of this very configuration, if there is one."""
    free = {"model": Detector.COMPUTING, "data": AnomalyDataModule.COMPUTING} if _detects(config) else {}
    return newest_alike(config, free, _folders(config))


def require_agreement(path: str, config: Namespace, asked: Namespace) -> None:
    """Refuse a checkpoint that is broken, or was made with other settings than those asked for.

    Args:
        path: What ckpt_path says; what is no file of this machine is Lightning's to find.
        config: A configuration.
        asked: What of it stands in files and flags.

    Raises:
        PandaError: Saying what is wrong with it, or which settings differ.
    """
    if not is_checkpoint(path):
        return
    require_checkpoint(path)
    found = differences(asked, made_with(path)[1], {"model": Detector.COMPUTING}) if _detects(config) else []
    if found:
        raise PandaError(
            f"the checkpoint {path} was made with settings other than these ({'; '.join(found)}): leave them "
            "out, also in config files, or train again."
        )


def is_checkpoint(path: str | None) -> bool:
    """Whether ckpt_path names a file of this machine."""
    return path not in (None, "", "last", "best", "hpc") and "://" not in str(path)


def require_checkpoint(path: str | Path) -> None:
    """Refuse a file that is no whole checkpoint.

    Raises:
        PandaError: Saying what to name.
    """
    if not Path(path).is_file():
        raise PandaError(f"ckpt_path={path} is not a file: name a checkpoint, usually .../checkpoints/last.ckpt.")
    require_whole(path)


def _detects(config: Namespace) -> bool:
    """Whether the model is one of our detectors, whose checkpoints say what they were made from."""
    name = str(config.model.class_path).split(".")[-1]
    return name in {cls.__name__ for cls in subclasses(Detector)}


def _folders(config: Namespace) -> list[Path]:
    """Where runs of a configuration keep their checkpoints: as ModelCheckpoint says, or in the log's folders."""
    trainer = config.trainer
    named, logs = ([part.init_args for part in _listed(parts)] for parts in (trainer.callbacks, trainer.logger))
    folders = [Path(args.dirpath) for args in named if args.get("dirpath")]
    home = Path(trainer.default_root_dir or ".")
    if trainer.logger is False:
        return folders or [home / "checkpoints"]
    names = (args.get("project") or args.get("name") or "" for args in logs)  # W&B's own come by project
    roots = [Path(args.save_dir) / name for args, name in zip(logs, names, strict=True) if args.get("save_dir")]
    root = roots[0] if roots else home / "lightning_logs"
    return folders or [root / "checkpoints", *root.glob("*/checkpoints")]  # a folder for each version, if any


def _listed(parts: Any) -> list[Any]:
    """Loggers or callbacks of a configuration, where it may hold one, several or none, with their arguments."""
    parts = parts if isinstance(parts, list) else [parts]
    return [part for part in parts if hasattr(part, "init_args")]

"""A W&B logger that never asks: without credentials it works offline."""

import functools
import netrc
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from panda_lightning.runtime.whole import require_folder


class AutoWandbLogger(WandbLogger):
    """Lightning's WandbLogger; it works offline if no credentials are found and no mode was set.

    Without the wandb package it logs nothing and says so. If W&B's server cannot be reached, the run is kept offline;
    upload it later with ``wandb sync``. If W&B's process on this machine dies, the run continues without it.

    Args:
        save_dir: Folder in which the folder ``wandb`` is created.
        project: W&B's project.
        kwargs: See WandbLogger and wandb.init.
    """

    @functools.wraps(object.__new__)  # type: ignore[misc]  # so that the command line sees the arguments of __init__
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Stand aside where the package is absent."""
        if find_spec("wandb") is None:
            rank_zero_info("wandb is not installed: this run is logged to CSV only.")
            return DummyLogger()
        return super().__new__(cls)

    def __init__(self, save_dir: str = "runs", project: str = "panda-lightning", **kwargs: Any) -> None:
        # the command line gives every argument of wandb.init, those that were not set as None
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        asked = os.environ.get("WANDB_MODE", None if _has_credentials() else "offline")
        if kwargs.pop("offline", False) or asked == "offline":  # said to each run: W&B reads the environment once
            kwargs.setdefault("mode", "offline")
        # absolute, because W&B's service may have been started in another folder
        super().__init__(save_dir=Path(save_dir).absolute(), project=project, **kwargs)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it even when it is not set

    def describe(self, group: str, job_type: str, config: dict[str, Any]) -> None:
        """Say what runs are compared by; what the user has set stays."""
        for key, value in {"group": group, "job_type": job_type, "config": config}.items():
            self._wandb_init.setdefault(key, value)

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        if self._experiment is None:
            import wandb

            Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
            quiet = {"settings": wandb.Settings(silent=True)}  # one line of ours says what six of W&B's would
            try:
                if self._wandb_init.get("mode") == "offline":
                    self._wandb_init = quiet | self._wandb_init
                run = super().experiment
            except wandb.errors.Error as error:
                rank_zero_warn(f"W&B cannot be reached ({error}): this run is kept offline.")
                self._wandb_init = quiet | self._wandb_init | {"mode": "offline"}
                run = super().experiment
            if self._wandb_init.get("mode") == "offline":
                folder = from_here(run.settings.sync_dir)
                rank_zero_info(f"W&B is offline. To upload this run later: wandb sync {folder}")
            run.log = self._while_it_lives(run.log)
            for metrics in ("val/*", "train/*", "test/*", "bank/*", "features/*", "scores/*"):
                run.define_metric(metrics, step_metric="epochs_trained")
        return self._experiment

    def _while_it_lives(self, log: Callable[..., None]) -> Callable[..., None]:
        """A run's ``log`` that gives up, with a warning, where W&B's process has gone."""
        lost = False

        def guarded(*args: Any, **kwargs: Any) -> None:
            nonlocal lost
            if not lost:
                try:
                    log(*args, **kwargs)
                except ConnectionError as error:
                    lost = True
                    kept = f"what was logged so far is in {self._wandb_init['dir']}/wandb"
                    rank_zero_warn(f"W&B's process has died ({error}): this run continues without it, and {kept}.")

        return guarded


def from_here(path: str | Path) -> Path:
    """The path from the current folder on, if it lies there: shorter to read and to copy."""
    return Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else Path(path)


def introduce(trainer: Any, method: str) -> None:
    """Give the loggers of a run their folders, and W&B what runs are compared by.

    Args:
        trainer: With the run's data module.
        method: What the detector is called.
    """
    data = trainer.datamodule
    for logger in trainer.loggers:
        if trainer.is_global_zero:
            claim_folder(logger)
        if isinstance(logger, AutoWandbLogger):
            run = {key: getattr(trainer, key) for key in ("max_epochs", "max_steps", "world_size", "precision")}
            if size := getattr(data, "batch_size", None):
                run |= {"batch_size": size, "batch_size_per_process": size // trainer.world_size}
            logger.describe(type(data).__name__, method, run)


def claim_folder(logger: Any) -> None:
    """Give a logger of version folders a new one: of runs that start together Lightning gives several the same."""
    if not isinstance(logger, CSVLogger | TensorBoardLogger) or "://" in str(logger.save_dir):
        return
    while logger._version is None:
        folder = Path(logger.log_dir)  # finds the next number
        require_folder("save_dir", folder.parent)
        try:
            folder.mkdir()
        except FileExistsError:
            logger._version = None


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False

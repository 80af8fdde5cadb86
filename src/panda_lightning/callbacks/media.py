"""Pictures for W&B: histogram of scores, ROC curve, most and least anomalous images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

SHOWN = 3  # nearest normal images of an image


class Media(pl.Callback):
    """Logs to W&B what cannot be a number; does nothing without a W&B logger.

    The histogram comes with each validation; curve and images, with the nearest normal ones, once, when the run ends.
    """

    IMAGES = 8  # of each kind

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._histogram(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._curve_and_images(trainer, pl_module, trainer.val_dataloaders)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._curve_and_images(trainer, pl_module, trainer.val_dataloaders)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._histogram(trainer, pl_module)
        self._curve_and_images(trainer, pl_module, trainer.test_dataloaders)

    @rank_zero_only
    def _histogram(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for run in _runs(trainer):
            import wandb

            scores, labels = pl_module.scores.score.numpy(), pl_module.scores.label.numpy()
            parts = {"normal": scores[labels == 0], "anomalous": scores[labels == 1]}
            histograms = {f"scores/{name}": wandb.Histogram(part) for name, part in parts.items() if len(part)}
            run.log({**histograms, "epochs_trained": pl_module.epochs_trained})

    @rank_zero_only
    def _curve_and_images(self, trainer: pl.Trainer, pl_module: Any, loader: Any) -> None:
        for run in _runs(trainer):
            import wandb
            from sklearn.metrics import roc_curve

            found = pl_module.scores
            if found is None or not found.score.numel():  # a folder without test images
                return
            scores, labels = found.score.numpy(), found.label.numpy()
            media: dict[str, Any] = {"epochs_trained": pl_module.epochs_trained}
            if 0 < labels.sum() < len(labels):
                points = np.stack(roc_curve(labels, scores)[:2], axis=1)
                points = points[np.linspace(0, len(points) - 1, min(len(points), 200)).round().astype(int)]
                table = wandb.Table(columns=["false positive rate", "true positive rate"], data=points.tolist())
                media["roc"] = wandb.plot.line(table, "false positive rate", "true positive rate", title="ROC")
            order = scores.argsort(kind="stable")
            for name, chosen in (
                ("least_anomalous", order[: self.IMAGES]),
                ("most_anomalous", order[::-1][: self.IMAGES]),
            ):
                rows = found.index[chosen.copy()]
                pixels = alike([loader.dataset.pictures(row)[0].permute(1, 2, 0).numpy() for row in rows.split(1)])
                near = _nearest(trainer, pl_module, loader, rows)
                captions = [
                    f"{'anomalous' if labels[i] else 'normal'}, score {scores[i]:.4g}{nearest}"
                    for i, nearest in zip(chosen, near, strict=True)
                ]
                media[f"images/{name}"] = [wandb.Image(p, caption=c) for p, c in zip(pixels, captions, strict=True)]
            run.log(media)


def alike(pictures: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Pictures (H, W, ...) as large as the largest, with zeros to the right and below: W&B takes one size in a list."""
    height, width = (max((picture.shape[i] for picture in pictures), default=0) for i in range(2))
    rest = [((0, height - p.shape[0]), (0, width - p.shape[1]), *[(0, 0)] * (p.ndim - 2)) for p in pictures]
    return [np.pad(picture, sides) for picture, sides in zip(pictures, rest, strict=True)]


def _runs(trainer: pl.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _nearest(trainer: pl.Trainer, detector: Any, loader: Any, rows: torch.Tensor) -> list[str]:
    """The normal images nearest to some images, in words; nothing where they cannot be told by one process."""
    said = dict.fromkeys(rows.tolist(), "")
    for some, batch in () if getattr(detector, "shard_bank", False) else loader.dataset.batches(rows):
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            found = detector.predict_step(trainer.strategy.batch_to_device(batch), 0)
        if "neighbour" not in found:
            break
        names = [Path(name).name for name in detector.bank_names] or [str(i) for i in range(len(detector.bank))]
        triples = zip(some.tolist(), found["neighbour"].tolist(), found["distance"].tolist(), strict=True)
        for row, near, distances in triples:
            nearest = list(zip(near, distances, strict=True))[:SHOWN]
            said[row] = "; nearest: " + ", ".join(f"{names[i]} ({d:.3g})" for i, d in nearest)
    return list(said.values())

"""Pictures for W&B: histogram of scores, ROC curve, most and least anomalous images."""

from pathlib import Path
from typing import Any

import numpy as np
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

            if pl_module.scores is None:
                return
            found = pl_module.scores
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
                pixels = loader.dataset.pictures(found.index[chosen.copy()]).permute(0, 2, 3, 1).numpy()
                near = _nearest(trainer, pl_module, loader, found.index[chosen.copy()].tolist())
                captions = [
                    f"{'anomalous' if labels[i] else 'normal'}, score {scores[i]:.4g}{nearest}"
                    for i, nearest in zip(chosen, near, strict=True)
                ]
                media[f"images/{name}"] = [wandb.Image(p, caption=c) for p, c in zip(pixels, captions, strict=True)]
            run.log(media)


def _runs(trainer: pl.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _nearest(trainer: pl.Trainer, detector: Any, loader: Any, rows: list[int]) -> list[str]:
    """The normal images nearest to some images, in words; nothing where they cannot be told by one process."""
    if getattr(detector, "shard_bank", False) or not rows:
        return [""] * len(rows)
    batch = trainer.strategy.batch_to_device(loader.dataset.__getitems__(rows))
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        found = detector.predict_step(batch, 0)
    if "neighbour" not in found:
        return [""] * len(rows)
    names = [Path(name).name for name in detector.bank_names] or [str(i) for i in range(len(detector.bank))]
    pairs = zip(found["neighbour"].tolist(), found["distance"].tolist(), strict=True)
    return [
        "; nearest: " + ", ".join(f"{names[i]} ({d:.3g})" for i, d in list(zip(near, distances, strict=True))[:SHOWN])
        for near, distances in pairs
    ]

"""How the features of the normal images fare while they are adapted, told without labels."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from typing_extensions import override

from panda_lightning.formulas import feature_health
from panda_lightning.runtime.systems import widenable

ROWS = 1000  # images that are looked at, evenly spaced
COLLAPSED = 0.1  # of the effective rank before training; the least in 24 long runs was .66
NEIGHBOURS = 10


class FeatureHealth(pl.Callback):
    """Logs ``features/*`` at each validation of ``fit`` of a detector whose bank is features that training changes.

    - effective_rank: how many directions the features of the normal images spread in; a collapse makes it small.
    - variance: their mean squared distance to their mean.
    - nearest, nearest_spread: mean of the score of an image among the others, and its standard deviation by its mean.
    - neighbours_kept: the share of each image's 10 nearest that were among its 10 nearest before training.
    - ewc_share: EWC's share of the loss, mean over the epoch.

    A warning says where the effective rank has fallen to a tenth: the features have collapsed to a few directions. No
    number tells which epoch is best: the rule that was best on four data sets was worse than none on four others
    (experiments/RESULTS.md).
    """

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or not watches(pl_module):
            return
        step = -(-len(pl_module.bank) // ROWS)
        distances, rows = pl_module.others(min(NEIGHBOURS, len(pl_module.bank) - 1), step)
        scores = widenable(distances[:, : pl_module.k].sum(dim=1)).double()
        features = pl_module.bank[::step].float()
        rank = feature_health.effective_rank(features)
        if not pl_module.steps_trained:
            pl_module.first_neighbours, pl_module.first_rank = rows.cpu(), rank
        elif pl_module.first_rank is not None and rank < COLLAPSED * pl_module.first_rank:
            rank_zero_warn(
                "The features of the normal images have collapsed: their effective rank fell from "
                f"{pl_module.first_rank:.3g} before training to {rank:.3g}. Train fewer epochs, or raise "
                "model.ewc_weight."
            )
        values = {
            "effective_rank": rank,
            "variance": feature_health.variance(features),
            "nearest": float(scores.mean()),
            "nearest_spread": float(scores.std() / scores.mean().clamp(min=1e-30)),
        }
        before = pl_module.first_neighbours
        if before is not None and before.shape == rows.shape:
            values["neighbours_kept"] = feature_health.kept(before, rows.cpu())
        # the same on every process
        pl_module.log_dict({f"features/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()})

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = trainer.callback_metrics
        if watches(pl_module) and "train/ewc" in found:
            pl_module.log("features/ewc_share", found["train/ewc"] / found["train/loss"].clamp(min=1e-30))


def watches(detector: Any) -> bool:
    """Whether a detector's bank is all of the features that its training changes."""
    bank = detector.bank
    whole = isinstance(bank, torch.Tensor) and not detector.shard_bank and not detector.reduced
    return bool(whole and len(bank) > detector.k + 1)

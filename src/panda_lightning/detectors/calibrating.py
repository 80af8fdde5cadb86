"""Scores that p-values rest on: of normal images held back, or of the bank's own, each without itself."""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from panda_lightning.runtime.results import Calibration
from panda_lightning.types import PandaError


def hold_out(detector: Any) -> None:
    """Score the images that were held back, with the weights and the bank of this moment; none where none were."""
    if not getattr(detector.data, "calibration_fraction", 0) or detector.trainer.sanity_checking:
        return
    if detector._keeps and detector.trainer.state.fn != "fit":
        return  # these are not the images that were held back from it
    if detector.held_out is not None and detector.held_out[1] == detector.scored_by:
        return
    scores = detector.scores_of(detector.data.calibration_dataloader(), "Calibration")
    detector.held_out = (scores.cpu(), detector.scored_by)


def calibration(detector: Any) -> Calibration | None:
    """What p-values rest on, see Detector.calibration."""
    if detector.held_out is not None:
        scores, made_from = detector.held_out
        if made_from == detector.scored_by:
            return Calibration(scores.double().numpy(), "held out")
        rank_zero_warn(
            f"There are no p-values: {', '.join((*detector.SCORING, 'precision'))} or weights have changed since "
            "the calibration images were scored."
        )
        return None
    others = None if detector.learns else detector.leave_one_out()
    return None if others is None else Calibration(others.cpu().double().numpy(), "leave one out")


def are_among(rows: Tensor, others: Tensor) -> Tensor:
    """Which rows (N, D) are rows of others (M, D) too, but for rounding: (N,)."""
    wide = rows.cpu().double()
    nearest = torch.cdist(wide, others.double()).amin(dim=1)
    found: Tensor = nearest <= 1e-5 * torch.linalg.vector_norm(wide, dim=1)
    return found


def others(detector: Any, count: int, step: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest others of every ``step``-th of the bank's images that are here, see DN2.others."""
    index = detector.index
    features = detector.scoring_space(detector.bank.to(detector.device)[::step])
    if count >= len(index):
        raise PandaError(f"k={count} neighbours besides the image itself need a bank of {count + 1} images or more.")
    distances, rows = index.search(features, count + 1)
    itself = rows == index.rows(len(detector.bank))[::step].to(rows).unsqueeze(1)
    distances, order = distances.masked_fill(itself, torch.inf).sort(dim=1)  # copies may hide the image itself
    index.serve()
    return distances[:, :count], rows.gather(1, order)[:, :count]

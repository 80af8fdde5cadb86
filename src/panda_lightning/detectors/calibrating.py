"""p-values, and a bank that images join and leave: what detectors can do beside a plain fit."""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract
from panda_lightning.runtime.results import Calibration
from panda_lightning.runtime.systems import widenable
from panda_lightning.types import PandaError


class Calibrated:
    """The part of a detector that p-values rest on, and that follows changes of its bank (see banks.py).

    Attributes:
        bank_changes: Names added to the bank later, and names removed from it.
        held_out: Scores of the held-back normal images (``calibration_fraction``), and the state they were computed
            with.
    """

    bank: Any
    bank_changes = Derived[tuple[list[str], list[str]]](([], []))
    held_out = Derived[tuple[Tensor, list[Any]] | None](None)

    @property
    def scored_by(self: Any) -> list[Any]:
        """What scores depend on besides the image."""
        return [self._weights(), {name: getattr(self, name) for name in self.SCORING}, self.precision]

    def hold_out(self: Any) -> None:
        """Score the images that were held back, with the weights and the bank of this moment; none if none were."""
        if not getattr(self.data, "calibration_fraction", 0) or self.trainer.sanity_checking:
            return
        if self._keeps and self.trainer.state.fn != "fit":
            return  # these are not the images that were held back from it
        if self.held_out is None or self.held_out[1] != self.scored_by:
            scores = self.scores_of(self.data.calibration_dataloader(), "Calibration")
            self.held_out = (scores.cpu(), self.scored_by)

    def scores_of(self: Any, loader: Any, title: str) -> Tensor:
        """Scores (N,) of all images of a loader, float64; every process must call it."""
        return extract(self.trainer, self.anomaly_score, loader, title, dtype=torch.float64, finish=self.all_scored)

    @property
    def calibration(self: Any) -> Calibration | None:
        """What p-values rest on: scores of images held back, or for a method that trains nothing, leave-one-out's.

        Of a network that was adapted to them, the scores of the bank's images are too low (experiments/RESULTS.md).
        """
        if self.held_out is not None:
            scores, made_from = self.held_out
            if made_from == self.scored_by:
                return Calibration(scores.double().numpy(), "held out")
            rank_zero_warn(
                f"There are no p-values: {', '.join((*self.SCORING, 'precision'))} or weights have changed since the "
                "calibration images were scored."
            )
            return None
        own = None if self.learns else self.leave_one_out()
        return None if own is None else Calibration(own.cpu().double().numpy(), "leave one out")

    def leave_one_out(self) -> Tensor | None:
        """Scores of the bank's own images (N,), each without itself; None where they cannot be told."""
        return None

    # ---- a bank that changes -----------------------------------------------------------------------------------------

    def join_bank(self: Any, rows: Tensor) -> None:
        """Add to the bank what ``embed`` makes of normal images (N, ...)."""
        self.bank = torch.cat([self.bank, rows.to(self.bank)])

    def leave_bank(self: Any, kept: Tensor) -> None:
        """Leave those of the bank's images (N,) that are False out of it.

        Raises:
            PandaError: If what is left does not do.
        """
        if not kept.any():
            raise PandaError(f"none of the {len(kept)} normal images would be left: keep one or more.")
        self.bank = self.bank[kept]

    def held_back(self, rows: Tensor) -> Tensor:
        """Which rows (N, ...) of ``embed`` are of images that p-values rest on, as far as that is known: (N,)."""
        return torch.zeros(len(rows), dtype=torch.bool)

    def recalibrate(self) -> None:
        """Score the images that were held back anew, after the bank has changed; or forget their scores."""
        self.held_out = None


class CalibratedByNeighbours(Calibrated):
    """The same where scores are distances to the nearest of a bank of features: those of held-back images are kept.

    Attributes:
        held_features: Features of the held-back images, so that their scores can be updated when the bank changes.
    """

    held_features = Derived[Tensor | None](None)
    reduction: Any

    @override
    def scores_of(self: Any, loader: Any, title: str) -> Tensor:
        self.held_features = features = extract(self.trainer, self.embed, loader, title).cpu()
        scores: Tensor = self._held_scores(features)
        return scores

    def _held_scores(self: Any, features: Tensor) -> Tensor:
        distances: Tensor = self.distances_of(features.to(self.device))
        self.all_scored()
        return widenable(distances).double()

    @override
    def leave_one_out(self: Any) -> Tensor | None:
        small = self.bank is None or self.k >= len(self.index)
        if small or self.reduced or self.shard_bank:
            return None
        scores: Tensor = self.without_itself(step=-(-len(self.index) // 2000))  # as many are enough
        return scores

    @override
    def join_bank(self: Any, rows: Tensor) -> None:
        super().join_bank(rows)
        self.reduction = None

    @override
    def leave_bank(self: Any, kept: Tensor) -> None:
        if (left := int(kept.sum())) < self.k:
            raise PandaError(f"{left} of {len(kept)} normal images would be left, fewer than k={self.k}: keep more.")
        super().leave_bank(kept)
        self.reduction = None

    @override
    def held_back(self, rows: Tensor) -> Tensor:
        if self.held_features is None:
            return super().held_back(rows)
        wide = rows.cpu().double()
        nearest = torch.cdist(wide, self.held_features.double()).amin(dim=1)
        found: Tensor = nearest <= 1e-5 * torch.linalg.vector_norm(wide, dim=1)  # the same, but for rounding
        return found

    @override
    def recalibrate(self: Any) -> None:
        features, known = self.held_features, self.held_out is not None and self.held_out[1] == self.scored_by
        super().recalibrate()
        if known and features is not None:
            self.held_out = (self._held_scores(features).cpu(), self.scored_by)

    # ---- the bank's own images ---------------------------------------------------------------------------------------

    def normal_score(self: Any) -> float:
        """Mean score of the normal training images, none counted as its own neighbour."""
        if self.reduced:  # a centroid is no image
            features = self.scoring_space(self.bank.to(self.device))
            return float(self.index.search(features, self.k)[0].sum(dim=1).mean())
        return float(self.index.mean(self.without_itself()))

    def without_itself(self: Any, step: int = 1) -> Tensor:
        """Scores (N,) of every ``step``-th of the bank's images that are here, none counted as its own neighbour."""
        scores: Tensor = self.others(self.k, step)[0].sum(dim=1)
        return scores

    def others(self: Any, count: int, step: int = 1) -> tuple[Tensor, Tensor]:
        """The nearest others of every ``step``-th of the bank's images that are here: distances and rows (N, count).

        Raises:
            PandaError: If there are not as many.
        """
        features = self.scoring_space(self.bank.to(self.device)[::step])
        if count >= len(self.index):
            raise PandaError(
                f"k={count} neighbours besides the image itself need a bank of {count + 1} images or more."
            )
        distances, rows = self.index.search(features, count + 1)
        itself = rows == self.index.rows(len(self.bank))[::step].to(rows).unsqueeze(1)
        distances, order = distances.masked_fill(itself, torch.inf).sort(dim=1)  # copies may hide the image itself
        self.index.serve()
        return distances[:, :count], rows.gather(1, order)[:, :count]

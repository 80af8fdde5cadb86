"""PANDA-OE: pretrained features adapted to tell normal images from outliers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Fraction, Positive
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.detectors.steps import linear, seeded
from panda_lightning.networks.adapting import Adapt
from panda_lightning.networks.backbones import Pool
from panda_lightning.networks.folding import Optimize
from panda_lightning.types import Batch


class PANDAOE(PretrainedDetector):
    r"""PANDA with outlier exposure (Reiss et al., CVPR 2021, section 3.4).

    .. math:: L = \frac{1}{2B} \sum_{x, y} BCE(y, \sigma(w \cdot f(x) + b)), \quad s(x) = w \cdot f(x) + b

    y is 0 for normal images and 1 for outliers (``data.outliers``); each step has a batch of both. w and b are a new
    head. The score is the logit; the paper's score is its sigmoid, which gives the same ranking until it saturates.
    There is no bank.

    Args:
        backbone: See DN2.
        weights: See DN2.
        adapt_stages: See PANDA.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        grad_clip: Global gradient norm to clip to at every step; None for no clipping.
        prefix_cache_gb: See PANDA; outliers are cached last.
        prefix_cache_half: See PANDA.
        prefix_cache_dir: See PANDA.
        optimize: See DN2.
        pool: See DN2.
        adapt: See PANDA.
        lora_rank: See PANDA.
    """

    OUTLIERS = True
    head: nn.Linear

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        adapt_stages: Count = 2,
        lr: Amount = 1e-1,
        momentum: Fraction = 0.9,
        weight_decay: Amount = 0.0,
        grad_clip: Positive | None = 1e-3,
        prefix_cache_gb: Amount = 4.0,
        prefix_cache_half: bool = False,
        prefix_cache_dir: str | None = None,
        optimize: Optimize = "folded",
        pool: Pool | None = None,
        adapt: Adapt = "stages",
        lora_rank: Count = 8,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.save_hyperparameters()
        self.pool = pool
        self.learn_by(
            adapt_stages, adapt, lora_rank, lr, momentum, weight_decay, grad_clip, prefix_cache_gb, prefix_cache_half,
            prefix_cache_dir,
        )  # fmt: skip

    @property
    @override
    def method(self) -> str:
        return "PANDA-OE"

    @override
    def configure_model(self) -> None:
        if hasattr(self, "backbone") and not hasattr(self, "head"):
            self.head = self._fresh_head()

    def _fresh_head(self) -> nn.Linear:
        with seeded():
            return nn.Linear(self.backbone.num_features, 1)

    @override
    def fresh_networks(self) -> dict[str, Any]:
        return {**super().fresh_networks(), **({"head": self._fresh_head()} if hasattr(self, "backbone") else {})}

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        return linear(self.head, self.embed(batch))[:, 0]

    @override
    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        parts = [(self.anomaly_score(part), part["label"], part["index"]) for part in batch.values()]
        logit, label, index = (torch.cat(column) for column in zip(*parts, strict=True))
        errors = F.binary_cross_entropy_with_logits(logit, label.to(logit), reduction="none")
        loss, count = self.batch_mean(errors, index)
        return self.logged_sum({"outlier_exposure": loss}, count)

    @override
    def trained(self) -> list[nn.Parameter]:
        return [*super().trained(), *self.head.parameters()]

    @override
    def cached_dataloaders(self) -> list[DataLoader[Batch]]:
        outliers = self.data.outlier_dataloader()  # first: where there are none, it is said before images are decoded
        return [*super().cached_dataloaders(), outliers]

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.configure_model()

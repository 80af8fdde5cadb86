"""MSC: mean-shifted contrastive adaptation, the stronger successor of PANDA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Fraction, Positive
from panda_lightning.detectors.panda import PANDA
from panda_lightning.detectors.steps import draws, of_all
from panda_lightning.formulas import losses
from panda_lightning.networks import augment
from panda_lightning.networks.adapting import Adapt
from panda_lightning.networks.backbones import Pool
from panda_lightning.networks.folding import Optimize
from panda_lightning.search.knn import Backend
from panda_lightning.types import Batch


class MSC(PANDA):
    r"""PANDA with a contrastive loss around the centre (Reiss, Hoshen 2021, arXiv 2106.03844).

    .. math:: L = L_{msc}(f(x'), f(x''), c) \; [+ \; \lVert f - c \rVert^2]

    f are L2-normalised features, x' and x'' are two random views of each image, and c is the mean of the pretrained
    normalised features of the normal training images. The second term (the angular term) is optional; with it, c is
    normalised too. Scores are those of DN2 on normalised features. The paper's batch size of 64 is an argument of the
    data module. Views are drawn again in each epoch, so training images pass through the frozen layers every time; test
    images pass through them once.

    Args:
        backbone: See DN2.
        weights: See DN2.
        adapt_stages: See PANDA.
        k: See DN2.
        centroids: See DN2.
        temperature: Of the contrastive loss.
        angular: Add the angular term, the mean over both views.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        grad_clip: Global gradient norm to clip to at every step; None for no clipping.
        prefix_cache_gb: See PANDA.
        prefix_cache_half: See PANDA.
        prefix_cache_dir: See PANDA.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
        shard_bank: See DN2.
        pool: See DN2.
        adapt: See PANDA.
        lora_rank: See PANDA.
    """

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        adapt_stages: Count = 2,
        k: Count = 2,
        centroids: Count | None = None,
        temperature: Positive = 0.25,
        angular: bool = False,
        lr: Amount = 1e-5,
        momentum: Fraction = 0.0,
        weight_decay: Amount = 5e-5,
        grad_clip: Positive | None = None,
        prefix_cache_gb: Amount = 4.0,
        prefix_cache_half: bool = False,
        prefix_cache_dir: str | None = None,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
        shard_bank: bool = False,
        pool: Pool | None = None,
        adapt: Adapt = "stages",
        lora_rank: Count = 8,
    ) -> None:
        super().__init__(
            backbone, weights, adapt_stages, k, True, centroids, True, 0.0, "auto", lr, momentum, weight_decay,
            grad_clip, prefix_cache_gb, prefix_cache_half, prefix_cache_dir, optimize, index_backend, index_memory_mb,
            shard_bank, pool, adapt, lora_rank,
        )  # fmt: skip
        self.temperature = temperature
        self.angular = angular

    @property
    @override
    def method(self) -> str:
        return "MSC-angular" if self.angular else "MSC"

    @override
    def loss_terms(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        assert self.centre is not None
        centre = F.normalize(self.centre, dim=0) if self.angular else self.centre
        numbers = draws(self, batch, 2 * augment.VIEW_DRAWS).view(len(batch["image"]), 2, -1).unbind(dim=1)
        views = torch.cat([augment.random_view(batch["image"], part) for part in numbers])
        features = self.loss_space(self.backbone(views).float()).view(2, len(views) // 2, -1).transpose(0, 1)
        features = of_all(self, features, batch["index"])  # every image is set against all of the step
        first, second = features.unbind(dim=1)
        terms = {"mean_shifted": losses.mean_shifted(first, second, centre, self.temperature)}
        if self.angular:
            terms["angular"] = (features - centre).square().sum(dim=2).mean()
        return terms, len(features)

    @override
    def cached_dataloaders(self) -> list[DataLoader[Batch]]:
        return [self.data.val_dataloader()]

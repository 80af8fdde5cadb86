"""PANDA: pretrained features adapted to the normal images, without collapse."""

from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Fraction, OpenShare, Positive
from panda_lightning.callbacks import FeatureHealth
from panda_lightning.detectors.dn2 import DN2
from panda_lightning.formulas import fisher, losses
from panda_lightning.networks.adapting import Adapt
from panda_lightning.networks.backbones import Pool
from panda_lightning.networks.folding import Optimize
from panda_lightning.runtime.derived import Derived, mapped
from panda_lightning.runtime.features import on_device
from panda_lightning.search.knn import Backend
from panda_lightning.types import Batch


class PANDA(DN2):
    r"""DN2 on features adapted to the normal images (Reiss, Cohen, Bergman, Hoshen, CVPR 2021, arXiv 2010.05903).

    .. math:: L = \frac1B \sum_x \frac{\lVert f(x) - c \rVert^2}{D}
              + \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^0_i)^2

    c is the mean of the pretrained features of the normal training images and stays constant; F is the diagonal of the
    pretraining task's Fisher information. The published variants are settings: Early is ``ewc_weight=0`` with few
    epochs, EWC is the default. The bank is extracted again after every epoch. The default arguments are the published
    recipe; its batch size of 32 is an argument of the data module.

    Args:
        backbone: See DN2.
        weights: See DN2.
        adapt_stages: The last stages to adapt; 2 is layer3 and layer4 of a ResNet.
        k: See DN2.
        normalize: See DN2: L2-normalise features for scoring.
        centroids: See DN2.
        normalize_loss: L2-normalise features for the centre and the compactness loss too.
        ewc_weight: Lambda; 0 turns EWC off. Its scale depends on how ``fisher`` was estimated.
        fisher: FILE (safetensors or .pth with plain parameter names; `panda fisher` makes one), ``auto`` (the file
            stored with the network's weights; if there is none, an estimate on the normal training images with labels
            drawn from the pretrained classifier, cached on disk), or ``ones`` (L2 towards the pretrained weights).
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        grad_clip: Global gradient norm to clip to at every step, None for no clipping. The default is so small that
            steps depend little on the scale of the loss.
        prefix_cache_gb: Memory to cache the output of the frozen layers, so that every image passes through them only
            once, in GiB on each process; 0 turns the cache off. If the training or test images do not fit, they pass
            through all layers each time.
        prefix_cache_half: Keep the cache in float16.
        prefix_cache_dir: Keep the cache in files in this folder instead, limited only by the disk; later runs on the
            same images with the same frozen layers reuse it, and processes on one machine share it.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
        shard_bank: See DN2.
        pool: See DN2.
        adapt: Which parameters of the last stages are trained: stages (all, as published), norm (scales and shifts of
            normalisation layers), or lora (a low-rank change added to the weights of each linear layer or 1 x 1
            convolution; EWC then penalises this change).
        lora_rank: Rank of the change for ``adapt=lora``.
        schedule: When training ends: published (after the epochs of the trainer), or a share such as 0.33: after the
            first validation at which the compactness of the normal images is at most this share of what it was before
            training, and after the epochs of the trainer at the latest.

    Attributes:
        centre: (D,), c.
        start: The adapted weights before training, by plain timm name.
        fisher: F, by plain timm name; None without EWC.
        compactness_before: Mean compactness of the normal training images before training.
        first_neighbours: For some of these images, their nearest neighbours before training, see FeatureHealth.
        first_rank: The effective rank of their features before training, see FeatureHealth.
        is_compact: Whether compactness has fallen to the share in ``schedule``.
    """

    centre = Derived[Tensor | None](None)
    start = Derived[dict[str, Tensor] | None](None)
    fisher = Derived[dict[str, Tensor] | None](None)
    compactness_before = Derived[float | None](None)
    first_neighbours = Derived[Tensor | None](None)
    first_rank = Derived[float | None](None)
    is_compact = Derived[bool](False)

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        adapt_stages: Count = 2,
        k: Count = 2,
        normalize: bool = False,
        centroids: Count | None = None,
        normalize_loss: bool = False,
        ewc_weight: Amount = 1e4,
        fisher: str = "auto",
        lr: Amount = 1e-2,
        momentum: Fraction = 0.9,
        weight_decay: Amount = 5e-5,
        grad_clip: Positive | None = 1e-3,
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
        schedule: OpenShare | Literal["published"] = "published",
    ) -> None:
        super().__init__(
            backbone, weights, k, normalize, centroids, optimize, index_backend, index_memory_mb, shard_bank, pool
        )
        self.learn_by(
            adapt_stages, adapt, lora_rank, lr, momentum, weight_decay, grad_clip, prefix_cache_gb, prefix_cache_half,
            prefix_cache_dir,
        )  # fmt: skip
        self.normalize_loss = normalize_loss
        self.ewc_weight, self.fisher_source = ewc_weight, fisher
        self.enough = 0.0 if schedule == "published" else schedule  # the share of compactness that ends training

    @property
    @override
    def method(self) -> str:
        return "PANDA-EWC" if self.ewc_weight else "PANDA-Early"

    @override
    def configure_callbacks(self) -> Any:
        return [*super().configure_callbacks(), FeatureHealth()]

    def loss_space(self, features: Tensor) -> Tensor:
        """Features (N, D) as centre and compactness loss see them."""
        return F.normalize(features, dim=1) if self.normalize_loss else features

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms, count = self.loss_terms(batch)
        if self.fisher is not None:
            adapted, start, fisher = self.backbone.adapted(), self.start or {}, self.fisher
            ewc = losses.ewc(list(adapted.values()), *([d[n] for n in adapted] for d in (start, fisher)))
            terms["ewc"] = self.ewc_weight * ewc
        return self.logged_sum(terms, count)

    def loss_terms(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """What training lowers on normal images, by name, and the number of images behind it."""
        assert self.centre is not None
        features = self.loss_space(self.embed(batch))
        compactness, count = self.batch_mean(losses.compactness(features, self.centre), batch["index"])
        return {"compactness": compactness}, count

    @override
    def on_train_epoch_end(self) -> None:
        start = self.start or {}
        pairs = [(p.detach(), start[name]) for name, p in self.backbone.adapted().items()]
        wide = torch.promote_types(pairs[0][0].dtype, torch.float32)  # squares of small steps are 0 in float16
        moved = [(p.to(wide) - before.to(wide)).square().sum() for p, before in pairs]
        self.log("train/distance_from_start", torch.stack(moved).sum().sqrt())
        if not self.trainer.enable_validation:  # then each epoch ends with a bank
            self._end_if_compact()

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "fit":
            self._end_if_compact()

    def _end_if_compact(self) -> None:
        """End training by the schedule, where a bank has just been made."""
        if self.is_compact or not (self.enough and self.compactness_before):
            return
        share = self.compactness() / self.compactness_before
        if share <= self.enough:
            rank_zero_info(
                f"Compactness has fallen to {share:.3g} of its start (model.schedule={self.enough:g}): training ends."
            )
            self.is_compact = self.trainer.should_stop = True

    def compactness(self) -> float:
        """Mean compactness of the normal training images, with the weights that made the bank."""
        assert self.centre is not None
        features = self.loss_space(self.bank.to(self.centre))
        return float(self.index.mean(losses.compactness(features, self.centre)))

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if self.trainer.state.fn == "fit" and self.ewc_weight and self.fisher is None:  # what does not fit, says so now
            self.fisher = fisher.from_source(self.fisher_source, self.backbone, self.adapt_stages)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.trainer.should_stop |= self.is_compact  # a resumed run that had ended so is done

    @override
    def on_train_start(self) -> None:
        """Remember where training starts: centre, weights, Fisher. A resumed run has them from its checkpoint."""
        super().on_train_start()
        if self.start is None:
            if not self.bank_is_fresh:  # validation, which makes it, was switched off
                self.rebuild_bank()
                self.fit_index()
            self.centre = self.index.mean(self.loss_space(self.bank))
            self.compactness_before = self.compactness()
            self.start = {name: p.detach().clone() for name, p in self.backbone.adapted().items()}
            if self.ewc_weight and self.fisher is None:
                loader = self.data.normal_dataloader()
                path = fisher.cache_path(self.backbone, loader.dataset, str(self.trainer.precision))
                batches = on_device(self.trainer, loader, "Fisher information")
                self.fisher = fisher.kept_or_estimated(path, self.backbone, batches, self.trainer.strategy)
        for name in ("centre", "start", "fisher"):
            setattr(self, name, mapped(getattr(self, name), lambda tensor: tensor.to(self.device)))

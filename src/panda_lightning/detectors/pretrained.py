"""What detectors with a pretrained backbone share: loading it, adapting it, and having it in the checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.detectors.base import Detector
from panda_lightning.networks.backbones import Backbone, Optimize
from panda_lightning.networks.loading import fisher_beside
from panda_lightning.networks.prefix_cache import cache_prefix
from panda_lightning.runtime.whole import require_folder
from panda_lightning.types import Batch, PandaError


class PretrainedDetector(Detector):
    """A detector on the features of a pretrained network, whose last stages it may adapt by SGD.

    The features come from ``embed``; the arguments are explained at DN2 (``backbone``, ``weights``, ``optimize``) and
    PANDA (those of ``adapt``).
    """

    backbone: Backbone
    adapt_stages = 0
    prefix_cache_gb = 0.0
    prefix_cache_dir: str | None = None

    def __init__(self, backbone: str, weights: str | None, optimize: Optimize) -> None:
        super().__init__()
        self.backbone_name = backbone
        self.weights = weights
        self.optimize = optimize

    def adapt(
        self,
        stages: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_clip: float | None,
        prefix_cache_gb: float,
        prefix_cache_half: bool,
        prefix_cache_dir: str | None,
    ) -> None:
        """Say what is adapted and how; a method that learns calls it in its constructor."""
        self.adapt_stages = stages
        self.lr, self.momentum, self.weight_decay, self.grad_clip = lr, momentum, weight_decay, grad_clip
        self.prefix_cache_gb = prefix_cache_gb
        self.prefix_cache_half = prefix_cache_half
        self.prefix_cache_dir = prefix_cache_dir

    def embed(self, batch: Batch) -> Tensor:
        """Features (B, D) of a batch of images."""
        features: Tensor = self.backbone(batch["image"])
        return features.float()

    # ---- the backbone --------------------------------------------------------------------------------------------

    @override
    def load_networks(self) -> None:
        if not hasattr(self, "backbone"):
            self.load_backbone()

    def load_backbone(self) -> None:
        """Load the pretrained network; without network or files this fails before any work has begun.

        A run does it by itself, unless the network has come from a checkpoint.
        """
        self.backbone = self.fresh_networks()["backbone"]

    @override
    def fresh_networks(self) -> dict[str, Any]:
        return {"backbone": Backbone.pretrained(self.backbone_name, self.weights, self.adapt_stages, self.optimize)}

    @override
    def start_anew(self) -> None:
        super().start_anew()
        if self.backbone.fisher_file is None:  # it came out of a checkpoint
            self.backbone.fisher_file = fisher_beside(self.backbone_name, self.weights)

    @property
    @override
    def interpolation(self) -> str | None:  # type: ignore[override]
        return self.backbone.interpolation if hasattr(self, "backbone") else None

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if self.prefix_cache_dir is not None and self.trainer.state.fn == "fit":
            require_folder("prefix_cache_dir", self.prefix_cache_dir)
        if hasattr(self, "backbone"):
            self.backbone.require_side("image_size", data.view.size)

    @override
    def whole(self) -> dict[str, Any]:
        return {**super().whole(), "network": self.backbone.config if hasattr(self, "backbone") else None}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        config = self.derived["network"]
        if config is not None and not (hasattr(self, "backbone") and self.backbone.config == config):
            self.backbone = Backbone.from_config(config, self.adapt_stages, self.optimize)
            self._fresh = None  # of another network

    # ---- its adaptation ------------------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self.backbone.adapted().values())

    @override
    def configure_optimizers(self) -> Optimizer:
        if self.trainer.gradient_clip_val is not None:
            raise PandaError(
                f"trainer.gradient_clip_val={self.trainer.gradient_clip_val} would be ignored: set model.grad_clip."
            )
        return SGD(self.trained(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        limit = torch.inf if self.grad_clip is None else self.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.trained(), limit)
        self.log("train/grad_norm", norm, on_step=False, on_epoch=True, batch_size=1)

    def cached_dataloaders(self) -> list[DataLoader[Batch]]:
        """Loaders of the data sets whose images may pass the frozen layers once, the most used first."""
        return [self.data.normal_dataloader(), self.data.val_dataloader()]

    @override
    def on_fit_start(self) -> None:
        budget = int(self.prefix_cache_gb * 2**30)
        loaders: Any = self.cached_dataloaders() if budget else ()
        for loader in (one for one in loaders if len(one.dataset)):
            budget -= cache_prefix(
                self.trainer, self.backbone, loader, budget, self.prefix_cache_half, self.prefix_cache_dir
            )

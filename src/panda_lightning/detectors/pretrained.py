"""What detectors with a pretrained backbone share: loading it, adapting it, and having it in the checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.detectors.base import Detector
from panda_lightning.networks.adapting import Adapt
from panda_lightning.networks.backbones import Backbone, Pool
from panda_lightning.networks.checks import patch_of, require_several_sizes, require_size
from panda_lightning.networks.folding import Optimize
from panda_lightning.networks.loading import fisher_beside
from panda_lightning.networks.prefix_cache import cache_prefix
from panda_lightning.runtime.whole import require_folder
from panda_lightning.types import Batch, PandaError


class PretrainedDetector(Detector):
    """A detector on the features of a pretrained network; it may adapt the network's last stages by SGD.

    The features come from ``embed``; the arguments are explained at DN2 (``backbone``, ``weights``, ``optimize``) and
    PANDA (those of ``learn_by``).
    """

    SHAPING = ("weights", "pool", "adapt_stages", "adapt", "lora_rank")
    backbone: Backbone
    pool: Pool | None = None
    adapt_stages = 0
    adapt: Adapt = "stages"
    lora_rank = 8
    prefix_cache_gb = 0.0
    prefix_cache_dir: str | None = None

    def __init__(self, backbone: str, weights: str | None, optimize: Optimize) -> None:
        super().__init__()
        self.backbone_name = backbone
        self.weights = weights
        self.optimize = optimize

    def learn_by(
        self,
        stages: int,
        adapt: Adapt,
        lora_rank: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_clip: float | None,
        prefix_cache_gb: float,
        prefix_cache_half: bool,
        prefix_cache_dir: str | None,
    ) -> None:
        """Say what is adapted and how; a method that learns calls it in its constructor."""
        self.adapt_stages, self.adapt, self.lora_rank = stages, adapt, lora_rank
        self.lr, self.momentum, self.weight_decay, self.grad_clip = lr, momentum, weight_decay, grad_clip
        self.prefix_cache_gb, self.prefix_cache_dir = prefix_cache_gb, prefix_cache_dir
        self.prefix_cache_half = prefix_cache_half

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
        options = self._network_options
        return {"backbone": Backbone.pretrained(self.backbone_name, self.weights, self.adapt_stages, **options)}

    @property
    def _network_options(self) -> dict[str, Any]:
        return {"optimize": self.optimize, "adapt": self.adapt, "lora_rank": self.lora_rank, "pool": self.pool}

    @override
    def start_anew(self) -> None:
        super().start_anew()
        if self.backbone.fisher_file is None:  # it came out of a checkpoint
            self.backbone.fisher_file = fisher_beside(self.backbone_name, self.weights)

    @property
    @override
    def interpolation(self) -> str | None:  # type: ignore[override]
        return self.backbone.interpolation if hasattr(self, "backbone") else None

    @property
    @override
    def multiple(self) -> int:  # type: ignore[override]  # known when the network is
        return patch_of(self.backbone.model) if hasattr(self, "backbone") else 1

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if self.prefix_cache_dir is not None and self.trainer.state.fn == "fit":
            require_folder("prefix_cache_dir", self.prefix_cache_dir)
        if hasattr(self, "backbone"):
            require_size(self.backbone, *self.passed(data))
            if data.view.sides is None:
                require_several_sizes(self.backbone)

    def passed(self, data: Any) -> tuple[str, Sequence[int]]:
        """What passes the network: the argument that says its sides, and these in pixels."""
        return "image_size", data.view.usual

    @override
    def whole(self) -> dict[str, Any]:
        return {**super().whole(), "network": self.backbone.config if hasattr(self, "backbone") else None}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        config = self.derived["network"]
        if config is not None and not (hasattr(self, "backbone") and self.backbone.config == config):
            self.backbone = Backbone.from_config(config, self.adapt_stages, **self._network_options)
            self._fresh = None  # of another network

    # ---- its adaptation ------------------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self.backbone.trained().values())

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
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        whole = norm.isfinite()  # gradients of 16-mixed overflow now and then, and the step is left out
        mean: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": whole.long()}
        self.log("train/grad_norm", torch.where(whole, norm, 0), **mean)

    def cached_dataloaders(self) -> list[DataLoader[Batch]]:
        """Loaders of the data sets whose images may pass the frozen layers once, the most used first."""
        return [self.data.normal_dataloader(), self.data.val_dataloader()]

    @override
    def on_fit_start(self) -> None:
        millions = [(p.numel() / 1e6, p.requires_grad) for p in self.parameters()]
        trained = sum(number for number, learns in millions if learns)
        rank_zero_info(f"{self.method} trains {trained:.3g} of {sum(n for n, _ in millions):.3g} million parameters.")
        budget = int(self.prefix_cache_gb * 2**30)
        loaders: Any = self.cached_dataloaders() if budget else ()
        for loader in (one for one in loaders if len(one.dataset)):
            budget -= cache_prefix(
                self.trainer, self.backbone, loader, budget, self.prefix_cache_half, self.prefix_cache_dir
            )

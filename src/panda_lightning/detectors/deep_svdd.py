"""Deep SVDD: a small network that maps normal images close to a centre."""

from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from panda_lightning.arguments import Amount, Number, OpenShare
from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.checks import require_shapes
from panda_lightning.detectors.steps import real_images, seeded
from panda_lightning.formulas import losses
from panda_lightning.networks import augment
from panda_lightning.networks.scratch import deep_svdd_networks
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract, on_device
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.processes import of_each
from panda_lightning.types import Batch, PandaError


class DeepSVDD(Detector):
    r"""Deep one-class classification (Ruff et al., ICML 2018).

    .. math:: \text{hard: } \frac1B \sum_x d(x) \qquad
              \text{soft: } R^2 + \frac{1}{\nu B} \sum_x \max(0, d(x) - R^2) \qquad
              d(x) = \lVert \phi(x) - c \rVert^2

    One ``fit`` has two phases. First an autoencoder is trained, and its encoder initialises phi (in this phase the
    score is the mean squared reconstruction error). Then c is set to the mean of phi over the normal training images,
    with entries closer to 0 than 0.1 moved to 0.1 or -0.1, and the encoder is trained with the loss above (the score is
    then d, minus R^2 for the soft boundary). Images are contrast-normalised by the L1 norm and scaled by the range of
    the normal training images. Schedule and learning rates are those of the paper: 350 + 150 epochs; its batch size of
    200 is an argument of the data module.

    Args:
        network: mnist, fashion_mnist (for 28 px, one channel), cifar10 (32 px), 64px (one more block), or auto, by
            image_size.
        boundary: hard ("One-Class Deep SVDD") or soft.
        nu: Share of images that may lie outside the soft boundary.
        warm_up: Epochs of the second phase before the soft boundary's R is set to the 1 - nu quantile.
        pretrain_epochs: Epochs of the autoencoder.
        pretrain_milestone: Epoch from which its learning rate is divided by ten.
        milestone: The same for the second phase, counted from its start.
        lr: Adam's learning rate, in both phases.
        weight_decay: Adam's weight decay.

    Attributes:
        size: Of the networks' images, in pixels.
        range: Of the normal training images after contrast normalisation.
        centre: (D,), from the second phase on.
        radius: R.
    """

    encoder: nn.Sequential
    decoder: nn.Sequential
    range = Derived[tuple[float, float] | None](None)
    centre = Derived[Tensor | None](None)
    radius = Derived[Tensor](torch.zeros(()))
    SHAPES = "square"
    SHAPING = ("network",)

    def __init__(
        self,
        network: Literal["auto", "mnist", "fashion_mnist", "cifar10", "64px"] = "auto",
        boundary: Literal["hard", "soft"] = "hard",
        nu: OpenShare = 0.1,
        warm_up: Number = 10,
        pretrain_epochs: Number = 350,
        pretrain_milestone: Number = 250,
        milestone: Number = 50,
        lr: Amount = 1e-4,
        weight_decay: Amount = 5e-7,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.boundary = boundary
        self.nu = nu
        self.warm_up = warm_up
        self.pretrain_epochs = pretrain_epochs
        self.pretrain_milestone = pretrain_milestone
        self.milestone = milestone
        self.lr = lr
        self.weight_decay = weight_decay
        self.size = 0

    @property
    @override
    def auroc_name(self) -> str:
        return "auroc_autoencoder" if self.centre is None else super().auroc_name  # by reconstruction errors

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.max_epochs in range(self.pretrain_epochs + 1):
            rank_zero_warn(
                f"max_epochs={self.trainer.max_epochs} only trains the autoencoder "
                f"(pretrain_epochs={self.pretrain_epochs}): scores are its reconstruction errors, not Deep "
                "SVDD's. Raise max_epochs, or lower pretrain_epochs."
            )
        if stage == "fit":
            require_shapes(self, self.data.view)
            self.build(self.data.view.size)

    def build(self, size: int) -> None:
        """Make the networks for images of this side in pixels, unless they are there."""
        if self.size != size:
            self.size, self._fresh, self._moved = size, None, False
            for name, network in self.fresh_networks().items():
                setattr(self, name, network)

    @override
    def fresh_networks(self) -> dict[str, nn.Module]:
        with seeded():
            self.channels, encoder, decoder = deep_svdd_networks(self.network, self.size)
        return {"encoder": encoder, "decoder": decoder}

    def inputs(self, batch: Batch) -> Tensor:
        """Images (B, C, H, W) as the encoder sees them, about in [0, 1]."""
        assert self.range is not None
        images = batch["image"] if self.channels == 3 else batch["image"].float().mean(dim=1, keepdim=True)
        low, high = self.range
        scaled = (augment.contrast_normalize(images) - low) / (high - low)
        return scaled.to(next(self.encoder.parameters()).dtype)

    def embed(self, batch: Batch) -> Tensor:
        """Representations (B, D)."""
        features: Tensor = self.encoder(self.inputs(batch))
        return features

    def reconstruction_error(self, batch: Batch) -> Tensor:
        """The autoencoder's squared error, mean over pixels and channels: (B,)."""
        images = self.inputs(batch)
        error: Tensor = (self.decoder(self.encoder(images)) - images).square().mean(dim=(1, 2, 3))
        return error

    def distance(self, batch: Batch) -> Tensor:
        """Squared distance to the centre: (B,)."""
        assert self.centre is not None
        return (self.embed(batch) - self.centre).square().sum(dim=1)

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        if self.centre is None:
            return self.reconstruction_error(batch)
        self.centre = self.centre.to(self.device)
        return self.distance(batch) - self.radius.to(self.device).square()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = real_images(self, batch)
        index = batch["index"]
        if self.centre is None:
            loss, count = self.batch_mean(self.reconstruction_error(batch), index)
            return self.logged_sum({"reconstruction": loss}, count)
        distance = self.distance(batch)
        if self.boundary == "soft":
            if self.current_epoch >= self.pretrain_epochs + self.warm_up:
                self.radius = torch.nanquantile(self._of_all(distance.detach()).sqrt(), 1 - self.nu)
            distance = losses.soft_boundary(distance, self.radius, self.nu)
        loss, count = self.batch_mean(distance, index)
        if self.trainer.world_size > 1:  # DDP waits for a gradient of every parameter
            loss = loss + 0 * torch.stack([p.sum() for p in self.decoder.parameters()]).sum()
        return self.logged_sum({"deep_svdd": loss}, count)

    def _of_all(self, distance: Tensor) -> Tensor:
        """Distances of the step's images on all processes, and NaN where a process has fewer than others."""
        if self.trainer.world_size == 1:
            return distance
        padded = distance.new_full((self.data.batch_size // self.trainer.world_size,), torch.nan)
        padded[: len(distance)] = distance
        return of_each(padded)

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        scores = self.merged_scores().score
        if self.centre is not None and len(scores):
            farthest = scores.max() + self.radius.cpu().square()
            if farthest <= 1e-6 * self.centre.cpu().square().sum():
                rank_zero_warn(
                    "Deep SVDD: no image is farther from the centre than a thousandth of the centre's length (d <= "
                    f"{farthest:.2g}): the network has collapsed to a point."
                )

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # not once an epoch: after a resume from an epoch's last step Lightning leaves out the start of the next
        if self.centre is None and self.current_epoch >= self.pretrain_epochs:
            self.encoder.eval()
            outputs = extract(self.trainer, self.embed, self.data.normal_dataloader(), "Centre")
            self.encoder.train()
            centre = outputs.mean(dim=0)
            self.centre = torch.where(centre.abs() < 0.1, torch.where(centre < 0, -0.1, 0.1), centre)
            optimizer = self.trainer.optimizers[0]  # the second phase has an Adam of its own
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(self.encoder.parameters())
            rank_zero_info(f"Deep SVDD: the encoder is pretrained, its centre is set after {self.current_epoch} epochs")

    @override
    def on_fit_start(self) -> None:
        loader = self.data.normal_dataloader()
        if self.range is None:
            self.range = (0.0, 1.0)  # inputs as they are, to be measured
            parts = [
                (batch["index"], self.inputs(batch).flatten(1).aminmax(dim=1))
                for batch in on_device(self.trainer, loader, "Range of the normal images")
            ]
            _, low, high = gather([(index, least, most) for index, (least, most) in parts])
            least, most = float(low.min()), float(high.max())
            if least == most:
                raise PandaError("the normal training images have one flat colour: Deep SVDD has nothing to learn.")
            self.range = (least, most)
        self.centre = None if self.centre is None else self.centre.to(self.device)
        self.radius = self.radius.to(self.device)

    @override
    def configure_optimizers(self) -> Any:
        def factor(epoch: int) -> float:
            pretraining = epoch < self.pretrain_epochs
            late = self.pretrain_milestone if pretraining else self.pretrain_epochs + self.milestone
            return 0.1 if epoch >= late else 1.0

        learning = self if self.centre is None else self.encoder
        optimizer = Adam(learning.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [optimizer], [LambdaLR(optimizer, factor)]

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        if self.origin is not None:
            self.build(self.origin["view"]["image_size"])

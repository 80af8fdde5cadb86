"""Multi-Head RotNet: a network that tells how a normal image was turned and shifted fails on anomalous ones."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Fraction, OpenShare
from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.steps import draws, linear, real_images, seeded
from panda_lightning.networks import augment
from panda_lightning.networks.backbones import portions
from panda_lightning.networks.scratch import Dropout, WideResNet
from panda_lightning.types import Batch, PandaError

HEADS = {"rotation": 4, "x_shift": 3, "y_shift": 3}


class Cosine(LRScheduler):
    """Learning rates that fall along a cosine from their peaks to 0, after ``steps`` steps in all.

    They follow from the step and the run's length alone (torch's go from one to the next), so that a run that is
    resumed to be longer, or shorter, has from there on the rates of a run of that length.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.steps = max(steps, 1)  # a run of no steps asks for a rate, too
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        share = min(self.last_epoch / self.steps, 1.0)  # torch counts steps under this name
        return [peak * (1 + math.cos(math.pi * share)) / 2 for peak in self.base_lrs]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "steps": self.steps})
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate  # in place of the saved one, which belongs to the length of the run that saved it


class MultiHeadRotNet(Detector):
    r"""Self-supervised prediction of rotation and translation (Hendrycks, Mazeika, Kadavath, Song, NeurIPS 2019).

    .. math:: L = \frac13 \sum_h CE_h(t_h, T(x)), \qquad s(x) = -\sum_T \sum_h p_h(t_h \mid T(x))

    T rotates an image by a multiple of 90 degrees and then shifts it by -r, 0 or r pixels in x and in y, with reflected
    edges. t_h is the class that head h (rotation, x shift, y shift) should predict. In training, T is drawn for each
    image; the score sums over all 36 transformations. A WideResNet-16-4 is trained from scratch on random crops
    (padding 4) and mirrored images. The batch size of 128 and the 200 epochs are arguments of the data module and the
    Trainer.

    Args:
        depth: Depth of the WideResNet, 6 n + 4: 10, 16, 22, ...
        width: Its widening factor.
        dropout: Dropout in its blocks.
        lr: Peak learning rate of SGD with Nesterov momentum; it decays to 0 along a cosine over all steps.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
    """

    SHAPES = "square"
    SHAPING = ("depth", "width", "dropout")

    def __init__(
        self,
        depth: Count = 16,
        width: Count = 4,
        dropout: Fraction = 0.3,
        lr: Amount = 0.1,
        momentum: OpenShare = 0.9,
        weight_decay: Amount = 5e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (depth - 4) % 6 or depth < 10:
            raise PandaError(f"depth={depth} is not that of a WideResNet: choose 10, 16, 22 or another 6 n + 4.")
        self.depth = depth
        self.width = width
        self.dropout = dropout
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.network: WideResNet
        self.head: nn.Linear
        for name, network in self.fresh_networks().items():
            setattr(self, name, network)

    @override
    def fresh_networks(self) -> dict[str, nn.Module]:
        with seeded():
            network = WideResNet(self.depth, self.width, self.dropout)
            return {"network": network, "head": nn.Linear(network.num_features, sum(HEADS.values()))}

    def logits(self, images: Tensor, transform: Tensor) -> tuple[Tensor, ...]:
        """Each head's logits (B, 4), (B, 3), (B, 3) for images (B, 3, S, S) uint8 after the transforms (B, 3)."""
        shift = images.shape[-1] // 4  # 8 pixels of 32
        turned = augment.turn_and_shift(
            images, transform[:, 0], (transform[:, 1] - 1) * shift, (transform[:, 2] - 1) * shift
        )
        x = turned.to(self.head.weight.dtype) / 127.5 - 1
        return torch.split(linear(self.head, self.network(x)), list(HEADS.values()), dim=1)

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        images, shares = batch["image"], []
        ways = torch.cartesian_prod(*(torch.arange(n, device=images.device) for n in HEADS.values()))
        for some in portions(ways, 1):
            many = images.repeat(len(some), 1, 1, 1)
            transforms = some.unsqueeze(1).expand(-1, images.shape[0], -1).flatten(0, 1)
            heads = zip(self.logits(many, transforms), transforms.T, strict=True)
            right = [head.softmax(dim=1).gather(1, true.unsqueeze(1)) for head, true in heads]
            shares.append(torch.cat(right, dim=1).view(len(some), images.shape[0], -1))
        return -torch.cat(shares).sum(dim=(0, 2))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = real_images(self, batch)
        numbers = draws(self, batch, augment.CROP_DRAWS + len(HEADS))
        place = (self.data.seed, self.current_epoch, batch_idx)
        self._dropped.manual_seed(hash(place) % 2**63)  # the same after a resume
        images = augment.crop_and_flip(batch["image"], numbers[:, : augment.CROP_DRAWS], padding=4)
        parts = zip(numbers[:, augment.CROP_DRAWS :].T, HEADS.values(), strict=True)
        transform = torch.stack([(part * kinds).long() for part, kinds in parts], dim=1)
        terms = {}
        for name, head, true in zip(HEADS, self.logits(images, transform), transform.T, strict=True):
            errors = F.cross_entropy(head, true, reduction="none") / len(HEADS)
            terms[name], count = self.batch_mean(errors, batch["index"])
        return self.logged_sum(terms, count)

    @override
    def on_fit_start(self) -> None:
        self._dropped = torch.Generator(self.device)
        for module in self.network.modules():
            if isinstance(module, Dropout):
                module.share = (self.data.batch_size, self.trainer.global_rank)
                module.generator = self._dropped

    @override
    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if steps == math.inf:  # known before images are decoded
            raise PandaError(
                f"trainer.max_epochs={self.trainer.max_epochs} sets no end, but {self.method}'s learning rate falls "
                "over all steps of a run: set max_epochs to 1 or more, or max_steps; max_time may end the run sooner."
            )
        optimizer = SGD(
            self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        schedule = Cosine(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

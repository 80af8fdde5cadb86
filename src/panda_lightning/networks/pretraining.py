"""Supervised pretraining of a small network on labelled images: where a small backbone comes from."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from typing_extensions import override

from panda_lightning.arguments import Amount, Bounds, Checked, Count, Fraction, OpenShare, Positive, Seed
from panda_lightning.datamodules.loaders import ShardedSampler
from panda_lightning.networks.backbones import Backbone
from panda_lightning.pictures.images import ImageDataset, Images, as_is, decoded
from panda_lightning.pictures.layout import images_below
from panda_lightning.pictures.view import View
from panda_lightning.runtime.features import extract
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch, PandaError


class LabelledFolder(Checked, pl.LightningDataModule):
    """Labelled images: ``root/train/<class>/...`` and ``root/val/<class>/...``, decoded once into memory.

    Tiny-ImageNet can be used as downloaded: ``val/images`` with ``val/val_annotations.txt``.

    Args:
        root: The folder.
        image_size: Side in pixels; images are resized directly to the square.
        batch_size: Images per training step, over all processes together.
        train_limit: Keep only this many training images, evenly spaced; None keeps all.
        seed: Seed of the order.
    """

    def __init__(
        self,
        root: str = "data/tiny-imagenet-200",
        image_size: Count = 64,
        batch_size: Count = 256,
        train_limit: Count | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root = Path(root)
        self.image_size = image_size
        self.batch_size = batch_size
        self.train_limit = train_limit
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        if hasattr(self, "classes"):
            return
        folder = self.root / "train"
        self.classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ()
        if not self.classes:
            raise PandaError(f"{folder} has no class folders: expected {folder}/<class>/*.jpg; set --data.root.")
        train = [(path, name) for name in self.classes for path in images_below(folder / name)]
        if self.train_limit is not None and self.train_limit < len(train):
            rows = np.linspace(0, len(train) - 1, self.train_limit).round().astype(int)
            train = [train[i] for i in rows]
        self._datasets = {"train": self._decoded(train, "training"), "val": self._decoded(self._val(), "validation")}

    def _val(self) -> list[tuple[Path, str]]:
        folder, listed = self.root / "val", self.root / "val" / "val_annotations.txt"
        if listed.is_file():
            rows = [line.split("\t") for line in listed.read_text("utf-8").splitlines()]
            return [(folder / "images" / row[0], row[1]) for row in rows]
        return [(path, name) for name in self.classes for path in images_below(folder / name)]

    def _decoded(self, found: list[tuple[Path, str]], what: str) -> ImageDataset:
        if not found:
            raise PandaError(f"there are no {what} images in {self.root}: see LabelledFolder for the layout.")
        number = {name: i for i, name in enumerate(self.classes)}
        unknown = sorted({name for _, name in found} - set(number))
        if unknown:
            raise PandaError(
                f"{what} images of {', '.join(unknown[:8])} belong to no class folder of {self.root}/train."
            )
        targets = np.array([number[name] for _, name in found], dtype=np.int64)
        view = View(self.image_size, "squash", self.image_size, "bicubic", None)
        images = Images([path for path, _ in found], targets)
        return ImageDataset(decoded(images, view, True, False, f"Decoding {what} images"), targets, view)

    def _loader(self, what: str, train: bool) -> DataLoader[Batch]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        dataset = self._datasets[what]
        return DataLoader(
            dataset,
            batch_size=self.batch_size // world,
            sampler=ShardedSampler(len(dataset), world, rank, shuffle=train, seed=self.seed),
            collate_fn=as_is,
            drop_last=train,  # BatchNorm would see a few images of the last batch only
        )

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", train=True)

    def ordered_dataloader(self) -> DataLoader[Batch]:
        """The training images in order, each once over all processes."""
        return self._loader("train", train=False)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val", train=False)


class Pretraining(Checked, pl.LightningModule):
    r"""Trains a timm network on class labels and, optionally, on the features of a larger pretrained network.

    .. math:: L = CE(y, f(x)) + \alpha \, \lVert W f'(x) - t(x_0) \rVert^2 / D

    f' are the pooled features, and t are the teacher's features of the image before augmentation, with each dimension
    standardised over the data set. The network is saved in ``<run>/backbone``; use it with ``--model.backbone
    local-dir:...``.

    Args:
        architecture: A timm name.
        model_args: Further arguments of timm's constructor.
        teacher: A backbone as for DN2, whose features are learned; None learns only the classes.
        teacher_size: Images are enlarged to this many pixels for the teacher.
        alpha: Weight of the teacher's term.
        lr: Peak of the one-cycle schedule.
        momentum: Nesterov momentum of SGD.
        weight_decay: Weight decay of SGD.
        label_smoothing: Label smoothing of the cross-entropy.
        zoom: Images are enlarged by a random factor of at most ``zoom``, and shifted within the enlarged image, or by
            up to a twelfth.
        jitter: Brightness and contrast are changed by up to this fraction.
    """

    def __init__(
        self,
        architecture: str = "resnet10t",
        model_args: dict[str, Any] | None = None,
        teacher: str | None = None,
        teacher_size: Count = 128,
        alpha: Amount = 1.0,
        lr: Positive = 0.4,
        momentum: OpenShare = 0.9,
        weight_decay: Amount = 5e-5,
        label_smoothing: Annotated[float, Bounds(0, 1)] = 0.1,
        zoom: Annotated[float, Bounds(1)] = 1.4,
        jitter: Fraction = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.architecture = architecture
        self.model_args = dict(model_args or {})
        self.teacher = teacher
        self.teacher_size = teacher_size
        self.alpha = alpha
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.zoom = zoom
        self.jitter = jitter
        self.accuracy = MeanMetric()

    mean: Tensor
    std: Tensor

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        import timm

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        model: Any = timm.create_model(self.architecture, num_classes=len(data.classes), **self.model_args)
        self.model: Any = model.to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.head = nn.Linear(model.num_features, self._teacher[0].num_features) if self.teacher else None

    @override
    def setup(self, stage: str) -> None:
        if self.teacher and stage == "fit":
            self._teacher = (Backbone.pretrained(self.teacher, adapt_stages=0),)  # no submodule: not in checkpoints

    @override
    def on_fit_start(self) -> None:
        if not self.teacher:
            return
        teacher = self._teacher[0].to(self.device)

        def embed(batch: Batch) -> Tensor:
            pixels = F.interpolate(batch["image"], size=(self.teacher_size,) * 2, mode="bilinear")
            features: Tensor = teacher(pixels)
            return features

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        targets = extract(self.trainer, embed, data.ordered_dataloader(), "Features of the teacher")
        std, mean = torch.std_mean(targets, dim=0)
        self.targets = ((targets - mean) / std.clamp(min=1e-6)).half()

    def augment(self, images: Tensor) -> Tensor:
        """Flip, zoom, shift, brighten: (B, 3, H, W) uint8 -> float, normalised."""
        x = ((images / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        n, device = len(x), x.device
        scale = 1 / (1 + (self.zoom - 1) * torch.rand(n, device=device))
        room = (1 - scale).clamp(min=1 / 6)
        theta = torch.zeros(n, 2, 3, device=device)
        theta[:, 0, 0] = scale * (1 - 2 * torch.randint(0, 2, (n,), device=device))
        theta[:, 1, 1] = scale
        theta[:, :, 2] = room.unsqueeze(1) * (2 * torch.rand(n, 2, device=device) - 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        gain, offset = ((2 * torch.rand(2, n, 1, 1, 1, device=device) - 1) * self.jitter).unbind()
        return x * (1 + gain) + offset

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        real = batch["index"] >= 0
        features = self.model.forward_head(self.model.forward_features(self.augment(batch["image"])), pre_logits=True)
        logits = self.model.get_classifier()(features)
        loss = F.cross_entropy(logits[real], batch["label"][real], label_smoothing=self.label_smoothing)
        self.log("train/classes", loss, on_step=False, on_epoch=True, sync_dist=True)
        if self.head is not None:
            wanted = self.targets[batch["index"][real]].to(features)
            distance = F.mse_loss(self.head(features[real]), wanted)
            self.log("train/teacher", distance, on_step=False, on_epoch=True, sync_dist=True)
            loss = loss + self.alpha * distance
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x = (batch["image"] / 255 - self.mean) / self.std
        self.accuracy((self.model(x).argmax(dim=1) == batch["label"]).float())
        self.log("val/accuracy", self.accuracy, prog_bar=True, on_epoch=True)

    @override
    def configure_optimizers(self) -> Any:
        plain = [p for p in self.parameters() if p.ndim < 2]
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_fit_end(self) -> None:
        self.export(Path(self.trainer.log_dir or self.trainer.default_root_dir) / "backbone")

    @rank_zero_only
    def export(self, folder: Path) -> None:
        """Write a timm ``local-dir``: float16 weights, and how they were made."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        accuracy = float(self.trainer.callback_metrics.get("val/accuracy", math.nan))
        cfg = self.model.pretrained_cfg
        pretrained_cfg = {
            "tag": "panda",
            "num_classes": len(data.classes),
            "input_size": [3, data.image_size, data.image_size],
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            **{key: cfg[key] for key in ("mean", "std", "first_conv", "classifier")},
            "label_names": list(data.classes),
        }
        known = ("architecture", "model_args")
        made = {name: v for name, v in self.hparams.items() if name not in known and not name.startswith("_")}
        config = {
            "architecture": self.architecture,
            "num_classes": len(data.classes),
            "pretrained_cfg": pretrained_cfg,
            "model_args": self.model_args,
            "training": {**made, "epochs": self.trainer.current_epoch, "val_accuracy": accuracy},
        }
        with new_file(folder / "config.json") as part:
            part.write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        half = {k: t.half() if t.is_floating_point() else t for k, t in self.model.state_dict().items()}
        with new_file(folder / "model.safetensors") as part:
            save_file({k: t.contiguous().cpu() for k, t in half.items()}, part)
        rank_zero_info(f"Network saved: --model.backbone local-dir:{folder}")

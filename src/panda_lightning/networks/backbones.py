"""A pretrained timm network, split into a frozen prefix and an adapted suffix."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from panda_lightning.networks.folding import Layer, fold_batchnorm, run
from panda_lightning.networks.loading import in_checkpoint, pretrained
from panda_lightning.types import PandaError

Optimize = Literal["plain", "channels_last", "folded", "compiled"]

# What timm's own forward_features calls, in order, by class of network; containers of stages are written with
# a dot and expanded. tests/networks/test_backbones.py compares each row with forward_features. Another family that
# computes its features as one chain is one more row.
TRUNKS = {
    "ResNet": ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "EfficientNet": ("conv_stem", "bn1", "blocks.", "conv_head", "bn2"),  # MobileNetV2 is of this class too
    "MobileNetV3": ("conv_stem", "bn1", "blocks."),
    "RegNet": ("stem", "s1", "s2", "s3", "s4", "final_conv"),
    "ConvNeXt": ("stem", "stages.", "norm_pre"),
    "VisionTransformer": ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks.", "norm"),
}


class Backbone(nn.Module):
    """Pooled features of a timm network whose last stages are adapted and whose other layers stay as they are.

    A stage is a group of timm's ``group_matcher(coarse=True)``: layer1 to layer4 of a ResNet, blocks.0 to
    blocks.6 of a MobileNetV2, one block of a ViT. Adapted are the last ``adapt_stages`` of them and everything
    between them and the classifier, BatchNorm's scale and shift included. The network is always in eval mode, so
    BatchNorm uses its pretrained running statistics (PANDA section 3.2).

    Args:
        model: A timm model with its classifier.
        adapt_stages: How many of the last stages to adapt, 0 for none.
        model_args: The arguments beyond its name with which timm made it; kept for checkpoints.
        optimize: How the layers are computed, each with what is before it; features agree to float32's rounding.
            plain; channels_last: memory layout; folded: the frozen layers' BatchNorm folded into their convolutions;
            compiled: frozen and adapted layers by torch.compile, which takes up to minutes at the start.
    """

    mean: Tensor
    std: Tensor
    fisher_file: Path | None = None  # the Fisher diagonal that lies beside the weights

    def __init__(
        self,
        model: nn.Module,
        adapt_stages: int,
        model_args: dict[str, Any] | None = None,
        optimize: Optimize = "folded",
    ) -> None:
        super().__init__()
        family = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in TRUNKS), None)
        if family is None:
            raise PandaError(
                f"a timm {type(model).__name__} cannot be split into a frozen and an adapted part; supported are "
                f"the classes {', '.join(TRUNKS)} (see timm.list_models())."
            )
        if not isinstance(as_timm(model).get_classifier(), nn.Module):
            raise PandaError(
                f"a timm {type(model).__name__} has several classifiers, as distilled networks do, and none of them is "
                "the pretraining task's alone: choose one without, such as deit_small_patch16_224."
            )
        self.model = model
        self.model_args = dict(model_args or {})
        self.pieces = list(_expand(model, TRUNKS[family]))
        matcher = cast(dict[str, Any], as_timm(model).group_matcher(coarse=True))
        stage_pattern = matcher["blocks"] if isinstance(matcher["blocks"], str) else matcher["blocks"][0][0]
        stages = [i for i, name in enumerate(self.pieces) if re.match(stage_pattern, name)]
        if not 0 <= adapt_stages <= len(stages):
            raise PandaError(
                f"adapt_stages={adapt_stages} does not fit {self.architecture}, which has {len(stages)} stages: "
                f"choose 0 to {len(stages)}."
            )
        self._split = stages[-adapt_stages] if adapt_stages else len(self.pieces)
        frozen = tuple(f"{name}." for name in self.pieces[: self._split])
        classifier = {id(p) for p in self._classifier.parameters()}
        for name, param in model.named_parameters():
            param.requires_grad_(
                adapt_stages > 0
                and not name.startswith(frozen)
                and not re.match(matcher["stem"], name)  # a ViT's tokens and position embedding
                and id(param) not in classifier
            )
        self.compute(optimize)
        cfg = as_timm(model).pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.train(False)

    def compute(self, optimize: Optimize) -> None:
        """Compute the layers in another way, see the class."""
        self.optimize = optimize
        self._layout = torch.contiguous_format if optimize == "plain" else torch.channels_last
        self.model.to(memory_format=self._layout)
        self._frozen: tuple[object, list[Layer]] = (None, [])
        self._compiled_frozen, self._compiled_adapted = (
            (torch.compile(run), torch.compile(run)) if optimize == "compiled" else (run, run)
        )

    @classmethod
    def pretrained(
        cls, name: str, weights: str | None = None, adapt_stages: int = 2, optimize: Optimize = "folded"
    ) -> Self:
        """Load a network with its weights; never one with random weights.

        Args:
            name: A timm name with or without tag (``resnet152.tv_in1k``), ``local-dir:PATH``, ``hf-hub:ID``,
                ``panda_tiny`` (bundled), or a checkpoint file of this project (``PATH.ckpt``).
            weights: A file with weights for the named timm architecture, in place of timm's own.
            adapt_stages: How many of the last stages to adapt.
            optimize: See the class.

        Raises:
            PandaError: If the name is unknown, the weights cannot be had, or the family is not supported.
        """
        if name.endswith(".ckpt"):
            config, state = in_checkpoint(name)
            backbone = cls.from_config(config, adapt_stages, optimize)
            backbone.model.load_state_dict(state)
            return backbone
        model, model_args, fisher_file = pretrained(name, weights)
        backbone = cls(model, adapt_stages, model_args, optimize)
        backbone.fisher_file = fisher_file
        return backbone

    @classmethod
    def from_config(cls, config: dict[str, Any], adapt_stages: int, optimize: Optimize = "folded") -> Self:
        """Build the network that ``config`` (see there) describes, to be filled from a checkpoint."""
        import timm

        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=config["num_classes"],
            pretrained_cfg=config["pretrained_cfg"],
            **config["model_args"],
        )
        return cls(model, adapt_stages, config["model_args"], optimize)

    @property
    def architecture(self) -> str:
        """Timm's name of the network, without tag."""
        return str(as_timm(self.model).pretrained_cfg["architecture"])

    @property
    def interpolation(self) -> str:
        """How the network's images were resized in pretraining: bilinear or bicubic."""
        return str(as_timm(self.model).pretrained_cfg["interpolation"])

    @property
    def stride(self) -> int:
        """Pixels of the input for one of the last feature map."""
        return int(as_timm(self.model).feature_info[-1]["reduction"])

    def require_side(self, name: str, side: int) -> None:
        """Refuse a side of images, in pixels, that the network cannot take.

        Raises:
            PandaError: Naming the sides nearest to it.
        """
        patch = getattr(getattr(as_timm(self.model), "patch_embed", None), "patch_size", (1, 1))[0]
        least = max(self.stride, patch)
        if side < least:
            raise PandaError(
                f"{name}={side} is smaller than the stride of {self.architecture}: choose {least} or more."
            )
        if side % patch:
            below = side // patch * patch
            raise PandaError(
                f"{name}={side} is no multiple of the {patch} px patches of {self.architecture}: choose {below} or "
                f"{below + patch}."
            )

    @property
    def num_features(self) -> int:
        """Dimensions of the features."""
        return int(as_timm(self.model).head_hidden_size)

    @property
    def num_classes(self) -> int:
        """Outputs of the pretrained classifier, 0 if there is none."""
        return int(as_timm(self.model).num_classes)

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build the network again: primitives only."""
        cfg = {k: v for k, v in as_timm(self.model).pretrained_cfg.items() if k not in ("file", "source", "url")}
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "model_args": self.model_args,
            "pretrained_cfg": cfg,
        }

    @property
    def _classifier(self) -> nn.Module:
        return cast(nn.Module, as_timm(self.model).get_classifier())

    def adapted(self) -> dict[str, nn.Parameter]:
        """The adapted parameters by plain timm names, such as ``layer3.0.conv1.weight``."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def made_of(self, frozen: bool = False) -> dict[str, Any]:
        """All that features depend on: weights, preprocessing, and how timm builds the network.

        Args:
            frozen: Only what the output of ``prefix`` depends on.
        """
        adapted = self.adapted() if frozen else {}
        weights = {name: t for name, t in self.model.state_dict().items() if name not in adapted}
        return {
            "weights": weights,
            "pieces": self.pieces[: self._split] if frozen else self.pieces,
            "architecture": self.architecture,
            "args": self.model_args,
            "mean": self.mean,
            "std": self.std,
        }

    def prefix(self, images: Tensor) -> Tensor:
        """Normalise and pass the frozen layers; what has passed them before is returned as it is.

        Args:
            images: (B, 3, H, W) uint8, or the output of this function.

        Returns:
            The input of the first adapted layer, (B, C, h, w) or (B, N, C) for a ViT, without gradient; where no layer
            is adapted, the features (B, D).
        """
        if images.dtype != torch.uint8:
            return images.to(self.mean.dtype)
        with torch.no_grad():
            parts = [self._prefix(part) for part in portions(images, self.cached(images))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def cached(images: Tensor) -> int:
        """Images of a pass whose activations stay in a CPU's caches, where it is faster (experiments/RESULTS.md)."""
        return 16 if images.device.type == "cpu" else max(1, images.shape[0])

    def _prefix(self, images: Tensor) -> Tensor:
        x = self._normalized(images)
        x = self._compiled_frozen(self._frozen_layers(x), x)
        return x if self._split < len(self.pieces) else as_timm(self.model).forward_head(x, pre_logits=True)

    def _normalized(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=self._layout)

    def _frozen_layers(self, x: Tensor) -> list[Layer]:
        layers = self._layers(self.pieces[: self._split])
        modules = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))
        norms = any(isinstance(m, nn.BatchNorm2d) for m in modules.modules())
        if not norms or self.optimize not in ("folded", "compiled"):
            return layers
        # anew where weights were loaded or moved since: each tensor's place and number of changes
        state = [(t.data_ptr(), t._version) for t in (*modules.parameters(), *modules.buffers())]
        if self._frozen[0] != state:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._frozen = (state, fold_batchnorm(layers, x[:1].clone()))
        return self._frozen[1]

    def suffix(self, hidden: Tensor) -> Tensor:
        """Pass the adapted layers and pool: the output of ``prefix`` -> (B, D) features."""
        if self._split == len(self.pieces):
            return hidden
        x = self._compiled_adapted(self._layers(self.pieces[self._split :]), hidden)
        return cast(Tensor, as_timm(self.model).forward_head(x, pre_logits=True))

    def logits(self, hidden: Tensor) -> Tensor:
        """Pass the adapted layers and the pretrained classifier: the output of ``prefix`` -> (B, classes)."""
        x = run(self._layers(self.pieces[self._split :]), hidden)
        return cast(Tensor, as_timm(self.model).forward_head(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, or the output of ``prefix``, -> features (B, D)."""
        return self.suffix(self.prefix(images))

    @torch.no_grad()
    def walk(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Images (B, 3, H, W) uint8 through the layers: the name of each, as timm has it, and its output."""
        x = self._normalized(images)
        layers = [*self._frozen_layers(x), *self._layers(self.pieces[self._split :])]
        for name, layer in zip(self.pieces, layers, strict=True):
            x = layer(x)
            yield name, x

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever is asked: see the class."""
        return super().train(False)

    def _layers(self, names: list[str]) -> list[Layer]:
        return [getattr(self.model, name, None) or self.model.get_submodule(name) for name in names]


def portions(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Rows in parts of a size, to be worked on one after the other; a graph that is exported has all in one."""
    return [rows] if torch.compiler.is_exporting() else torch.split(rows, size)


def as_timm(model: nn.Module) -> Any:
    """The model as timm's classes have it; torch's annotations do not know their methods."""
    return model


def _expand(model: nn.Module, trunk: tuple[str, ...]) -> Iterator[str]:
    for name in trunk:
        if name.endswith("."):
            yield from (name + child for child, _ in model.get_submodule(name[:-1]).named_children())
        else:
            yield name

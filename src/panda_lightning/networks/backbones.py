"""A pretrained timm network, split into a frozen prefix and an adapted suffix."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from panda_lightning.networks.folding import Layer, fold_batchnorm, run
from panda_lightning.runtime.checkpoints import require_format
from panda_lightning.types import PandaError

Optimize = Literal["plain", "channels_last", "folded", "compiled"]

BUNDLED = Path(__file__).parents[1] / "weights"

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
        self.optimize = optimize
        self._layout = torch.contiguous_format if optimize == "plain" else torch.channels_last
        self.model = model.to(memory_format=self._layout)
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
        self._frozen: tuple[object, list[Layer]] = (None, [])
        self._compiled_frozen, self._compiled_adapted = (
            (torch.compile(run), torch.compile(run)) if optimize == "compiled" else (run, run)
        )
        cfg = as_timm(model).pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.train(False)

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
            return cls._from_checkpoint(name, adapt_stages, optimize)
        import timm  # slow to import, and not needed for --help

        source = f"local-dir:{BUNDLED / name}" if (BUNDLED / name).is_dir() else name
        overlay = None
        if weights is not None:
            if not Path(weights).is_file():
                raise PandaError(f"weights={weights} is not a file: name a file of weights for {name}.")
            if source.startswith(("local-dir:", "hf-hub:")):
                raise PandaError(
                    f"weights={weights} goes with the name of a timm architecture; backbone={name} has weights of its "
                    "own: copy the file to model.safetensors in a folder with its config.json, and name that folder."
                )
            overlay = {"file": weights}
        try:
            with _hub_offline_if_unreachable():
                architecture, model_args = _architecture(source)
                if architecture.startswith(("vit_", "deit", "flexivit")):
                    model_args["dynamic_img_size"] = True  # any image size: the position embedding is resampled
                model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # all that timm and the hub raise
            raise PandaError(_no_weights(name, error)) from error
        backbone = cls(model, adapt_stages, model_args, optimize)
        beside = Path(source.removeprefix("local-dir:")) / "fisher.safetensors"
        if source.startswith("local-dir:") and weights is None and beside.is_file():
            backbone.fisher_file = beside
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

    @classmethod
    def _from_checkpoint(cls, path: str, adapt_stages: int, optimize: Optimize) -> Self:
        if not Path(path).is_file():
            raise PandaError(f"backbone={path} is not a file: name a checkpoint of this project or a timm model.")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = require_format(checkpoint)["derived"].get("network")
        if config is None:
            raise PandaError(f"backbone={path} is not a checkpoint of a detector with a backbone.")
        backbone = cls.from_config(config, adapt_stages, optimize)
        prefix = "backbone.model."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        backbone.model.load_state_dict(state)
        return backbone

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
        return {"weights": weights, "pieces": self.pieces[: self._split] if frozen else self.pieces, **self._form}

    @property
    def _form(self) -> dict[str, Any]:
        return {"architecture": self.architecture, "args": self.model_args, "mean": self.mean, "std": self.std}

    def prefix(self, images: Tensor) -> Tensor:
        """Normalise and pass the frozen layers; what has passed them before is returned as it is.

        Args:
            images: (B, 3, H, W) uint8, or the output of this function.

        Returns:
            The input of the first adapted layer, (B, C, h, w) or (B, N, C) for a ViT, without gradient.
        """
        if images.dtype != torch.uint8:
            return images.to(self.mean.dtype)
        # A CPU works faster on activations that stay in its caches (experiments/RESULTS.md).
        rows = 16 if images.device.type == "cpu" else len(images)
        with torch.no_grad():
            parts = [self._prefix(part) for part in torch.split(images, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefix(self, images: Tensor) -> Tensor:
        x = self._normalized(images)
        return self._compiled_frozen(self._frozen_layers(x), x)

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


def as_timm(model: nn.Module) -> Any:
    """The model as timm's classes have it; torch's annotations do not know their methods."""
    return model


def _expand(model: nn.Module, trunk: tuple[str, ...]) -> Iterator[str]:
    for name in trunk:
        if name.endswith("."):
            yield from (name + child for child, _ in model.get_submodule(name[:-1]).named_children())
        else:
            yield name


def _architecture(source: str) -> tuple[str, dict[str, Any]]:
    """Timm's name of the architecture and the arguments beyond it that its config.json gives."""
    kind, _, rest = source.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(rest) / "config.json").read_text())
        return config["architecture"], dict(config.get("model_args") or {})
    if kind == "hf-hub":
        from timm.models import load_model_config_from_hf

        _, name, args = load_model_config_from_hf(rest)
        return name, dict(args or {})
    return source.partition(".")[0], {}


@contextmanager
def _hub_offline_if_unreachable() -> Iterator[None]:
    """Go straight to the hub's cache where there is no network: otherwise it retries for a minute first."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not any(name.lower() == "https_proxy" for name in os.environ):
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _no_weights(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the weights of backbone={name} cannot be had ({reason.rstrip('.')}). Name a model of timm.list_pretrained(); "
        "without network, copy the weights here and use backbone=local-dir:FOLDER (config.json + "
        "model.safetensors), or weights=FILE beside a timm name, or fill the cache of huggingface_hub (HF_HOME); "
        "backbone=panda_tiny is bundled and needs nothing."
    )

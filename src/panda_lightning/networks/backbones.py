"""A pretrained timm network, split into a frozen prefix and an adapted suffix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from panda_lightning.networks import checks
from panda_lightning.networks.adapting import Adapt, plain, stages, train_only
from panda_lightning.networks.folding import Computed, Optimize
from panda_lightning.networks.loading import built, pretrained
from panda_lightning.networks.splitting import Outputs, first_part, followed, second_part, stride

Pool = Literal["token", "avg", "both"]


class Backbone(nn.Module):
    """Pooled features of a timm network; the last stages are adapted, the other layers are frozen.

    A stage is a group of timm's ``group_matcher(coarse=True)``: layer1 to layer4 of a ResNet, blocks.0 to blocks.6 of a
    MobileNetV2, one block of a ViT. The last ``adapt_stages`` stages and everything between them and the classifier are
    adapted, including the scale and shift of BatchNorm. The network is always in eval mode, so BatchNorm uses its
    pretrained running statistics (PANDA section 3.2).

    Args:
        model: A timm model, with its classifier if it has one.
        adapt_stages: How many of the last stages to adapt, 0 for none.
        model_args: Arguments, besides the name, with which timm created it; kept for checkpoints.
        optimize: How the layers are computed; each option includes those before it, and features agree up to float32
            rounding. plain; channels_last: memory layout; folded: BatchNorm of the frozen layers folded into their
            convolutions; compiled: modules compiled by torch.compile, which can take minutes at the start.
        adapt: Which parameters of the adapted stages are trained: all (stages), scales and shifts of normalisation
            layers (norm), or a low-rank change added to the weights of each linear layer or 1 x 1 convolution (lora; Hu
            et al., ICLR 2022).
        lora_rank: Rank of this change.
        pool: Features of a token-based network: the class token (token), the mean of the patch tokens (avg), or both
            concatenated (both); None is timm's own pooling.

    Attributes:
        flow: How images pass through the network.
        num_features: Dimensions of the features.

    Raises:
        PandaError: If the network gives no pooled features, or what is asked for does not fit it.
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
        adapt: Adapt = "stages",
        lora_rank: int = 8,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        checks.require_features(model)
        self.model = model.eval()
        self.model_args = dict(model_args or {})
        self.pool = pool
        checks.require_pool(self, pool)
        named = stages(model)
        checks.require_stages(self, adapt_stages, len(named) - 1)
        last = sorted(name for names in named[-adapt_stages - 1 :] for name in names) if adapt_stages else []
        cfg = as_timm(model).pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(-1, 1, 1), persistent=False)
        self.train(False)
        self.flow, self.num_features = followed(model, last, self.pooled)
        train_only(model, self.flow.used, adapt, lora_rank)
        checks.require_trained(self, adapt, adapt_stages)
        self._seen: dict[tuple[int, ...], tuple[Sequence[int], Outputs]] = {}  # images behind each form of hidden
        self.compute(optimize)

    def compute(self, optimize: Optimize) -> None:
        """Compute the layers in another way, see the class."""
        self.optimize = optimize
        self._layout = torch.contiguous_format if optimize == "plain" else torch.channels_last
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.ndim == 4:  # a module's own ``to`` refuses networks with three-dimensional convolutions
                tensor.data = tensor.data.contiguous(memory_format=self._layout)
        self._computed = Computed(self.model, self.flow, optimize)

    @classmethod
    def pretrained(
        cls, name: str, weights: str | None = None, adapt_stages: int = 2, optimize: Optimize = "folded", **options: Any
    ) -> Self:
        """Load a network with its weights; never one with random weights.

        Args:
            name: A timm name with or without tag (``resnet152.tv_in1k``), ``local-dir:PATH``, ``hf-hub:ID``,
                ``panda_tiny`` (bundled), or a checkpoint file of this project (``PATH.ckpt``).
            weights: A file with weights for the named timm architecture, in place of timm's own.
            adapt_stages: How many of the last stages to adapt.
            optimize: See the class.
            options: adapt, lora_rank and pool, see the class.

        Raises:
            PandaError: If the name is unknown, the weights cannot be had, or the network does not serve.
        """
        model, model_args, fisher_file, pool = pretrained(name, weights)
        if pool and not options.get("pool"):
            rank_zero_info(f"Using pool={pool}, as in {name}.")
        backbone = cls(model, adapt_stages, model_args, optimize, **{**options, "pool": options.get("pool") or pool})
        backbone.fisher_file = fisher_file
        return backbone

    @classmethod
    def from_config(
        cls, config: dict[str, Any], adapt_stages: int, optimize: Optimize = "folded", **options: Any
    ) -> Self:
        """Build the network that ``config`` (see there) describes, for weights that are loaded later."""
        pool = options.pop("pool", None) or config.get("pool")  # unless asked otherwise, as it was adapted
        return cls(built(config), adapt_stages, config["model_args"], optimize, pool=pool, **options)

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
        return stride(self.model)

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
            **({"pool": self.pool} if self.pool else {}),
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by their places in ``model``."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def adapted(self) -> dict[str, Tensor]:
        """The weights that training changes by plain timm names, such as ``layer3.0.conv1.weight``.

        They are its parameters; with ``adapt=lora``, the sums of those weights and what was learned beside them.
        """
        found: dict[str, Tensor] = {}
        for name, p in self.trained().items():
            place, _, own = plain(name).rpartition(".")
            found[plain(name)] = p if name == plain(name) else getattr(self.model.get_submodule(place), own)
        return found

    @property
    def splits(self) -> bool:
        """Whether the frozen layers can be computed apart."""
        return self.flow.entry is None or self.flow.splits

    def prefix(self, images: Tensor) -> Tensor:
        """Normalise and pass the frozen layers; what has passed them before is returned as it is.

        Args:
            images: (B, 3, H, W) uint8, or the output of this function.

        Returns:
            The input of the first adapted layer, (B, C, h, w) or (B, N, C) for a ViT, without gradient; where no layer
            is adapted, the features (B, D); where the network does not split, the images.
        """
        if images.dtype != torch.uint8:
            return images.to(self.mean.dtype)
        if not self.splits:
            return images
        with torch.no_grad():
            parts = [self._prefix(part) for part in portions(images, self.cached(images))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def cached(images: Tensor) -> int:
        """Images of a pass whose activations stay in a CPU's caches, where it is faster (experiments/RESULTS.md)."""
        return 16 if images.device.type == "cpu" else max(1, images.shape[0])

    def _prefix(self, images: Tensor) -> Tensor:
        if self.flow.entry is None:
            return self._whole(images)
        x = self.normalized(images)
        hidden, forms = first_part(self.computing, self.flow, x)
        self._seen[tuple(hidden.shape[1:])] = (x.shape, forms)
        return hidden

    def _whole(self, images: Tensor) -> Tensor:
        return self.pooled(as_timm(self.computing).forward_features(self.normalized(images)))

    def normalized(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 as the network takes them."""
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=self._layout)

    def pooled(self, x: Tensor) -> Tensor:
        """What ``forward_features`` gives, as features (B, D)."""
        model = as_timm(self.model)
        if self.pool is None:
            pooled: Tensor = model.forward_head(x, pre_logits=True)
            return pooled
        kinds = {"token": x[:, 0], "avg": x[:, model.num_prefix_tokens :].mean(dim=1)}
        parts = kinds.values() if self.pool == "both" else [kinds[self.pool]]
        return torch.cat([getattr(model, "fc_norm", nn.Identity())(part) for part in parts], dim=1)

    @property
    def computing(self) -> nn.Module:
        """The network as ``optimize`` has it computed."""
        return self._computed.now()

    def _rest(self, model: nn.Module, hidden: Tensor) -> Any:
        """What ``forward_features`` gives of the output of ``prefix``."""
        if hidden.dtype == torch.uint8:
            return as_timm(model).forward_features(self.normalized(hidden))
        return second_part(model, self.flow, hidden, *self._seen[tuple(hidden.shape[1:])])

    def suffix(self, hidden: Tensor) -> Tensor:
        """Pass the adapted layers and pool: the output of ``prefix`` -> (B, D) features."""
        if hidden.dtype == torch.uint8:
            return self.pooled(self._rest(self.computing, hidden))
        return hidden if self.flow.entry is None else self.pooled(self._rest(self._computed.rest(), hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Pass the adapted layers and the pretrained classifier: the output of ``prefix`` -> (B, classes)."""
        logits: Tensor = as_timm(self.model).forward_head(self._rest(self.model, hidden))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, or the output of ``prefix``, -> features (B, D)."""
        if images.dtype != torch.uint8 or (torch.is_grad_enabled() and self.splits):
            return self.suffix(self.prefix(images))
        parts = [self._whole(part) for part in portions(images, self.cached(images))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever is asked: see the class."""
        super().train(False)
        for module in self.model.modules():
            if hasattr(module, "attention_bias_cache"):  # kept in eval mode, it would not follow its parameters
                module.training = True
        return self


def portions(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Rows in parts of a size, to be worked on one after the other; a graph that is exported has all in one."""
    return [rows] if torch.compiler.is_exporting() else torch.split(rows, size)


def as_timm(model: nn.Module) -> Any:
    """The model as timm's classes have it; torch's annotations do not know their methods."""
    return model

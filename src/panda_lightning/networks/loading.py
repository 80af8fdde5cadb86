"""Where a pretrained network comes from: timm, a folder, the hub, this package, or a checkpoint."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from panda_lightning.networks.adapting import summed
from panda_lightning.runtime.checkpoints import read_tensors, require_format
from panda_lightning.types import PandaError

BUNDLED = Path(__file__).parents[1] / "weights"


def pretrained(name: str, weights: str | None) -> tuple[nn.Module, dict[str, Any], Path | None, Any]:
    """Load a network with its weights; never one with random weights.

    Args:
        name: See Backbone.pretrained.
        weights: See there.

    Returns:
        The timm model, the arguments beyond its name with which timm made it, the file of the Fisher diagonal that lies
        beside its weights, if any, and how a checkpoint of this project pools its features, if it says so.

    Raises:
        PandaError: If the name is unknown, or the weights cannot be had.
    """
    import timm  # slow to import, and not needed for --help

    if name.endswith(".ckpt"):
        config, state = _in_checkpoint(name)
        model = built(config)
        model.load_state_dict(state)
        return model, config["model_args"], None, config.get("pool")
    source = _source(name)
    overlay = None
    if weights is not None:
        if not Path(weights).is_file():
            raise PandaError(f"weights={weights} is not a file: name a file of weights for {name}.")
        if source.startswith(("local-dir:", "hf-hub:")):
            raise PandaError(
                f"weights={weights} works only with the name of a timm architecture, but backbone={name} has its "
                "own weights: copy the file to model.safetensors in a folder with its config.json, and give "
                "that folder as backbone."
            )
        overlay = {"file": weights}
    try:
        with _hub_offline_if_unreachable():
            architecture, model_args = _architecture(source)
            if takes(architecture, "dynamic_img_size"):
                model_args["dynamic_img_size"] = True  # any image size: the position embedding is resampled
            model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # all that timm and the hub raise
        raise PandaError(_no_weights(name, error)) from error
    return model, model_args, fisher_beside(name, weights), None


def built(config: dict[str, Any]) -> nn.Module:
    """The timm network that Backbone.config describes, with weights that are to be loaded yet."""
    import timm

    names = ("num_classes", "pretrained_cfg")
    made: nn.Module = timm.create_model(
        config["architecture"], pretrained=False, **{name: config[name] for name in names}, **config["model_args"]
    )
    return made


@cache
def takes(architecture: str, argument: str) -> bool:
    """Whether timm's class of this architecture has such an argument."""
    import timm

    if not timm.is_model(architecture):
        return False
    with torch.device("meta"):  # no weights are made
        kinds = type(timm.create_model(architecture)).__mro__
    return any(argument in signature(kind.__init__).parameters for kind in kinds if issubclass(kind, nn.Module))


def fisher_beside(name: str, weights: str | None) -> Path | None:
    """The file of the Fisher diagonal that lies beside the weights of this name, if there is one."""
    source = _source(name)
    beside = Path(source.removeprefix("local-dir:")) / "fisher.safetensors"
    return beside if source.startswith("local-dir:") and weights is None and beside.is_file() else None


def _source(name: str) -> str:
    return f"local-dir:{BUNDLED / name}" if (BUNDLED / name).is_dir() else name


def _in_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Backbone.config and the weights of the network in a detector's checkpoint.

    Raises:
        PandaError: If it is none, or has no network.
    """
    if not Path(path).is_file():
        raise PandaError(f"backbone={path} is not a file: name a checkpoint of this project or a timm model.")
    checkpoint = read_tensors(path)
    config = require_format(checkpoint)["derived"].get("network")
    if config is None:
        raise PandaError(f"backbone={path} is not a checkpoint of a detector with a backbone.")
    prefix = "backbone.model."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return config, summed(state)


def made_of(backbone: Any, frozen: bool = False) -> dict[str, Any]:
    """All that a Backbone's features depend on but ``pool``: weights, preprocessing, and how timm builds the network.

    Args:
        backbone: The Backbone.
        frozen: Only what the output of its ``prefix`` depends on.
    """
    trained = backbone.trained() if frozen else {}
    weights = summed({name: t for name, t in backbone.model.state_dict().items() if name not in trained})
    return {
        "weights": dict(sorted(weights.items())),  # whose order is another with adapt=lora
        "to": backbone.flow.entry if frozen else None,
        "architecture": backbone.architecture,
        "args": backbone.model_args,
        "mean": backbone.mean,
        "std": backbone.std,
    }


def _architecture(source: str) -> tuple[str, dict[str, Any]]:
    """Timm's name of the architecture and the arguments beyond it that its config.json gives."""
    kind, _, rest = source.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(rest) / "config.json").read_text("utf-8"))
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
    if "weights_only" in reason:  # torch and timm then advise to run what is in the file
        reason = "the file contains more than tensors, and is refused"
    return (
        f"the weights of backbone={name} cannot be loaded ({reason.rstrip('.')}). Name a model of "
        "timm.list_pretrained(); without internet access, copy the weights here and use "
        "backbone=local-dir:FOLDER (config.json + model.safetensors), or weights=FILE with a timm name, or fill "
        "the cache of huggingface_hub (HF_HOME); backbone=panda_tiny is bundled and needs nothing."
    )

"""The Fisher-information diagonal of the pretraining task, which weights EWC."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from panda_lightning.backbones import Backbone
from panda_lightning.fingerprint import fingerprint
from panda_lightning.types import Batch, PandaError

Diagonal = dict[str, Tensor]  # by plain timm names of the adapted parameters


def estimate(
    backbone: Backbone,
    batches: Iterable[Batch],
    memory_mb: int = 1024,
    seed: int = 0,
) -> Diagonal:
    r"""Estimate the diagonal from images alone, labels drawn from the classifier's own softmax.

    .. math:: F_i = \frac1N \sum_n \left( \partial_{\theta_i} \log p_\theta(y_n | x_n) \right)^2,
              \quad y_n \sim p_\theta(\cdot | x_n)

    This is the Fisher information of the classifier on these images (gradients per sample, not of batch means).
    PANDA section 3.3 uses ImageNet's images and true labels instead.

    Args:
        backbone: A network with its pretrained classifier.
        batches: Each process its share of the images, on the backbone's device; index -1 is left out.
        memory_mb: Roughly the memory that the gradients of one chunk of samples may take, in MiB.
        seed: Label n depends on it and on the image's index only, not on batches or processes.

    Returns:
        Float32 tensors shaped like the adapted parameters, the same on every process.

    Raises:
        PandaError: If the backbone has no classifier.
    """
    require_classifier(backbone)
    params = {f"backbone.model.{name}": p.detach() for name, p in backbone.adapted().items()}
    classify = _Classify(backbone)
    size = sum(p.numel() for p in params.values())
    chunk = max(1, memory_mb * 2**20 // (4 * 3 * size))  # the gradients, their squares, and the work between

    def log_likelihood(params: Diagonal, hidden: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(classify, params, (hidden.unsqueeze(0),))
        return -F.cross_entropy(logits.float(), label.unsqueeze(0))

    per_sample = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    count = torch.zeros((), device=next(iter(total.values())).device)
    for batch in batches:
        real = batch["index"] >= 0
        if not real.any():
            continue
        with torch.no_grad():
            hidden = backbone.prefix(batch["image"][real])
            probabilities = backbone.logits(hidden).float().softmax(dim=1)
        labels = _draw(probabilities, batch["index"][real], seed)
        for some_hidden, some_labels in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True):
            for name, gradient in per_sample(params, some_hidden, some_labels).items():
                total[name] += gradient.square().sum(dim=0)
        count += real.sum()
    if dist.is_available() and dist.is_initialized():
        for tensor in (count, *total.values()):
            dist.all_reduce(tensor)
    return {name.removeprefix("backbone.model."): t / count for name, t in total.items()}


def require_classifier(backbone: Backbone) -> None:
    """Refuse a network that cannot draw labels."""
    if backbone.num_classes == 0:
        raise PandaError(
            f"fisher=auto draws labels from the pretrained classifier, and {backbone.architecture} has none here: "
            "use fisher=FILE or fisher=ones."
        )


class _Classify(nn.Module):
    """The adapted layers and the classifier as the forward that functional_call needs."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, hidden: Tensor) -> Tensor:
        return self.backbone.logits(hidden)


def _draw(probabilities: Tensor, index: Tensor, seed: int) -> Tensor:
    """Draw one class a row by inversion of its distribution function; row n's number comes from index n alone."""
    uniform = torch.tensor(
        [torch.rand((), generator=torch.Generator().manual_seed(seed * 2**32 + int(i))).item() for i in index]
    ).to(probabilities)
    below = probabilities.cumsum(dim=1) < uniform.unsqueeze(1)
    return below.sum(dim=1).clamp(max=probabilities.shape[1] - 1)


def ones(backbone: Backbone) -> Diagonal:
    """A diagonal of ones: EWC becomes an L2 pull to the pretrained weights."""
    return {name: torch.ones_like(p, dtype=torch.float32) for name, p in backbone.adapted().items()}


def load(path: str, backbone: Backbone) -> Diagonal:
    """Read a diagonal from a safetensors file or a ``.pth`` dictionary.

    Args:
        path: A file that maps plain timm names to tensors; it may hold frozen layers too.
        backbone: The network it must fit.

    Raises:
        PandaError: If the file is not there, or its names or shapes do not fit: it lists them.
    """
    if not Path(path).is_file():
        raise PandaError(f"fisher={path} is neither a file nor one of auto, ones.")
    if path.endswith(".safetensors"):
        found = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    known = dict(backbone.model.named_parameters())
    adapted = backbone.adapted()
    wrong = [f"{name} is missing" for name in adapted if name not in found]
    wrong += [f"{name} is not in {backbone.architecture}" for name in found if name not in known]
    wrong += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(known[name].shape)}"
        for name in found
        if name in known and found[name].shape != known[name].shape
    ]
    if wrong:
        raise PandaError(
            f"fisher={path} does not fit {backbone.architecture}: {'; '.join(wrong[:8])}"
            f"{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. Name a file made for this network, "
            "or use fisher=auto."
        )
    return {name: found[name].float() for name in adapted}


def save(diagonal: Diagonal, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step, so that a killed run leaves none or a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: t.cpu().contiguous() for name, t in diagonal.items()}, part, metadata=metadata)
    part.replace(path)


def cache_path(backbone: Backbone, dataset: Any) -> Path:
    """Where an estimate is kept: a name made of the weights, the adapted layers and the very pixels used."""
    words = f"per-sample, drawn labels, seed 0, {list(backbone.adapted())}"
    name = fingerprint(backbone.model.state_dict(), dataset, words)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "panda-lightning" / "fisher" / f"{backbone.architecture}-{name}.safetensors"

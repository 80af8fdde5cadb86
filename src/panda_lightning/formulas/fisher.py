"""The Fisher-information diagonal of the pretraining task, which weights EWC."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from panda_lightning.networks.adapting import is_low_rank, plain
from panda_lightning.networks.backbones import Backbone
from panda_lightning.networks.loading import made_of
from panda_lightning.runtime.checkpoints import read_tensors
from panda_lightning.runtime.derived import mapped
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.processes import sum_of_all
from panda_lightning.runtime.systems import wide_device
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch, PandaError

Diagonal = dict[str, Tensor]  # by plain timm names of the adapted parameters
Likelihood = Literal["labels", "features"]
DRAWN = {"labels": "drawn labels", "features": "features"}


class Estimator:
    r"""Adds up squared gradients of a log-likelihood, image by image or batch by batch.

    .. math:: F_i = \frac1N \sum_n \left( \partial_{\theta_i} \log p_\theta(y_n | x_n) \right)^2

    ``labels``: p is the classifier's. With true labels this is the empirical Fisher of PANDA section 3.3; with labels
    drawn from the classifier's own softmax, y_n ~ p(. | x_n), the Fisher information itself, which needs no labels.

    ``features``: p is a Gaussian of unit variance around the features f(x), so no classifier is needed, and the Fisher
    information is that of

    .. math:: F_i = \frac1N \sum_n E_z \left( \partial_{\theta_i} z^T f_\theta(x_n) \right)^2,
              \quad z \sim N(0, 1)

    of which one z is drawn for each image.

    With ``group`` B > 1 the gradient is that of the mean over B images, and N counts groups: about B times smaller,
    since a mean of B independent gradients has a B-th of their variance. Lambda means something only together with
    these conventions.

    Args:
        backbone: A network with its pretrained weights, on the images' device.
        group: Images behind each gradient that is squared.
        memory_mb: Roughly the memory that the gradients of one chunk of images may take, in MiB.
        seed: Of what is drawn; that of image n depends on it and on the image's index, not on batches or processes.
        of: See above.

    Raises:
        PandaError: If the backbone has no classifier for ``labels``.
    """

    def __init__(
        self, backbone: Backbone, group: int = 1, memory_mb: int = 1024, seed: int = 0, of: Likelihood = "labels"
    ) -> None:
        if of == "labels":
            require_classifier(backbone)
        self.backbone, self.group, self.seed, self.of = backbone, group, seed, of
        self.params = {name: p.detach() for name, p in backbone.adapted().items()}
        self._places = _places(backbone)
        size = sum(p.numel() for p in self.params.values())
        self.chunk = max(1, memory_mb * 2**20 // (4 * 3 * size))  # the gradients, their squares, and the work between
        self.total = {n: p.new_zeros(p.shape, dtype=_at_least_float32(p.dtype)) for n, p in self.params.items()}
        self.count = torch.zeros((), dtype=torch.float64, device=wide_device(backbone.mean.device))
        self._answer = _Answer(backbone, of)
        # on a CPU one image after the other is faster (experiments/RESULTS.md)
        self._vectorised = backbone.mean.is_cuda

    def add(self, batch: Batch, true_labels: bool = False) -> None:
        """Count the images of a batch; those of index -1 are left out, as is what is left of the last whole group.

        Args:
            batch: Its label is the number of the classifier's class where ``true_labels``.
            true_labels: Take the batch's labels in place of drawn ones.
        """
        index = batch["index"].tolist()
        real = [place for place, row in enumerate(index) if row >= 0]
        if not real:
            return
        images, outcomes, rows = batch["image"], batch["label"], [index[place] for place in real]
        if len(real) < len(index):
            images, outcomes = images[real], outcomes[real]
        with torch.no_grad():
            hidden = self.backbone.prefix(images)
            if self.of == "features":
                drawn = _normal(self.backbone.num_features, rows, self.seed)
                outcomes = drawn.to(self.backbone.mean, non_blocking=True)
            elif not true_labels:
                outcomes = _draw(self.backbone.logits(hidden).float().softmax(dim=1), rows, self.seed)
        size = self.chunk if self.group == 1 else self.group
        for some_hidden, some_outcomes in zip(torch.split(hidden, size), torch.split(outcomes, size), strict=True):
            if self.group == 1:
                self._add_each(some_hidden, some_outcomes)
            elif len(some_hidden) == self.group:
                self._add_mean(some_hidden, some_outcomes)

    def _add_each(self, hidden: Tensor, outcomes: Tensor) -> None:
        if self._vectorised:
            try:
                per_sample = vmap(grad(self._log_likelihood), in_dims=(None, 0, 0))
                gradients = per_sample(self.params, hidden.unsqueeze(1), outcomes.unsqueeze(1))
            except RuntimeError as error:  # an operation of this network has no vectorised form
                rank_zero_info(f"Gradients are computed for one image at a time: {str(error).splitlines()[0]}")
                self._vectorised = False
            else:
                for name, gradient in gradients.items():
                    self.total[name] += gradient.to(self.total[name].dtype).square().sum(dim=0)
                self.count += len(hidden)
                return
        for image, outcome in zip(torch.split(hidden, 1), torch.split(outcomes, 1), strict=True):
            self._add_mean(image, outcome)

    def _add_mean(self, hidden: Tensor, outcomes: Tensor) -> None:
        for name, gradient in grad(self._log_likelihood)(self.params, hidden, outcomes).items():
            self.total[name].addcmul_(gradient, gradient)
        self.count += 1

    def _log_likelihood(self, params: Diagonal, hidden: Tensor, outcomes: Tensor) -> Tensor:
        """Its mean over images, but for what has no gradient: of features, z = y - f is drawn, not y."""
        own = {f"backbone.model.{self._places[name]}": p for name, p in params.items()}
        answer: Tensor = functional_call(self._answer, own, (hidden,))
        answer = answer.to(_at_least_float32(answer.dtype))
        if self.of == "features":
            return (answer * outcomes).sum(dim=1).mean()
        return -F.cross_entropy(answer, outcomes)

    def sums(self) -> tuple[Diagonal, Tensor]:
        """Sums of the squares and their number over all processes, each of which must call it."""
        return {name: sum_of_all(t) for name, t in self.total.items()}, sum_of_all(self.count)

    def diagonal(self) -> Diagonal:
        """The estimate, shaped like the adapted parameters, the same on every process."""
        total, count = self.sums()
        return {name: (t / count).float() for name, t in total.items()}


def estimate(backbone: Backbone, batches: Iterable[Batch], memory_mb: int = 1024, seed: int = 0) -> Diagonal:
    """Estimate the diagonal from images alone: per image, labels drawn, or of features where there is no classifier.

    Args:
        backbone: See Estimator.
        batches: Each process its share of the images, on the backbone's device; index -1 is left out.
        memory_mb: See Estimator.
        seed: See Estimator.
    """
    estimator = Estimator(backbone, memory_mb=memory_mb, seed=seed, of=without_labels(backbone))
    for batch in batches:
        estimator.add(batch)
    return estimator.diagonal()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def without_labels(backbone: Backbone) -> Likelihood:
    """Of what a diagonal can be estimated for this network without anybody's labels."""
    return "labels" if backbone.num_classes else "features"


def require_classifier(backbone: Backbone) -> None:
    """Refuse a network that cannot draw labels."""
    if backbone.num_classes == 0:
        raise PandaError(
            f"labels need the pretrained classifier, but {backbone.architecture} has none here: use --labels features."
        )


def _places(backbone: Backbone) -> dict[str, str]:
    """Names of parameters in ``model`` by plain timm names; with ``adapt=lora`` those of weights are longer."""
    return {plain(name): name for name, _ in backbone.model.named_parameters() if not is_low_rank(name)}


class _Answer(nn.Module):
    """The adapted layers and what follows them as the forward that functional_call needs."""

    def __init__(self, backbone: Backbone, of: Likelihood) -> None:
        super().__init__()
        self.backbone, self.of = backbone, of

    def forward(self, hidden: Tensor) -> Tensor:
        return self.backbone.logits(hidden) if self.of == "labels" else self.backbone.suffix(hidden)


def _normal(columns: int, index: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers, (B, columns); those of row n come from index n alone."""
    return torch.stack([torch.randn(columns, generator=_generator(seed, i)) for i in index])


def _generator(seed: int, row: int) -> torch.Generator:
    """Of the numbers of one image; torch takes the last 32 bits of a seed alone, so both numbers must be in them."""
    return torch.Generator().manual_seed((row + seed * 0x9E3779B1) % 2**32)


def _draw(probabilities: Tensor, index: Sequence[int], seed: int) -> Tensor:
    """Draw one class a row by inversion of its distribution function; row n's number comes from index n alone."""
    drawn = torch.stack([torch.rand((), generator=_generator(seed, i)) for i in index])
    uniform = drawn.to(probabilities, non_blocking=True)
    below = probabilities.cumsum(dim=1) < uniform.unsqueeze(1)
    return below.sum(dim=1).clamp(max=probabilities.shape[1] - 1)


def from_source(source: str, backbone: Backbone, adapt_stages: int) -> Diagonal | None:
    """What ``PANDA(fisher=...)`` names; None where it must be estimated.

    Args:
        source: ``ones``; ``auto``, the diagonal beside the weights, if it is of all adapted layers; or a file.
        backbone: The network it must fit.
        adapt_stages: How many of its last stages are adapted.

    Raises:
        PandaError: If a file does not fit.
    """
    if source == "ones":
        return ones(backbone)
    if source != "auto":
        return load(source, backbone)
    beside = backbone.fisher_file
    if beside is not None and adapt_stages <= int(header(beside).get("adapt_stages", adapt_stages)):
        rank_zero_info(f"fisher=auto: using the diagonal stored with the weights, {beside}")
        return load(str(beside), backbone)
    return None


def kept_or_estimated(path: Path, backbone: Backbone, batches: Iterable[Batch], strategy: Strategy) -> Diagonal:
    """The estimate from images alone that an earlier run kept, or a new one, which is kept for later runs.

    Args:
        path: See cache_path; process 0 alone reads and writes it.
        backbone: See Estimator.
        batches: See estimate; not asked for where the file is there.
        strategy: By which the processes agree.
    """
    how = {
        "labels": "with labels drawn from the pretrained classifier; the paper uses ImageNet and its labels",
        "features": "from its features, because it has no classifier; ewc_weight 0.4 to 27 is then as strong as 350 "
        "with labels (experiments/RESULTS.md)",
    }
    of = without_labels(backbone)
    rank_zero_info(f"fisher=auto: estimated on the normal training images {how[of]}. Kept in {path}")
    kept = load(str(path), backbone) if strategy.is_global_zero and path.is_file() else None
    diagonal = strategy.broadcast(kept)  # another machine may have another home
    if diagonal is None:
        diagonal = estimate(backbone, batches)
        if strategy.is_global_zero:
            save(diagonal, path, {"estimator": f"per-sample, {DRAWN[of]}"})
    return mapped(diagonal, lambda tensor: tensor.cpu())


def ones(backbone: Backbone) -> Diagonal:
    """A diagonal of ones: EWC becomes an L2 pull to the pretrained weights."""
    return {name: torch.ones_like(p, dtype=torch.float32) for name, p in backbone.adapted().items()}


def load(path: str, backbone: Backbone) -> Diagonal:
    """Read a diagonal from a safetensors file of ours or of anybody, or a ``.pth`` dictionary such as the authors'.

    Args:
        path: A file that maps plain timm names to tensors; it may hold frozen layers too.
        backbone: The network it must fit, with its pretrained weights.

    Raises:
        PandaError: If the file is not there, or its names or shapes do not fit: it lists them.
    """
    if not Path(path).is_file():
        raise PandaError(f"fisher={path} is neither a file nor one of auto, ones.")
    scale = 1.0
    if path.endswith(".safetensors"):
        try:
            found, made = load_file(path), header(path)
        except (SafetensorError, OSError) as error:
            raise PandaError(f"fisher={path} is not a complete safetensors file ({error}): make it again.") from error
        scale = float(made.get("scale", 1.0))
        if made.get("weights", (own := weights_name(backbone))) != own:
            rank_zero_warn(
                f"fisher={path} was made for other weights of {made.get('backbone', 'a network of this form')} "
                "than these, so EWC protects the wrong ones. Make one with `panda fisher`."
            )
    else:
        found = read_tensors(path)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise PandaError(f"fisher={path} is not a dictionary of tensors by parameter name: give a file that is.")
        rank_zero_info(
            f"fisher={path} does not say how it was made. If from squared gradients of batches of 32, like the "
            "authors' file (as far as we know), use the published ewc_weight 1e4; if from squared gradients of "
            "single images, divide it by about 32."
        )
    known = {name: backbone.model.get_parameter(place) for name, place in _places(backbone).items()}
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
            f"fisher={path} does not fit {backbone.architecture}: "
            f"{'; '.join(wrong[:8])}{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. Give a file made "
            "for this network, or use fisher=auto."
        )
    diagonal = {name: found[name].float() * scale for name in adapted}
    faults = {
        "values that are NaN or infinite": any(not bool(t.isfinite().all()) for t in diagonal.values()),
        "negative values": any(bool((t < 0).any()) for t in diagonal.values()),
        "only zeros": not any(bool(t.any()) for t in diagonal.values()),
        "whole numbers, not floating-point ones": any(not found[name].is_floating_point() for name in adapted),
    }
    for fault in (name for name, there in faults.items() if there):
        raise PandaError(f"fisher={path} has {fault}, unlike squared gradients: make it with `panda fisher`.")
    return diagonal


def header(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def weights_name(backbone: Backbone) -> str:
    """A short name of the network, weights and preprocessing, which the files made from it carry."""
    return fingerprint(made_of(backbone))


def save(diagonal: Diagonal, path: Path, metadata: dict[str, str], half: bool = False) -> None:
    """Write a safetensors file in one step, so that a killed run leaves none or a whole one.

    Args:
        diagonal: Tensors by plain names.
        path: Of the file.
        metadata: What it says of itself.
        half: Write float16, divided by a power of two that the header names, so that small values are not lost.
    """
    tensors = {name: t.cpu().contiguous() for name, t in diagonal.items()}
    if half:
        largest = max(float(t.max()) for t in tensors.values())
        scale = 2.0 ** math.ceil(math.log2(largest / 2**15)) if largest > 0 else 1.0
        tensors = {name: (t / scale).half() for name, t in tensors.items()}
        metadata = {**metadata, "scale": repr(scale)}
    with new_file(path) as part:
        save_file(tensors, part, metadata=metadata)


def cache_path(backbone: Backbone, dataset: Any, precision: str) -> Path:
    """Where an estimate is kept: a name made of the network, the adapted layers and the very pixels used."""
    rule = (f"per-sample, {DRAWN[without_labels(backbone)]}, seed 0", list(backbone.adapted()), precision)
    name = fingerprint(rule, made_of(backbone), backbone.pool, dataset)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "panda-lightning" / "fisher" / f"{backbone.architecture}-{name}.safetensors"

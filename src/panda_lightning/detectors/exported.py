"""A detector as one graph, from the pixels of a picture to its score and p-value, and how it is read from its file."""

from collections.abc import Callable
from inspect import isabstract
from pathlib import Path
from typing import Any

import PIL
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call

from panda_lightning.arguments import subclasses
from panda_lightning.callbacks import SampleWiseEarlyStopping
from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.scoring import ready
from panda_lightning.formulas.conformal import flagged
from panda_lightning.networks.backbones import Backbone
from panda_lightning.pictures.resampling import fitted
from panda_lightning.pictures.view import View
from panda_lightning.runtime.agreement import made_with
from panda_lightning.runtime.checkpoints import read_tensors, require_whole
from panda_lightning.runtime.results import level_of
from panda_lightning.search.traced import TracedIndex
from panda_lightning.types import PandaError

OUTPUTS = ("score", "p_value", "anomalous", "map", "ses_score")
READING = (
    "images: uint8 RGB (batch, 3, height, width), rotated by the EXIF tag, grey repeated to three channels, "
    "transparency dropped, converted to 8 bits by the rule that preprocessing names as intensity: bits:N and "
    "auto change only files with more than 8 bits, window:LO,HI maps the values of every picture so that LO is "
    "0 and HI is 255"
)


def from_checkpoint(path: str | Path) -> Detector:
    """The detector of a checkpoint of this project, whatever its class, on the CPU and ready to score.

    Args:
        path: The checkpoint.

    Raises:
        PandaError: If there is none, it is broken, of an unknown class, or has no bank for its weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise PandaError(f"{path} is not a file: name a checkpoint, usually .../checkpoints/last.ckpt.")
    require_whole(path)
    name = str(made_with(path)[1]["model"].get("_class_path") or "")
    known = [cls for cls in subclasses(Detector) if not isabstract(cls)]
    cls: Any = next((cls for cls in known if name in _paths(cls)), None)
    if cls is None:
        raise PandaError(
            f"{path} is a checkpoint of {name or 'an unnamed class'}, which is not a known detector "
            f"({', '.join(sorted(cls.__name__ for cls in known))}): if it is your own class, import its module "
            "first."
        )
    detector: Detector = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    detector.require_learned()
    ready(detector)
    return detector


def _paths(cls: type[Any]) -> tuple[str, str]:
    """Where a class is defined, and where its package offers it."""
    return f"{cls.__module__}.{cls.__qualname__}", f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"


def in_float32(detector: Detector) -> Detector:
    """The detector, made to score in float32 whatever the precision of its run."""
    detector.origin = {**(detector.origin or {}), "precision": "32-true"}
    return detector


class Exported(nn.Module):
    """A detector for pictures of one size, from input to outputs, without control flow that depends on values.

    Args:
        path: The checkpoint.
        resizes: Whether the input may have any size and is resized, or must already have its final size.
        alpha: Level of the decision, see Calibration.level.
        half: Keep the bank in float16; for the weights see Half.

    Attributes:
        outputs: What ``forward`` returns, by name.
    """

    def __init__(self, path: str | Path, resizes: bool = True, alpha: float | None = None, half: bool = False) -> None:
        super().__init__()
        keep = _half if half else _as_it_is
        detector = self.detector = from_checkpoint(path)
        before = detector.precision
        if before == "32-true":
            calibration = detector.calibration
        else:
            rank_zero_info(f"The checkpoint's run scored in {before}; the file scores in float32, without p-values.")
            in_float32(detector)
            calibration = None
        for network in (m for m in detector.modules() if isinstance(m, Backbone)):
            network.compute("plain")
        self.calibration = None if calibration is None else torch.from_numpy(calibration.scores)
        self.kind = None if calibration is None else calibration.words
        self.level = level_of(calibration, alpha)
        view = View.of(detector.origin["view"])  # type: ignore[index]  # from_checkpoint has required it
        if view.sides is None:
            raise PandaError(
                "an exported file resizes all pictures to one size, but this detector was made with crop=none: "
                "make it with crop=center or squash, and image_size=[H, W] for pictures that are not square."
            )
        self.sides = view.sides
        self.view = view if resizes else None
        detector.trace_search(TracedIndex(), keep)
        self.ses = snapshots(detector, path, keep)
        self.requires_grad_(False)
        found = self.found(torch.zeros(1, 3, *self.sides, dtype=torch.uint8))
        self.outputs = [name for name in OUTPUTS if name in found]

    def facts(self) -> dict[str, Any]:
        """What a file's users should know: primitives."""
        detector, origin = self.detector, self.detector.origin or {}
        words = {**origin["view"], "resized inside": self.view is not None, "pillow": PIL.__version__}
        bank = getattr(detector, "index", None) or detector.bank
        bank = bank.get("support", ()) if isinstance(bank, dict) else bank  # OCSVM's; a user's own may be anything
        return {
            "detector": detector.method,
            "arguments": {k: v for k, v in detector.hparams.items() if k[0] != "_" and k not in detector.COMPUTING},
            "network": detector.whole().get("network"),
            "input": READING,
            "preprocessing": words,
            "bank_size": 0 if bank is None else len(bank),
            "bank_changes": dict(zip(("added", "taken out"), map(len, detector.bank_changes), strict=True)),
            "trained_on": {"data": origin["data"], **origin["problem"], "images": origin["normal training images"]},
            "calibration": self.kind or "none",
            "alpha": self.level,
        }

    def held(self) -> dict[str, Tensor]:
        """What must be in a file as it is: bank and calibration."""
        found = {} if self.calibration is None else {"calibration": self.calibration}
        index, bank = getattr(self.detector, "index", None), self.detector.bank
        if isinstance(index, TracedIndex):
            found["bank"] = index.bank
        elif isinstance(bank, dict):
            found |= {name: bank[name] for name in ("support", "alpha") if name in bank}
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Score pictures (B, 3, H, W) uint8."""
        found = self.found(images)
        return tuple(found[name] for name in self.outputs)

    def found(self, images: Tensor) -> dict[str, Tensor]:
        """The same by name, with whatever else the detector tells."""
        batch: Any = {"image": images if self.view is None else fitted(images, self.view)}
        found = self.detector.outputs(batch)
        if self.ses is not None:
            found["ses_score"] = self.ses.scores(self.detector, batch)
        if self.calibration is not None:
            below = (self.calibration >= found["score"].double().unsqueeze(1)).sum(dim=1)
            found["p_value"] = (1 + below).double() / (len(self.calibration) + 1)
            if self.level is not None:
                found["anomalous"] = flagged(found["p_value"], self.level)
        return found


class Half(nn.Module):
    """The graph of Exported with float16 weights, which are converted to float32 before use."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.exported = exported
        for tensor in exported.parameters():
            tensor.data = _half(tensor.data)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Score pictures (B, 3, H, W) uint8."""
        weights = {name: tensor.float() for name, tensor in self.exported.named_parameters()}
        found: tuple[Tensor, ...] = functional_call(self.exported, weights, (images,))
        return found


def kept_times(path: str | Path) -> dict[str, Any] | None:
    """The state of SES in a checkpoint whose run kept networks and banks of several times."""
    states = read_tensors(path, mmap=True).get("callbacks", {})
    state = next((s for name, s in states.items() if name.startswith(SampleWiseEarlyStopping.__name__)), None)
    return state if state and state["kept"] else None


def snapshots(
    detector: Detector, path: str | Path, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> SampleWiseEarlyStopping | None:
    """SES with the networks and banks of all kept times, if they are there."""
    state = kept_times(path)
    if state is None:
        return None
    ses = SampleWiseEarlyStopping(keep_snapshots=True)
    ses.load_state_dict(state)
    try:
        ses.load(detector, path, keep)
    except PandaError as error:
        rank_zero_warn(f"The file has no ses_score: {error}")
        return None
    return ses


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _half(tensor: Tensor) -> Tensor:
    """Float16 of what is large; scales, shifts and statistics, which are small, stay as they are."""
    if tensor.ndim < 2 or tensor.dtype != torch.float32:
        return tensor
    found = tensor.half()
    if not bool(found.isfinite().all()):
        raise PandaError(
            f"a tensor of shape {tuple(tensor.shape)} has values up to {float(tensor.abs().max()):g}, beyond float16's "
            "65504: leave --half out."
        )
    return found

"""In which precision scores are computed, and what a run in half precision does to weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn


def of_scores(detector: Any) -> str:
    """Lightning's name of the precision, see Detector.precision."""
    trainer = detector._trainer
    running = trainer is not None and trainer.state.status == "running"
    asked = str(trainer.precision) if running else "32-true"
    own = running and (trainer.state.fn == "fit" or not (detector._keeps or trainer.state.fn == "predict"))
    if detector.origin is None or own or asked != "32-true":
        return asked
    before = str(detector.origin["precision"])
    return before if before.endswith("mixed") else "32-true"


def computed_as(detector: Any) -> AbstractContextManager[Any]:
    """Autocast where the detector's precision is mixed; weights of half precision are computed in float32."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(detector.precision)
    return nullcontext() if kind is None else torch.autocast(detector.device.type, kind)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those too that a checkpoint leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def keep_wide(detector: Any, stage: str) -> None:
    """Remember weights before a run in half precision alone, in which Lightning narrows them for good."""
    precision = str(detector.trainer.precision)
    if precision not in ("16-true", "bf16-true"):
        return
    if stage == "fit":
        rank_zero_warn(
            f"precision {precision} keeps the weights themselves in half precision, which loses small steps: use "
            "bf16-mixed, which trains like float32."
        )
    detector._wide = {} if stage == "fit" else {name: t.clone() for name, t in own_tensors(detector).items()}


def widen(detector: Any) -> None:
    """After a run in half precision: trained weights as they are, others as they were before it."""
    if detector._wide is not None:
        detector.float()
        own = own_tensors(detector)
        for name, value in detector._wide.items():
            own[name].data = value.to(detector.device)
        detector._wide = None

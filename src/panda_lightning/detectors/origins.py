"""What a detector's state was derived from: compared when a run begins, so that state is kept, forgotten or refused."""

import os
from inspect import isabstract
from typing import Any
from uuid import uuid4

import torch
from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.detectors import checks
from panda_lightning.detectors.precision import own_tensors
from panda_lightning.runtime.agreement import require_same
from panda_lightning.runtime.derived import Derived


def compare(detector: Any, data: Any) -> None:
    """Take the origin of this run, or refuse it, see Detector.accept."""
    trainer, keeps = detector.trainer, detector._keeps
    fitting = trainer.state.fn == "fit"
    if detector.learns and not fitting:
        detector.require_learned()
    if fitting and not detector._restored:
        checks.require_new_trainer(trainer)
    now = {**data.origin(training=fitting or not keeps), "settings": settings(detector)}
    now["precision"] = str(trainer.precision)
    detector._now = now
    if keeps and detector.origin is not None:
        _keep(detector, now, fitting)
        return
    if detector.origin != now:
        detector.derived.clear()
        detector._ready = None
        detector.origin, detector.run_id = now, trainer.strategy.broadcast(uuid4().hex[:8])
    if fitting and detector._moved:
        rank_zero_info(
            f"{detector.method} starts again from its initial weights; to continue training, give ckpt_path."
        )
        detector.start_anew()
    elif fitting:
        changing = ((name, p) for name, p in detector.named_parameters() if p.requires_grad)
        detector._fresh = {name: t.detach().clone() for name, t in (*changing, *detector.named_buffers())}


def _keep(detector: Any, now: dict[str, Any], fitting: bool) -> None:
    before, what = detector.origin, "normal training images"
    require_same(detector.method, before, now, fitting, detector.learns)
    if detector.precision != now["precision"]:
        rank_zero_info(f"Scores are computed in {detector.precision}, as in the run that saved the checkpoint.")
    if not fitting and now[what] not in (None, before[what]):
        rank_zero_info(f"{detector.method} keeps what it learned from {before['data']}'s normal images.")


def start_anew(detector: Any) -> None:
    """Give the networks the weights that they had before training."""
    if detector._fresh is None:
        for name, network in detector.fresh_networks().items():
            getattr(detector, name).load_state_dict(network.state_dict())
    else:
        own = own_tensors(detector)
        with torch.no_grad():
            for name, value in detector._fresh.items():
                own[name].copy_(value)
    detector._moved = False


def settings(detector: Any) -> dict[str, Any]:
    """The arguments as they are now, but for those that change nothing that is derived."""
    free = (*detector.COMPUTING, *detector.SCORING, "backbone", "weights")  # weights are compared themselves
    return {name: value for name, value in arguments(detector).items() if name not in free}


def arguments(detector: Any) -> dict[str, Any]:
    """The constructor's arguments; attributes of their names may have been changed since."""
    found = {}
    for name, given in detector.hparams.items():
        own = getattr(detector, name, given)
        plain = own is None or isinstance(own, str | int | float | list | tuple)
        found[name] = own if plain and not isinstance(getattr(type(detector), name, None), Derived) else given
    return found


def kind(detector: Any) -> str:
    """The class whose state this is: where a user's own adds to a method of this package, that method's."""
    ours = (c for c in type(detector).__mro__ if c.__module__.startswith(__package__) and not isabstract(c))
    return next(ours, type(detector)).__name__


def describe(detector: Any, checkpoint: dict[str, Any]) -> None:
    """Write class and arguments into a checkpoint, beside the state that its weights belong to."""
    # the command line, which reads the class there, has written it already where it made this object
    name = f"{type(detector).__module__}.{type(detector).__qualname__}"
    checkpoint.get("hyper_parameters", {}).setdefault("_class_path", name)
    checkpoint.get("hyper_parameters", {}).update(arguments(detector))
    if "PL_GLOBAL_SEED" in os.environ:  # where Lightning's seed_everything leaves it
        checkpoint["seed"] = int(os.environ["PL_GLOBAL_SEED"])
    state = checkpoint["state_dict"]
    if state["_extra_state"]["derived"].get("run_id") != detector.run_id:  # weights averaged by a copy of this object
        state["_extra_state"] = detector.get_extra_state()

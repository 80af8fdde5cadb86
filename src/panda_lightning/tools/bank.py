"""``panda bank add | remove | list``: normal images join a detector's bank, or leave it, without the old images."""

from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from rich import get_console

from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.detectors import banks
from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.exported import from_checkpoint, kept_times
from panda_lightning.pictures.loose import LISTS, listed_paths
from panda_lightning.runtime.checkpoints import WholeCheckpointIO, read_tensors
from panda_lightning.runtime.whole import require_new
from panda_lightning.types import PandaError

HELP = "Add normal images to a checkpoint's bank, remove some from it, or list them; nothing is trained."
TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "loops")  # what only a run that goes on would need


def arguments(parser: OneSentenceParser) -> None:
    """Accept what to do with which bank."""
    add = parser.add_argument
    add("verb", type=Literal["add", "remove", "list"], help="What to do.")
    add("--ckpt_path", type=Path, required=True, help="The checkpoint of a detector; it is not changed.")
    add("--images", type=str | None, default=None, help="To add: a folder, a file, a pattern or a list of paths.")
    add("--like", type=str | None, default=None, help="To remove: a name or pattern (*/7*.jpg), or a .txt of them.")
    add("-o", "--output", type=Path | None, default=None, help="The new checkpoint.")


def run(config: Namespace) -> int:
    """Write the new checkpoint and say what has changed, or print the names."""
    needs = {"add": ("images", "output"), "remove": ("like", "output"), "list": ()}[config.verb]
    for name in ("images", "like", "output"):
        if (name in needs) != bool(config[name]):
            raise PandaError(f"`panda bank {config.verb}` {'needs' if name in needs else 'takes no'} --{name}.")
    if config.output is not None:
        require_new(config.output)
    detector = from_checkpoint(config.ckpt_path)
    if config.verb == "list":
        print(*banks.names(detector), sep="\n")
        return 0
    calibrated, held = detector.calibration is not None, detector.held_out is not None
    if config.verb == "add":
        changed = f"{len(banks.add(detector, config.images))} added"
    else:
        changed = f"{len(banks.remove(detector, _patterns(config.like)))} removed"
    require_new(config.output)  # once more: work takes time
    save(detector, config.ckpt_path, config.output)
    said = f"{config.output}: {changed}, {len(banks.names(detector))} normal images in its bank."
    if detector.steps_trained:
        said += " The adapted weights and their centre do not change: they still come from the images of the training."
    if calibrated:
        follows = detector.calibration is not None
        why = (
            f"{detector.method} does not keep features of the images held back for them" if held else "too few are left"
        )
        said += " The p-values are updated." if follows else f" There are no p-values any more: {why}."
    if kept_times(config.ckpt_path) is not None:
        said += " The snapshots of SES are left out, because their banks are the old ones."
    get_console().print(said, soft_wrap=True, markup=False, highlight=False)
    return 0


def _patterns(like: str) -> list[str]:
    return sorted(listed_paths(like)) if Path(like).suffix in (*LISTS, ".csv") and Path(like).is_file() else [like]


def save(detector: Detector, before: Path, after: Path) -> None:
    """Write a checkpoint as it was, but with the detector's state of now; no training can go on from it."""
    checkpoint = read_tensors(before)
    for key in TRAINING:
        checkpoint.pop(key, None)
    checkpoint["state_dict"]["_extra_state"] = detector.get_extra_state()
    WholeCheckpointIO().save_checkpoint(checkpoint, after)

"""What a checkpoint was made with, and whether a configuration or other data agree with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.runtime.checkpoints import newest_whole, read_tensors, require_format
from panda_lightning.types import PandaError


def made_with(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The extra state of a detector's checkpoint; the arguments of model and data, class included, and the run's."""
    checkpoint = read_tensors(path, mmap=True)
    state = require_format(checkpoint)
    keys = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    made = {part: dict(checkpoint.get(key, {})) for part, key in keys.items()}
    made["run"] = {"seed": checkpoint.get("seed")}
    origin = state["derived"].get("origin") or {}
    made["data"].setdefault("_class_path", origin.get("data"))  # where it was made in Python
    return state, made


def differences(wanted: Any, made: dict[str, dict[str, Any]], free: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Settings in which a configuration differs from what a checkpoint was made with.

    Args:
        wanted: A configuration of the command line, whole or what was asked for.
        made: See made_with.
        free: The parts to compare, model or data, and the arguments of each that change no result.
    """
    found = []
    for part, names in free.items():
        config = wanted.get(part)
        if config is None:
            continue
        name, before = (
            str(value or "").split(".")[-1] for value in (config.get("class_path"), made[part].get("_class_path"))
        )
        if name and before and name != before:
            found.append(f"{part} {name}, not {before}")
            continue
        for key, value in dict(config.get("init_args") or {}).items():
            if key in made[part] and key not in names and not same(value, made[part][key]):
                found.append(f"{part}.{key} {value}, not {made[part][key]}")
    return found


def newest_alike(config: Any, free: Mapping[str, tuple[str, ...]], folders: list[Path]) -> str | None:
    """The newest whole checkpoint of an earlier run of this very configuration.

    Args:
        config: Of the command line, whole.
        free: See differences; without parts any checkpoint is alike.
        folders: Where to look.
    """
    others: list[str] = []
    free = {part: tuple(name for name in names if name != "root") for part, names in free.items()}

    def alike(path: Path) -> bool:
        if not free:
            return True
        try:
            made = made_with(path)[1]
            found = differences(config, made, free)
            seed, before = config.get("seed_everything"), made["run"]["seed"]
            if isinstance(seed, int) and not isinstance(seed, bool) and before not in (None, seed):
                found.append(f"seed_everything {seed}, not {before}")
        except PandaError as error:  # somebody else's, or an older version's
            others.append(str(error))
            return False
        others.extend([f"{path} has other settings: {'; '.join(found)}"] if found else [])
        return not found

    path = newest_whole(*folders, suits=alike)
    other = f" ({others[0]})" if others else ""
    rank_zero_info(f"ckpt_path=last: {path or f'there is no checkpoint of this configuration yet{other}'}")
    return None if path is None else str(path)


def same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same, however a file, a flag or Python writes them."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (None not in (one, other) and str(one) == str(other))


FOLLOW = {"resize", "multiple"}  # settings that others bring along: not worth words where those differ


def require_same(method: str, before: dict[str, Any], now: dict[str, Any], training: bool, learns: bool) -> None:
    """Refuse data and arguments that do not suit what was derived with others.

    Args:
        method: What the detector is called.
        before: The origin of its state.
        now: What this run offers.
        training: Whether training goes on, for which all must be the same.
        learns: Whether it is training that arguments shape, or, without, the bank.
    """
    elsewhere = ["view", *(["problem"] if before["data"] == now["data"] else []), *([] if learns else ["settings"])]
    kinds = [kind for kind in before if kind != "files"] if training else elsewhere
    differences: list[str] = []
    for kind in kinds:
        one, other = before[kind], now[kind]
        if not isinstance(one, dict):
            one, other = {kind: one}, {kind: other}
        pairs = ((key, value, other.get(key)) for key, value in one.items())
        found = {key: f"{key}={here}, not {value}" for key, value, here in pairs if not same(here, value)}
        differences += [said for key, said in found.items() if not found.keys() - FOLLOW or key not in FOLLOW]
    if differences:
        advice = (
            "to resume, use the old ones; to train with these, start a new run"
            if training
            else "use the old ones, or train again"
        )
        raise PandaError(
            f"{method} was made with data or arguments other than these ({'; '.join(differences)}): {advice}."
        )

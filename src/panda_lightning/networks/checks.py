"""What a network cannot do is refused in a sentence."""

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.types import PandaError


def require_features(model: Any) -> None:
    """Refuse a timm network that does not pool features.

    Raises:
        PandaError: Naming what it lacks.
    """
    head = getattr(model, "forward_head", None)
    if head is None or "pre_logits" not in signature(head).parameters or not hasattr(model, "forward_features"):
        raise PandaError(
            f"a timm {type(model).__name__} gives no pooled features (it has no forward_head with pre_logits): "
            "choose another network of timm.list_models()."
        )


def require_pool(backbone: Any, pool: str | None) -> None:
    """Refuse to choose among tokens where there are none, or none of a class."""
    model = backbone.model
    tokens = int(getattr(model, "num_prefix_tokens", None) or 0)
    if pool is not None and not (tokens and (pool == "avg" or getattr(model, "cls_token", None) is not None)):
        raise PandaError(
            f"pool={pool} chooses among tokens, but {backbone.architecture} has no class token: leave pool out "
            "to use timm's own pooling."
        )


def require_stages(backbone: Any, wanted: int, there: int) -> None:
    """Refuse to adapt more stages than there are."""
    if not 0 <= wanted <= there:
        raise PandaError(
            f"adapt_stages={wanted} does not fit {backbone.architecture}, which has {there} stages: choose 0 to "
            f"{there}."
        )


def require_trained(backbone: Any, adapt: str, stages: int) -> None:
    """Refuse a kind of adaptation for which the last stages have no parameters."""
    if stages and not backbone.trained():
        what = "norms with a scale and a shift" if adapt == "norm" else "layers"
        raise PandaError(
            f"adapt={adapt} trains {what}, but the last {stages} stages of {backbone.architecture} have none: "
            "choose adapt=stages, or more stages."
        )


def require_size(backbone: Any, name: str, sides: Sequence[int]) -> None:
    """Refuse sides of images, in pixels, that a network cannot take.

    Raises:
        PandaError: Naming the sides nearest to it.
    """
    only = _only_side(backbone.model)
    if only is not None:
        if set(sides) != {only}:
            raise PandaError(
                f"{name}={_said(sides)} is not the only size that {backbone.architecture} accepts: choose {only}."
            )
        return
    patch = patch_of(backbone.model)
    least = max(backbone.stride, patch)
    for side in sides:
        if side < least:
            raise PandaError(
                f"{name}={_said(sides)} is smaller than the stride of {backbone.architecture}: choose {least} or more."
            )
        if side % patch:
            below = side // patch * patch
            raise PandaError(
                f"{name}={_said(sides)} is not a multiple of the {patch} px patches of {backbone.architecture}: "
                f"choose {below} or {below + patch}."
            )


def require_several_sizes(backbone: Any) -> None:
    """Refuse images that keep their own shapes for a network that takes one.

    Raises:
        PandaError: Naming it.
    """
    if _only_side(backbone.model) is not None:
        raise PandaError(
            f"crop=none gives images of different sizes, but {backbone.architecture} needs one size: choose "
            "crop=center or squash, or another network."
        )


def may_be_cached(backbone: Any, dataset: Any) -> bool:
    """Whether what the frozen layers make of a data set's images can be kept; says why not."""
    if not backbone.splits:
        _say_once(
            f"{backbone.architecture} cannot be computed in two parts, so its frozen layers are not cached: "
            "images pass through all layers each time."
        )
    elif dataset.kinds is not None:
        rank_zero_info(
            f"The frozen layers' output of {len(dataset)} images is not cached, because they have different "
            "sizes: these images pass through all layers each time."
        )
    return backbone.splits and dataset.kinds is None


@cache
def _say_once(line: str) -> None:
    rank_zero_info(line)


def _only_side(model: Any) -> int | None:
    """The side in pixels of the images that a network takes; None where it takes any."""
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    fixed = model.pretrained_cfg.get("fixed_input_size") and strict
    return int(model.pretrained_cfg["input_size"][-1]) if fixed else None


def patch_of(model: Any) -> int:
    """Pixels of the patches that an image must be cut into without a rest; 1 where patches overlap."""
    embed = getattr(model, "patch_embed", None)
    patch, step = getattr(embed, "patch_size", None), getattr(getattr(embed, "proj", None), "stride", None)
    side, step = (one[0] if isinstance(one, Sequence) else one for one in (patch, step))
    return 1 if side is None or step not in (None, side) else int(side)


def _said(sides: Sequence[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else str(list(sides))

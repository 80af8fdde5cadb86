"""Types and devices of what a GPU computes, with autocast: torch's fake tensors say them without a GPU.

They hold no values, so nothing here may depend on any; see tests/test_cuda.py for what does. A backward pass needs one.
"""

from contextlib import contextmanager

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import panda_lightning as panda
from panda_lightning.detectors.steps import linear
from panda_lightning.formulas import losses
from panda_lightning.networks import augment
from panda_lightning.search.traced import TracedIndex

HALVES = [torch.float16, torch.bfloat16]


class Fake(FakeTensorMode):
    """Networks are copied, which must not copy this."""

    def __deepcopy__(self, memo):
        return self


class Types(TorchDispatchMode):
    """The types of floating-point results, by operation."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.found.setdefault(leaf.dtype, set()).add(func.__name__)
        return out

    def halves(self):
        return set().union(*(self.found.get(dtype, set()) for dtype in HALVES))


@contextmanager
def autocast(dtype):
    """torch.autocast refuses to begin where there is no GPU; what it sets can be set."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def on_gpu(module):
    """A network as it would lie there, and the mode in which it can be computed."""
    mode = Fake()

    def there(value):
        fake = mode.from_tensor(value.detach())
        with mode:
            return fake.to("cuda:0")

    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = None if value is None else torch.nn.Parameter(there(value), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else there(value)
    return mode


def images(*shape):
    return torch.zeros(*shape, dtype=torch.uint8, device="cuda:0")


def features(*shape):
    return torch.ones(*shape, device="cuda:0")


def test_what_would_need_values_or_mixes_devices_fails_here():
    with Fake():
        there = features(4)
        with pytest.raises(Exception, match="same device|device"):
            there + torch.ones(4)
        for work in (there.sum().item, lambda: bool((there > 0).all()), there.nonzero, there.numpy):
            with pytest.raises(Exception):  # noqa: B017, PT011  # each of another kind
                work()
        with autocast(torch.float16):
            assert (there.view(2, 2) @ there.view(2, 2)).dtype == torch.float16


@pytest.mark.parametrize("adapt", ["stages", "norm", "lora"])
@pytest.mark.parametrize("dtype", HALVES)
def test_layers_are_of_half_precision_and_features_are_not(dtype, adapt):
    detector = panda.PANDA("panda_tiny", adapt="stages" if adapt == "lora" else adapt)
    if adapt == "lora":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4)
        detector.backbone = panda.Backbone(model, 2, adapt=adapt)
    else:
        detector.load_backbone()
    detector.backbone.compute("channels_last")  # folding swaps parameters, which fake ones do not allow
    with on_gpu(detector), autocast(dtype), Types() as types:
        hidden = detector.backbone.prefix(images(3, 3, 32, 32))
        found = [detector.embed({"image": one}) for one in (images(3, 3, 32, 32), hidden)]
    assert hidden.dtype == dtype or adapt == "lora"  # whose blocks begin with a sum in float32
    assert {(one.dtype, one.device.type) for one in found} == {(torch.float32, "cuda")}
    assert any("conv" in name or "mm" in name for name in types.halves())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [panda.SPADE, panda.PatchCore])
@pytest.mark.parametrize("tile", [None, 32])
def test_maps_are_float32(kind, tile, dtype):
    detector = kind("panda_tiny", tile=tile)
    detector.load_backbone()
    detector.backbone.compute("channels_last")
    with on_gpu(detector), autocast(dtype):
        rows = detector.embed({"image": images(2, 3, 64, 64)})
        with Types() as types:
            smooth = detector._smoothed(features(2, 64, 64))
    assert {(one.dtype, one.device.type) for one in (rows, smooth)} == {(torch.float32, "cuda")}
    assert not types.halves()


FULL = {  # what is computed in full precision, whatever the run's
    "compactness": lambda: losses.compactness(features(4, 6), features(6)),
    "EWC": lambda: losses.ewc([features(3, 2)], [features(3, 2)], [features(3, 2)]),
    "EWC of half weights": lambda: losses.ewc([features(3).half()], [features(3).half()], [features(3)]),
    "mean-shifted": lambda: losses.mean_shifted(features(4, 6), features(4, 6), features(6)),
    "soft boundary": lambda: losses.soft_boundary(features(4), features(()), 0.1),
    "logits": lambda: linear(torch.nn.Linear(6, 2, device="cuda:0"), features(4, 6)),
    "logits of half features": lambda: linear(torch.nn.Linear(6, 2, device="cuda:0"), features(4, 6).half()),
    "random view": lambda: augment.random_view(images(2, 3, 16, 16), features(2, augment.VIEW_DRAWS)),
    "crop": lambda: augment.crop_and_flip(images(2, 3, 16, 16), features(2, augment.CROP_DRAWS), 4),
    "turn": lambda: augment.turn_and_shift(images(2, 3, 16, 16), *(images(2).long() for _ in range(3))),
    "contrast": lambda: augment.contrast_normalize(images(2, 3, 16, 16)),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FULL)
def test_nothing_of_it_is_computed_in_half_precision(name, dtype):
    with Fake(), autocast(dtype), Types() as types:
        found = FULL[name]()
    assert (found.device.type, found.dtype) in (("cuda", torch.float32), ("cuda", torch.uint8))
    assert types.halves() <= {"_to_copy.default", "detach.default"}  # of what was given in it


def test_the_exported_search_is_in_float32():
    with Fake(), autocast(torch.float16), Types() as types:
        distance, row = TracedIndex().fit(features(50, 6)).search(features(4, 6), 3)
    assert (distance.dtype, distance.device.type, row.device.type) == (torch.float32, "cuda", "cuda")
    assert not types.halves()

import operator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from panda_lightning import KNNIndex
from panda_lightning.runtime.float32 import full_float32
from tests.search.test_knn import DEVICES, clusters, plain

NEWER = hasattr(torch.backends, "fp32_precision")


needs_newer = pytest.mark.skipif(not NEWER, reason="torch >= 2.9")


def put(name: str, value: str) -> None:
    if name == "older":
        torch.set_float32_matmul_precision(value)
    elif name == "mkldnn":
        torch.backends.mkldnn.set_flags(_fp32_precision=value)  # its attribute sets that of all (torch 2.14)
    else:
        parent = operator.attrgetter(name)(torch.backends) if name else torch.backends
        parent.fp32_precision = value


def readings() -> list[str]:
    names = ["", "cudnn", "cudnn.conv", "cuda.matmul", "mkldnn", "mkldnn.matmul", "mkldnn.conv"] if NEWER else []
    found = [(operator.attrgetter(n)(torch.backends) if n else torch.backends).fp32_precision for n in names]
    for older in (torch.get_float32_matmul_precision, lambda: str(torch.backends.cuda.matmul.allow_tf32)):
        try:
            found.append(older())
        except RuntimeError:  # set by both
            found.append("mixed")
    return found


@pytest.fixture
def reset():
    def call():
        put("older", "highest")
        for name in ("", "cudnn", "cuda.matmul", "mkldnn", "mkldnn.matmul") if NEWER else ():
            put(name, "none")

    call()
    yield call
    call()


SETTINGS = [
    [],
    [("older", "high")],
    [("older", "medium")],
    *(
        pytest.param(setting, marks=needs_newer)
        for setting in (
            [("", "tf32")],
            [("", "bf16")],
            [("", "ieee"), ("cuda.matmul", "tf32"), ("mkldnn.matmul", "bf16")],
            [("cuda.matmul", "tf32")],
            [("mkldnn.matmul", "bf16")],
            [("mkldnn", "bf16")],
            [("cudnn", "tf32")],
            [("cudnn", "tf32"), ("cuda.matmul", "tf32")],
            [("", "tf32"), ("cudnn", "tf32"), ("cuda.matmul", "ieee")],
            [("", "bf16"), ("mkldnn", "bf16"), ("mkldnn.matmul", "bf16"), ("cudnn", "ieee"), ("cuda.matmul", "tf32")],
            [("older", "high"), ("cuda.matmul", "ieee"), ("mkldnn.matmul", "bf16")],
            [("", "tf32"), ("older", "medium")],
        )
    ),
]


LATER = [
    ("", "tf32"),
    ("", "bf16"),
    ("mkldnn", "ieee"),
    ("", "ieee"),
    ("cudnn", "tf32"),
    ("", "none"),
    ("cudnn", "none"),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_products_are_of_full_precision_and_every_setting_stays_as_it_was(settings, device, reset):
    def afterwards() -> list[list[str]]:
        """What is read, now and as what settings follow is changed."""
        found = [readings()]
        for setting in LATER if NEWER else ():
            put(*setting)
            found.append(readings())
        return found

    for setting in settings:
        put(*setting)
    expected = afterwards()
    for fails in (False, True):
        reset()
        for setting in settings:
            put(*setting)
        with pytest.raises(MemoryError) if fails else nullcontext(), full_float32(torch.device(device)):
            if NEWER:
                parts = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
                convolutions = torch.backends.cudnn.conv if device == "cuda" else torch.backends.mkldnn.conv
                assert {parts.matmul.fp32_precision, convolutions.fp32_precision} <= {"none", "ieee"}
            else:
                assert not torch.backends.cudnn.allow_tf32
                assert torch.get_float32_matmul_precision() == "highest"
            if fails:
                raise MemoryError
        assert afterwards() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_torchs_settings_change_no_distance(settings, device, reset):
    bank, queries = (t.to(device) for t in clusters(20, 100, dim=32, far=30))
    for setting in settings:
        put(*setting)
    before = readings()
    distances, rows = KNNIndex("torch").fit(bank).search(queries, 2)
    assert readings() == before
    expected, order = plain(bank, queries, 2)
    np.testing.assert_array_equal(rows.cpu(), order)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=1e-6)

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from panda_lightning import Backbone, PandaError, PatchCore
from panda_lightning.detectors import patches as planning
from panda_lightning.networks.pyramid import pyramid
from tests.detectors.test_segmentation import mvtec, trainer


@torch.no_grad()
def patches(loader):
    """Patch features (N, h, w, C) of levels 2 and 3, each averaged over its neighbours by a loop, float64."""
    backbone = Backbone.pretrained("panda_tiny", adapt_stages=0)
    columns = zip(*(pyramid(backbone, batch["image"], (2, 3)) for batch in loader), strict=True)
    joined = []
    for level in (torch.cat(column).double() for column in columns):
        averaged = torch.zeros_like(level)
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                around = level[:, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                averaged[:, :, y, x] = around.mean(dim=(2, 3))
        joined.append(F.interpolate(averaged, size=(8, 8), mode="bilinear", align_corners=False))
    return torch.cat(joined, dim=1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize("coreset", [1.0, 0.25])
def test_scores_and_maps_are_a_plain_loops(tmp_path, coreset, neighbours):
    module = mvtec(tmp_path)
    detector = PatchCore("panda_tiny", coreset=coreset, neighbours=neighbours, sigma=0.0)
    trainer(tmp_path).test(detector, module, verbose=False)
    normal = patches(module.normal_dataloader()).reshape(6 * 64, -1)
    memory = detector.bank.double().numpy()
    assert len(memory) == round(coreset * 6 * 64)
    for entry in memory:  # each is a normal patch
        assert np.linalg.norm(normal - entry, axis=1).min() < 1e-3
    found = np.concatenate([detector.predict_step(b, 0)["map"].numpy() for b in module.test_dataloader()])
    for i, image in enumerate(patches(module.test_dataloader())):
        distances = np.linalg.norm(image[:, :, None] - memory, axis=3)
        by_patch = distances.min(axis=2)
        y, x = np.unravel_index(by_patch.argmax(), by_patch.shape)
        nearest = distances[y, x].argmin()
        around = np.argsort(np.linalg.norm(memory - memory[nearest], axis=1), kind="stable")[:neighbours]
        gaps = np.linalg.norm(memory[around] - image[y, x], axis=1)
        weight = 1 - np.exp(by_patch.max()) / np.exp(gaps).sum() if neighbours > 1 else 1
        assert detector.scores.score[i] == pytest.approx(weight * by_patch.max(), rel=1e-3)
        resized = F.interpolate(torch.tensor(by_patch)[None, None], (64, 64), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(found[i], resized[0, 0], rtol=2e-3, atol=1e-4)


def test_the_coreset_follows_the_datas_seed(tmp_path):
    banks = []
    for seed in (0, 1, 0):
        module = mvtec(tmp_path)
        module.seed = seed
        detector = PatchCore("panda_tiny", coreset=0.1)
        trainer(tmp_path).test(detector, module, verbose=False)
        banks.append(detector.bank)
    assert torch.equal(banks[0], banks[2])
    assert not torch.equal(banks[0], banks[1])
    module.seed = 1
    trainer(tmp_path).test(detector, module, verbose=False)  # used again, it makes the bank of this seed
    assert torch.equal(detector.bank, banks[1])


# ---- memory ----------------------------------------------------------------------------------------------------------

PATCHES = 6 * 64  # of 192 numbers


def test_memory_is_said_beforehand_and_the_covering_radius_afterwards(tmp_path, caplog):
    detector = PatchCore("panda_tiny", coreset=0.25)
    trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
    size = f"{PATCHES * 192 * 4 / 2**10:.1f} KiB"
    assert (
        f"PatchCore: {PATCHES} patches of 6 normal images take {size}; with the choice of 96 they take" in caplog.text
    )
    assert "the 3 images that pass the network at a time" in caplog.text
    reached, least = map(float, re.findall(r"(?:within|below) ([\d.]+\d)", caplog.text)[:2])
    assert f"All {PATCHES} patches are within {reached:g} of the 96 chosen; " in caplog.text
    assert reached == pytest.approx(2 * least, rel=1e-3)
    everything = PatchCore("panda_tiny", coreset=1.0)
    trainer(tmp_path).test(everything, mvtec(tmp_path), verbose=False)
    generator = torch.Generator().manual_seed(0)
    torch.randint(PATCHES, (1,), generator=generator)
    matrix = torch.randn(192, 128, generator=generator)
    assert float(torch.cdist(everything.bank @ matrix, detector.bank @ matrix).amin(dim=1).max()) == pytest.approx(
        reached, rel=1e-3
    )


@pytest.fixture
def few_mib(monkeypatch):
    """As if pieces took nothing, so that some hundred patches can be too many."""
    fixed = planning.memory_for(0, 192, 4)
    for name in ("memory_for", "memory_in_chunks"):
        whole = getattr(planning, name)
        monkeypatch.setattr(planning, name, lambda *given, whole=whole: whole(*given) - fixed)


def test_a_budget_makes_the_choice_in_chunks(tmp_path, caplog, few_mib):
    detector = PatchCore("panda_tiny", coreset=0.02, coreset_gb=350 * 2**10 / 2**30)
    trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
    assert (len(detector.bank), detector.bank_images.shape) == (8, (8,))
    found = re.search(
        r"All 384 patches .* of the 8 chosen in (\d+) chunks; .* at most ([\d.]+) times the smallest", caplog.text
    )
    assert int(found[1]) >= 2
    assert float(found[2]) <= 4
    everything = PatchCore("panda_tiny", coreset=1.0)
    trainer(tmp_path).test(everything, mvtec(tmp_path), verbose=False)
    for row, image in zip(detector.bank, detector.bank_images, strict=True):
        of_image = everything.bank[everything.bank_images == image]
        assert (of_image - row).abs().amax(dim=1).min() < 1e-5


@pytest.mark.parametrize(
    ("std", "half", "sentence"),
    [(1e-8, True, "too large for float16"), (torch.nan, False, "are not all finite numbers")],
)
@pytest.mark.usefixtures("few_mib")
def test_chunks_say_what_a_bank_cannot_hold(tmp_path, std, half, sentence):
    detector = PatchCore("panda_tiny", coreset=0.02, coreset_gb=(180 if half else 350) * 2**10 / 2**30, half_bank=half)
    detector.load_backbone()
    with torch.no_grad():
        detector.backbone.std *= std
    with pytest.raises(PandaError, match=sentence):
        trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)


def test_a_budget_that_is_enough_changes_nothing(tmp_path):
    banks = []
    for budget in (None, 1.0):
        detector = PatchCore("panda_tiny", coreset=0.1, coreset_gb=budget)
        trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
        banks.append(detector.bank)
    assert torch.equal(*banks)


def test_a_budget_that_no_chunks_keep_is_refused_and_the_least_does(tmp_path, few_mib):
    detector = PatchCore("panda_tiny", coreset=0.02, coreset_gb=1e-6)
    with pytest.raises(PandaError, match="coreset_gb=1e-06 is less than the .* in chunks they take") as said:
        trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
    detector.coreset_gb = float(re.search(r"give ([\d.e-]+) or more", str(said.value))[1])
    trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
    assert len(detector.bank) == 8
    with pytest.raises(PandaError, match="coreset_gb=0 is not allowed"):
        PatchCore("panda_tiny", coreset_gb=0)


def test_what_is_said_to_pass_the_network_is_about_the_same_in_a_second_run(tmp_path, caplog):
    detector = PatchCore("panda_tiny", coreset=0.1)  # whose layers are folded in the first
    for _ in range(2):
        with caplog.at_level("INFO"):
            trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
        detector.bank = None
    said = re.findall(r"images that pass the network at a time ([\d.]+) ([KM])iB", caplog.text)
    first, second = (float(size) * {"K": 1, "M": 1024}[unit] for size, unit in (said[0], said[-1]))
    folded = 4 * sum(p.numel() * 4 for p in detector.backbone.parameters()) / 1024
    assert second <= first < second + folded  # the first folds the network's layers, once


def test_a_level_is_named_once(tmp_path):
    with pytest.raises(PandaError, match=r"levels=\[2, 2\] names a level twice: name each once"):
        trainer(tmp_path).test(PatchCore("panda_tiny", levels=(2, 2)), mvtec(tmp_path), verbose=False)


def test_too_little_memory_is_said_before_images_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "memory_of", lambda device: (1000, 2000))
    with pytest.raises(PandaError, match="but 1000 bytes are free: set model.half_bank=true or a smaller data.train_"):
        trainer(tmp_path).test(PatchCore("panda_tiny"), mvtec(tmp_path), verbose=False)
    needed = 2**30
    monkeypatch.setattr(planning, "memory_for", lambda *_: 2 * needed)
    monkeypatch.setattr(planning, "memory_of", lambda device: (needed, needed))
    with pytest.raises(PandaError, match=r"take 2.0 GiB on cpu, but 1.0 GiB are free: set model.coreset_gb=0.9\d or"):
        trainer(tmp_path).test(PatchCore("panda_tiny", coreset=0.1), mvtec(tmp_path), verbose=False)


MEASURED = """
import logging, re, sys
from pathlib import Path
import torch
from panda_lightning.search.coreset import Points, greedy_coreset, memory_for

def high():
    return 1024 * int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

count, dim = 60_000, int(sys.argv[1])
list(greedy_coreset(torch.randn(2000, dim), 20))  # what libraries take once
before = high()
points = Points(dim, torch.float32, torch.device("cpu"))
while len(points) < count:
    points.append(torch.randn(1000, dim))
for _ in greedy_coreset(points, 600):
    pass
print(high() - before, memory_for(count, dim, 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems say it elsewhere")
@pytest.mark.parametrize("dim", [128, 200])
def test_points_and_choice_take_no_more_than_is_said(dim):
    done = subprocess.run([sys.executable, "-c", MEASURED, str(dim)], capture_output=True, text=True, check=True)
    taken, said = map(int, done.stdout.split())
    assert 0.6 * said < taken < 1.1 * said

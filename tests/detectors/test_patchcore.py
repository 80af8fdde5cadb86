import numpy as np
import pytest
import torch
from torch.nn import functional as F

from panda_lightning import Backbone, PatchCore
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

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from panda_lightning import SPADE, Backbone, PandaError
from panda_lightning.networks.pyramid import pyramid
from tests.detectors.test_segmentation import mvtec, trainer


@torch.no_grad()
def pyramids(loader, levels):
    """Pooled features (N, D) and maps (N, C, h, w) of each level, float64."""
    backbone = Backbone.pretrained("panda_tiny", adapt_stages=0)
    batches = [pyramid(backbone, batch["image"], levels, pooled=True) for batch in loader]
    *maps, pooled = (torch.cat(column).double().numpy() for column in zip(*batches, strict=True))
    return pooled, maps


def test_scores_and_maps_are_a_plain_loops(tmp_path):
    module, detector = mvtec(tmp_path), SPADE("panda_tiny", k=2, levels=(1, 3), sigma=3.0)
    trainer(tmp_path).test(detector, module, verbose=False)
    bank, bank_maps = pyramids(module.normal_dataloader(), (1, 3))
    pooled, maps = pyramids(module.test_dataloader(), (1, 3))
    found = np.concatenate([detector.predict_step(b, 0)["map"].numpy() for b in module.test_dataloader()])
    for i, feature in enumerate(pooled):
        distances = np.linalg.norm(bank - feature, axis=1)
        nearest = np.argsort(distances)[:2]
        assert detector.scores.score[i] == pytest.approx(distances[nearest].mean(), rel=1e-4)
        levels = []
        for level, normal in zip(maps, bank_maps, strict=True):
            channels, height, width = level.shape[1:]
            patches = np.concatenate([normal[n].reshape(channels, -1).T for n in nearest])
            by_patch = np.zeros((height, width))
            for y in range(height):
                for x in range(width):
                    by_patch[y, x] = np.linalg.norm(patches - level[i, :, y, x], axis=1).min()
            resized = F.interpolate(torch.tensor(by_patch)[None, None], (64, 64), mode="bilinear", align_corners=False)
            levels.append(resized[0, 0].numpy())
        expected = gaussian_filter(np.mean(levels, axis=0), 3.0, mode="mirror")
        np.testing.assert_allclose(found[i], expected, rtol=1e-3)


def test_a_checkpoint_of_another_image_size_is_refused(tmp_path):
    runner = trainer(tmp_path)
    runner.test(SPADE("panda_tiny", k=2), mvtec(tmp_path), verbose=False)
    runner.save_checkpoint(tmp_path / "spade.ckpt")
    loaded = SPADE.load_from_checkpoint(tmp_path / "spade.ckpt")
    with pytest.raises(
        PandaError, match=r"SPADE was made with data or arguments other than these \(image_size=96, not 64\)"
    ):
        trainer(tmp_path).test(loaded, mvtec(tmp_path, image_size=96), verbose=False)


def test_a_checkpoint_whose_bank_has_another_order_is_refused(tmp_path):
    runner = trainer(tmp_path)
    runner.test(SPADE("panda_tiny", k=2), mvtec(tmp_path), verbose=False)
    runner.save_checkpoint(tmp_path / "spade.ckpt")
    kept = torch.load(tmp_path / "spade.ckpt", weights_only=True)
    kept["state_dict"]["_extra_state"]["format"] = 2
    torch.save(kept, tmp_path / "older.ckpt")
    with pytest.raises(PandaError, match=r"has format 2, in which SPADE's bank has another order: make it again"):
        SPADE.load_from_checkpoint(tmp_path / "older.ckpt")

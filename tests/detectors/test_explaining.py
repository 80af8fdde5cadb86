import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import DN2, OCSVM, PANDA, SPADE, PatchCore
from panda_lightning.detectors import explaining
from tests.detectors.test_scoring import images, learned

BANKS = {
    "DN2": lambda: DN2("panda_tiny", k=2),
    "DN2, normalize": lambda: DN2("panda_tiny", k=6, normalize=True),
    "SPADE": lambda: SPADE("panda_tiny", k=3),
    "PatchCore": lambda: PatchCore("panda_tiny", coreset=1.0, neighbours=1),
    "OC-SVM": lambda: OCSVM(nu=0.9),
}


@pytest.mark.parametrize("name", BANKS)
def test_without_the_nearest_the_score_is_what_the_list_foretells(tmp_path, folder, name):
    detector = BANKS[name]()
    learned(detector, images(folder), tmp_path)
    found = detector.score(folder / "test/stripe/000.png")
    names, distances = found.neighbours[0], found.distances[0]
    assert list(distances) == sorted(distances)
    assert len(set(names)) == len(names) >= 5
    row = detector.bank_names.index(names[0])
    if name == "OC-SVM":
        m = detector.bank
        place = m["image"].tolist().index(row)
        term = float(m["alpha"][place] * torch.exp(-m["gamma"] * distances[0] ** 2))
        kept = torch.arange(len(m["image"])) != place
        detector.bank = {**m, **{key: m[key][kept] for key in ("support", "alpha", "image")}}
        foretold = found.score[0] + term
    elif name == "PatchCore":
        kept = detector.bank_images != row
        detector.bank, detector.bank_images = detector.bank[kept], detector.bank_images[kept]
        foretold = distances[1]  # or more, where another patch is now the farthest
    else:
        kept = torch.arange(len(detector.bank)) != row
        detector.bank = detector.bank[kept]
        k = detector.k
        foretold = distances[1 : k + 1].mean() if name == "SPADE" else distances[1 : k + 1].sum()
    now = detector.score(folder / "test/stripe/000.png").score[0]
    assert now != pytest.approx(found.score[0], rel=1e-9)
    if name == "PatchCore":
        assert now >= foretold * (1 - 1e-5)
    else:
        assert now == pytest.approx(foretold, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("make", [DN2, PANDA])
def test_the_parts_of_a_pooled_distance_sum_to_the_score(tmp_path, folder, make, normalize):
    detector = make("panda_tiny", normalize=normalize, k=3)
    learned(detector, images(folder, image_size=64), tmp_path)
    found = detector.score(folder / "test", maps=True)
    assert found.maps.shape == (13, 64, 64)
    np.testing.assert_allclose(found.maps.mean(axis=(1, 2)), found.score, rtol=1e-3, atol=1e-3 * found.score.max())
    assert detector.score(folder / "test").maps is None
    small = Image.open(folder / "test/stripe/000.png").convert("RGB").resize((64, 64))
    one = detector.score(small, maps=True).maps[0]
    other = detector.score(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), maps=True).maps[0]
    assert np.abs(one - other[:, ::-1]).max() < 0.6 * np.abs(one).max()  # the map turns with the picture


def test_parts_of_a_distance_sum_to_the_score_in_half_precision_too(tmp_path, folder):
    detector = DN2("panda_tiny", k=3)
    learned(detector, images(folder, image_size=64), tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = {"image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)}
        detector.maps = True
        with pytest.MonkeyPatch.context() as patch:  # of the network's own rounding nothing is left to see
            positions = explaining.positions(detector.backbone, batch["image"])
            patch.setattr(detector, "embed", lambda batch: positions.mean(dim=(2, 3)))
            patch.setattr(explaining, "positions", lambda *args: positions)
            found = detector.explained(batch)
    torch.testing.assert_close(found["map"].mean(dim=(1, 2)), found["score"], rtol=2e-4, atol=2e-4)

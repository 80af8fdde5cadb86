import pytest
import torch
from torchvision.transforms.functional import normalize

from panda_lightning import PandaError
from panda_lightning.networks.pyramid import level_pieces, pyramid
from tests.networks.test_backbones import FAMILIES, made


@pytest.mark.parametrize("adapt_stages", [0, 2])  # all layers folded, or some
@pytest.mark.parametrize("name", FAMILIES)
def test_the_pyramid_is_timms_own_intermediate_maps(name, adapt_stages):
    backbone = made(name, adapt_stages)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    x = normalize(images / 255, backbone.mean.flatten().tolist(), backbone.std.flatten().tolist())
    with torch.no_grad():
        expected = backbone.model.forward_intermediates(x, intermediates_only=True)
    expected = [expected[i] for i in (2, 5, 8, 11)] if "vit" in name else expected[-4:]  # 12 blocks in quarters
    *maps, pooled = pyramid(backbone, images, (1, 2, 3, 4), pooled=True)
    for found, theirs, level in zip(maps, expected, range(1, 5), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        assert found.shape[-1] == (14 if "vit" in name else 224 // (2 << level))
    torch.testing.assert_close(pooled, backbone(images), rtol=1e-4, atol=1e-5)
    (alone,) = pyramid(backbone, images, (2,))  # stops there
    torch.testing.assert_close(alone, maps[1], rtol=1e-5, atol=1e-6)


def test_levels_that_are_none_are_refused():
    with pytest.raises(PandaError, match=r"levels=\[0, 5\] are not all levels of resnet18: choose from 1, 2, 3, 4"):
        level_pieces(made("resnet18"), (0, 5))

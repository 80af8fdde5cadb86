import pytest
import timm
import torch
from torch import nn
from torchvision.transforms.functional import normalize

from panda_lightning import Backbone, PandaError, PatchCore
from panda_lightning.networks.pyramid import level_maps, level_strides, pyramid
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
        level_maps(made("resnet18"), (0, 5))


TOKENS = {  # vision transformers with class and register tokens: height, width, patch
    "vit_small_patch14_reg4_dinov2": ({"dynamic_img_size": True, "img_size": 112}, 112, 140, 14),
    "vit_small_patch14_dinov2": ({"dynamic_img_size": True, "img_size": 112}, 112, 84, 14),
    "vit_small_patch16_dinov3": ({}, 96, 160, 16),
    "deit3_small_patch16_224": ({"dynamic_img_size": True}, 96, 64, 16),
}


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize("name", TOKENS)
def test_maps_of_tokens_are_of_patches_alone(name, depth):
    args, height, width, patch = TOKENS[name]
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(name, depth=depth, **args), 0, args)
    backbone.model.norm = nn.Identity()  # which comes after the last intermediate map
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    assert level_maps(backbone, (1, 2, 3, 4)) == ([0, 1, 2, 3] if depth == 4 else [1, 2, 4, 5])
    assert level_strides(backbone, (2, 4)) == [patch, patch]
    last = pyramid(backbone, images, (1, 4))[1]
    with torch.no_grad():
        tokens = backbone.model.forward_features(backbone.normalized(images))
    count = height * width // patch**2
    assert tokens.shape[1] > count  # others come first
    expected = tokens[:, -count:].mT.reshape(2, -1, height // patch, width // patch)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    detector = PatchCore("x", levels=(2, 4))
    detector.backbone = backbone
    assert detector.embed({"image": images}).shape == (2, count, 2 * 384)


@pytest.mark.parametrize(
    ("name", "args", "height", "width"),
    [
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, 224, 448),
        ("maxvit_nano_rw_256", {}, 256, 256),
        ("hiera_tiny_224", {}, 224, 224),
        ("convnext_atto", {}, 96, 160),
        ("pvt_v2_b0", {}, 96, 160),
        ("resnet18", {}, 100, 150),
    ],
)
def test_maps_follow_the_sides_of_the_images(name, args, height, width):
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(name, **args), 0, args)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    strides = level_strides(backbone, (1, 2, 3, 4))
    assert strides == [4, 8, 16, 32]
    found = pyramid(backbone, images, (1, 2, 3, 4))
    assert [m.shape[2:] for m in found] == [(-(-height // s), -(-width // s)) for s in strides]

import json
import shutil
import socket
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import normalize

from panda_lightning import Backbone, PandaError
from panda_lightning.networks.adapting import summed
from panda_lightning.networks.checks import require_size
from panda_lightning.networks.loading import made_of
from panda_lightning.runtime.fingerprint import fingerprint

FAMILIES = {  # name: (input size, first adapted parameter, last adapted parameter) with adapt_stages=2
    "resnet18": (64, "layer3.0.conv1.weight", "layer4.1.bn2.bias"),
    "wide_resnet50_2": (64, "layer3.0.conv1.weight", "layer4.2.bn3.bias"),
    "resnext50_32x4d": (64, "layer3.0.conv1.weight", "layer4.2.bn3.bias"),
    "mobilenetv2_050": (64, "blocks.5.0.conv_pw.weight", "bn2.bias"),
    "efficientnet_b0": (64, "blocks.5.0.conv_pw.weight", "bn2.bias"),
    "mobilenetv3_small_050": (64, "blocks.4.0.conv_pw.weight", "conv_head.bias"),
    "regnetx_002": (64, "s3.b1.conv1.conv.weight", "s4.b7.conv3.bn.bias"),
    "convnext_atto": (64, "stages.2.downsample.0.weight", "head.norm.bias"),
    "vit_tiny_patch16_224": (224, "blocks.10.norm1.weight", "norm.bias"),
    "vit_tiny_patch16_dinov3_qkvb": (64, "blocks.10.gamma_1", "norm.bias"),
    "swin_tiny_patch4_window7_224": (224, "layers.2.downsample.norm.weight", "norm.bias"),
}


def made(name: str, adapt_stages: int = 2, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(timm.create_model(name, num_classes=5), adapt_stages, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_and_suffix_are_timms_own_forward(name):
    size, first, last = FAMILIES[name]
    backbone = made(name)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    model = backbone.model
    x = normalize(images / 255, backbone.mean.flatten().tolist(), backbone.std.flatten().tolist())
    with torch.no_grad():
        hidden = backbone.prefix(images)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(backbone.suffix(hidden), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone.logits(hidden), model(x), rtol=1e-4, atol=1e-5)
    adapted = list(backbone.adapted())
    assert (adapted[0], adapted[-1]) == (first, last)


def test_weights_beside_a_network_with_its_own_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(
        PandaError, match=r"weights=.* works only with the name of a timm architecture, but backbone=panda_tiny"
    ):
        Backbone.pretrained("panda_tiny", weights=str(file))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_adapted_parameters_lie_behind_the_split(name):
    backbone = made(name)
    size = FAMILIES[name][0]
    hidden = backbone.prefix(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    assert not hidden.requires_grad
    backbone.suffix(hidden).square().sum().backward()
    for param_name, p in backbone.model.named_parameters():
        assert (p.grad is not None) == (param_name in backbone.adapted()), param_name


def test_stages_are_counted_from_the_end():
    assert not made("resnet18", 0).adapted()
    assert next(iter(made("resnet18", 1).adapted())) == "layer4.0.conv1.weight"
    assert next(iter(made("resnet18", 4).adapted())) == "layer1.0.conv1.weight"
    with pytest.raises(PandaError, match="adapt_stages=5 does not fit resnet18, which has 4 stages"):
        made("resnet18", 5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("optimize", ["channels_last", "folded"])
def test_levels_of_optimize_agree(name, optimize):
    torch.manual_seed(0)
    plain = made(name, optimize="plain")
    other = made(name, optimize=optimize)
    images = torch.randint(0, 256, (3, 3, FAMILIES[name][0], FAMILIES[name][0]), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(other(images), plain(images), rtol=1e-4, atol=1e-5)
    assert other.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_agrees_and_trains():
    plain, compiled = (Backbone.pretrained("panda_tiny", optimize=level) for level in ("plain", "compiled"))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for backbone in (plain, compiled):
        backbone(images).square().sum().backward()
    torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
    for name, p in plain.adapted().items():
        torch.testing.assert_close(compiled.adapted()[name].grad, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.max()))


def test_folded_layers_follow_weights_that_are_loaded_later():
    backbone = made("resnet18")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    backbone(images)
    other = made("resnet18", optimize="plain")
    with torch.no_grad():
        other.model.bn1.running_var *= 3
        other.model.conv1.weight *= 2
        backbone.load_state_dict(other.state_dict())
        torch.testing.assert_close(backbone(images), other(images), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        backbone.model.bn1.running_mean += 1
        inside = backbone(images)
    assert torch.equal(backbone.prefix(images), backbone.prefix(images))
    with torch.no_grad():
        assert torch.equal(backbone(images), inside)
        assert not torch.allclose(inside, other(images))


def test_batchnorm_stays_in_eval_mode():
    backbone = made("resnet18")
    assert not any(m.training for m in nn.ModuleList([backbone]).train().modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("side", "sentence"), [(225, "224 or 240"), (239, "224 or 240"), (8, "16 or more")])
def test_a_side_that_patches_do_not_divide_is_refused(side, sentence):
    backbone = Backbone(timm.create_model("vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True), 2)
    with pytest.raises(PandaError, match=rf"image_size={side} is .* vit_tiny_patch16_224: choose {sentence}\."):
        require_size(backbone, "image_size", [side])
    require_size(backbone, "image_size", [240])
    assert backbone(torch.zeros(1, 3, 240, 240, dtype=torch.uint8)).shape == (1, 192)


def test_patches_that_overlap_divide_no_side():
    backbone = Backbone(timm.create_model("pvt_v2_b0", num_classes=10), 0)  # of 7 px, every 4 px
    require_size(backbone, "image_size", [96])
    assert backbone(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 256)


def test_the_bundled_network_loads_without_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    backbone = Backbone.pretrained("panda_tiny")
    assert (backbone.architecture, backbone.num_classes, backbone.stride) == ("resnet10t", 200, 32)
    assert backbone.interpolation == "bicubic"
    assert backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 256)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_network_is_built_again_from_its_config_alone(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    config = json.loads(json.dumps(backbone.config))  # primitives only
    assert "weights/panda_tiny" not in json.dumps(config)
    again = Backbone.from_config(config, 2)
    again.load_state_dict(backbone.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(again(images), backbone(images))
    assert list(again.adapted()) == list(backbone.adapted())


def test_local_dir_and_weights_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": {"num_classes": 7, "classifier": "fc"}}
    config["pretrained_cfg"] |= {
        "input_size": [3, 64, 64],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "first_conv": "conv1.0",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    backbone = Backbone.pretrained(f"local-dir:{tmp_path}")
    model.eval()
    expected = model.forward_head(model.forward_features(images / 255 * 2 - 1), pre_logits=True)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)

    torch.manual_seed(2)
    full = timm.create_model("resnet10t", num_classes=1000)
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone.pretrained("resnet10t", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.model.get_parameter("fc.weight"), full.fc.weight)


def test_a_vit_takes_other_image_sizes(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = Backbone.pretrained("vit_tiny_patch16_224", weights=str(tmp_path / "w.safetensors"))
    assert backbone(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 192)
    again = Backbone.from_config(backbone.config, 2)
    assert again(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 192)


def test_missing_weights_are_an_error_that_names_the_ways_out(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    with pytest.raises(PandaError) as error:
        Backbone.pretrained("hf-hub:panda-lightning-tests/not-there")
    for words in ("hf-hub:panda-lightning-tests/not-there", "local-dir:FOLDER", "weights=FILE", "panda_tiny"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet20x", "backbone=resnet20x cannot be loaded .*Unknown model"),
        ("resnet18.no_such_tag", "no_such_tag"),
        ("local-dir:/nonexistent", "/nonexistent"),
        ("/nonexistent/last.ckpt", "backbone=/nonexistent/last.ckpt is not a file"),
        ("botnet50ts_256", "No pretrained weights exist"),  # timm has none for it: never random ones
    ],
)
def test_names_that_are_none_are_refused(name, words):
    with pytest.raises(PandaError, match=words):
        Backbone.pretrained(name)


def test_weights_that_are_no_file_are_refused():
    with pytest.raises(PandaError, match="weights=/nonexistent.pth is not a file"):
        Backbone.pretrained("resnet18", weights="/nonexistent.pth")


def _no_network(*args: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


WHOLE = {  # networks whose images reach the adapted layers in more than one way
    "tnt_s_legacy_patch16_224": 224,  # two streams
    "efficientvim_m1": 224,  # features of all stages
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_is_computed_whole(name):
    backbone = made(name)
    size = WHOLE[name]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    assert not backbone.splits
    assert torch.equal(backbone.prefix(images), images)
    x = normalize(images / 255, backbone.mean.flatten().tolist(), backbone.std.flatten().tolist())
    with torch.no_grad():
        expected = backbone.model.forward_head(backbone.model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone.logits(images), backbone.model(x), rtol=1e-4, atol=1e-5)
    backbone(images).square().sum().backward()
    for param_name, p in backbone.model.named_parameters():
        assert (p.grad is not None) == (param_name in backbone.adapted()), param_name


class Shared(nn.Module):
    """One activation is called before the adapted layer and after it."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.last = nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0, 0, 0), "std": (1, 1, 1), "architecture": "shared"}
        self.feature_info = [{"module": "stem", "reduction": 1}, {"module": "last", "reduction": 1}]

    def group_matcher(self, coarse):
        return {"stem": "^stem", "blocks": "^last"}

    def forward_features(self, x):
        return self.act(self.last(self.act(self.stem(x))))

    def forward_head(self, x, pre_logits=False):
        return x.mean(dim=(2, 3))


def test_modules_called_on_both_sides_of_the_split_are_computed_on_the_second():
    backbone = Backbone(Shared(), 1)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert (backbone.flow.entry, backbone.splits) == ("last", True)
    with torch.no_grad():
        hidden = backbone.prefix(images)
        torch.testing.assert_close(backbone.suffix(hidden), backbone(images))
        assert hidden.shape == (2, 4, 14, 14)


def test_biases_that_a_network_keeps_in_eval_mode_follow_their_parameters():
    backbone = made("levit_128s")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    names = [name for name in backbone.adapted() if name.endswith("attention_biases")]
    assert names
    for module in backbone.model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.ones_(module.weight)  # at first some are 0, and attention has no effect
    before = backbone(images)
    with torch.no_grad():
        backbone.model.get_parameter(names[-1]).normal_(std=5)
    assert not torch.equal(backbone(images), before)  # what is kept would give the very same


def test_a_network_without_pooled_features_is_refused():
    with pytest.raises(PandaError, match="MobileNetV5Encoder gives no pooled features"):
        Backbone(_bare("mobilenetv5_300m_enc"), 2)


def _bare(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"])
def test_tokens_are_pooled_as_asked(name):
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    torch.manual_seed(0)
    model = timm.create_model(name, **(small := {"dynamic_img_size": True, "depth": 3}))
    token, avg, both = (Backbone(model, 2, small, pool=pool) for pool in ("token", "avg", "both"))
    with torch.no_grad():
        tokens = model.forward_features(token.normalized(images))
        assert tokens.shape[1] == 5 + (112 // model.patch_embed.patch_size[0]) ** 2  # one for the class, four registers
        expected = [model.fc_norm(tokens[:, 0]), model.fc_norm(tokens[:, 5:].mean(dim=1))]
        torch.testing.assert_close(token(images), expected[0])
        torch.testing.assert_close(avg(images), expected[1])
        torch.testing.assert_close(both(images), torch.cat(expected, dim=1))
    assert (token.num_features, both.num_features) == (model.num_features, 2 * model.num_features)
    assert fingerprint(made_of(token)) == fingerprint(made_of(both))  # of the same weights
    assert Backbone.from_config(both.config, 2).pool == "both"
    assert Backbone.from_config(both.config, 2, pool="avg").pool == "avg"


def test_a_pool_of_tokens_is_refused_where_there_are_none():
    with pytest.raises(PandaError, match="pool=token chooses among tokens, but resnet18 has no class token"):
        made("resnet18", pool="token")


def test_norm_trains_scales_and_shifts_alone():
    for name in ("vit_tiny_patch16_224", "resnet18"):
        backbone = made(name, adapt="norm")
        assert backbone.adapted()
        assert all(
            p.ndim == 1 and "norm" in n + "norm" * ("bn" in n or "downsample.1" in n)
            for n, p in backbone.adapted().items()
        )


@pytest.mark.parametrize("network", ["vit_tiny_patch16_224", "mobilenetv2_050"])
def test_low_rank_changes_add_to_weights(network):
    plain, lora = made(network), made(network, adapt="lora", lora_rank=4)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    torch.testing.assert_close(lora(images), plain(images), rtol=1e-4, atol=1e-5)  # nothing is changed at the start
    linear = [
        n for n, p in plain.adapted().items() if p.ndim == 2 or (p.ndim == 4 and p.shape[1] > 1 and p.shape[2] == 1)
    ]
    assert list(lora.adapted()) == linear
    assert all(name.endswith((".down", ".up")) for name in lora.trained())
    with torch.no_grad():
        for p in lora.trained().values():
            p.add_(0.05)
        for name, p in plain.adapted().items():
            p.copy_(lora.adapted().get(name, p))
    torch.testing.assert_close(lora(images), plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lora.suffix(lora.prefix(images)), plain(images), rtol=1e-4, atol=1e-5)
    state = summed(lora.model.state_dict())
    assert sorted(state) == sorted(plain.model.state_dict())
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet18", {"adapt": "lora"}, "1 x 1 convolutions, which have 2 % of the adapted parameters of this ResNet"),
        (
            "mobilenetv2_050",
            {"adapt": "lora", "lora_rank": 50},
            "lora_rank=50 is higher than the full rank of blocks.5.0.conv_pw",
        ),
        (
            "vit_tiny_patch16_224",
            {"adapt": "lora", "lora_rank": 500},
            "lora_rank=500 is higher than the full rank of blocks.10.attn.qkv",
        ),
    ],
)
def test_what_cannot_be_adapted_so_is_refused(name, options, sentence):
    with pytest.raises(PandaError, match=sentence):
        made(name, **options)


def test_three_dimensional_convolutions_keep_their_layout():
    backbone = made("lambda_resnet26t", optimize="folded")  # attention with such a convolution
    assert any(p.ndim == 5 for p in backbone.model.parameters())
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 2048)


def test_a_network_of_one_size_names_it():
    backbone = Backbone(timm.create_model("levit_128s", num_classes=10), 2)
    with pytest.raises(PandaError, match="image_size=96 is not the only size that levit_128s accepts: choose 224"):
        require_size(backbone, "image_size", [96])
    require_size(backbone, "image_size", [224])

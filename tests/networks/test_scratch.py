import pytest
import torch
from torch import nn

from panda_lightning.networks import scratch
from panda_lightning.networks.scratch import LENETS, WideResNet, lenet, lenet_decoder


@pytest.mark.parametrize(
    ("name", "size", "weights"),
    [  # counted by hand: 25 per filter and input channel, then the linear layers
        ("mnist", 28, 25 * (8 + 8 * 4) + 4 * 49 * 32),
        ("fashion_mnist", 28, 25 * (16 + 16 * 32) + 32 * 49 * 128 + 128 * 64),
        ("cifar10", 32, 25 * (3 * 32 + 32 * 64 + 64 * 128) + 128 * 16 * 128),
        ("64px", 64, 25 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 256 * 16 * 128),
    ],
)
def test_lenets_have_the_published_sizes_and_no_bias(name, size, weights):
    channels, widths, dims = LENETS[name]
    encoder, decoder = (make(channels, size, widths, dims) for make in (lenet, lenet_decoder))
    images = torch.rand(2, channels, size, size)
    assert encoder(images).shape == (2, dims[-1])
    assert sum(p.numel() for p in encoder.parameters()) == weights
    assert not any("bias" in key for network in (encoder, decoder) for key, _ in network.named_parameters())
    back = decoder(encoder(images))
    assert back.shape == images.shape
    assert 0 < back.min() < back.max() < 1
    assert sum(isinstance(m, nn.Linear) for m in decoder) == len(dims)
    assert sum(isinstance(m, nn.Conv2d) for m in decoder) == len(widths)


def test_a_wide_residual_network_has_the_published_size():
    network = WideResNet(16, 4)
    linear = 256 * 10 + 10
    assert sum(p.numel() for p in network.parameters()) + linear == pytest.approx(2.75e6, rel=2e-3)  # WRN-16-4: 2.75 M
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 256)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules()) == 13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_several_processes_are_as_wide_as_those_of_one(monkeypatch, dtype):
    x = (400 + 100 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))).to(dtype)  # squares overflow
    one, many = scratch.BatchNorm2d(3), scratch.BatchNorm2d(3)
    expected = one(x.float())
    monkeypatch.setattr(scratch, "world_size", lambda: 2)
    monkeypatch.setattr(scratch, "all_reduce", lambda sums: sums)  # the other has no images
    found = many(x.float()), many(x)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(many.running_var, one.running_var * 1.9 - 0.9, rtol=1e-4, atol=1e-4)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1].float(), expected, rtol=0.05, atol=0.05)

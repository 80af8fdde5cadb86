import pytest
import timm
import torch
from torch import nn

from panda_lightning.networks.folding import fold_batchnorm, run


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics and scales unlike those of a fresh BatchNorm."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight, m.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (m.bias, m.running_mean):
                nn.init.normal_(tensor)
    return model.double().eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "mobilenetv2_050", "efficientnet_b0", "regnetx_002"])
def test_folding_changes_no_value_and_leaves_no_batchnorm(name):
    model = with_statistics(timm.create_model(name, num_classes=0))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    layers = [m for n, m in model.named_children() if n not in ("global_pool", "fc", "classifier", "head")]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = run(layers, x)
        chain = fold_batchnorm(layers, x[:1])
        torch.testing.assert_close(run(chain, x), expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in nn.ModuleList(chain).modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # the given chain is untouched


def test_a_batchnorm_that_no_convolution_feeds_stays():
    norm = with_statistics(nn.Sequential(nn.BatchNorm2d(3)))
    layers = [norm, torch.relu, with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3)))]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    chain = fold_batchnorm(layers, x[:1])
    assert torch.equal(run(chain, x), run(layers, x))
    assert any(isinstance(m, nn.BatchNorm2d) for m in chain[0].modules())

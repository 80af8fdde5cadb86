import pytest
import timm
import torch
from torch import nn

from panda_lightning.networks.folding import fold_batchnorm
from panda_lightning.networks.splitting import flow


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


def seen(model, x):
    return flow(model, [], lambda features: features.flatten(1), x)[0]


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "mobilenetv2_050", "efficientnet_b0", "regnetx_002"])
def test_folding_changes_no_value_and_leaves_no_batchnorm(name):
    model = with_statistics(timm.create_model(name, num_classes=0))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        way = seen(model, x[:2])
        folded = fold_batchnorm(model, way.before, way.feeds)
        torch.testing.assert_close(folded.forward_features(x), model.forward_features(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # the given network is untouched


class Odd(nn.Module):
    """A BatchNorm that no convolution feeds, one whose convolution feeds something else too, one with a scaled one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
        self.shared, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.scaled, self.after = timm.layers.StdConv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward_features(self, x):
        x = self.shared(self.first(x).relu())
        x = self.norm(x) + self.act(x)
        return self.last(self.after(self.scaled(x)).relu())


def test_a_batchnorm_that_does_not_stand_alone_behind_a_convolution_stays():
    model = with_statistics(Odd())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        way = seen(model, x)
        folded = fold_batchnorm(model, way.before, way.feeds)
        assert torch.equal(folded.forward_features(x), model.forward_features(x))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 4

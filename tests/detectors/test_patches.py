import torch

from panda_lightning.detectors.patches import LiveBytes


def test_bytes_are_counted_of_tensors_that_live_at_the_same_time():
    given = torch.zeros(1000)
    with torch.inference_mode(), LiveBytes() as live:
        x = given + 1  # 4000
        view = x.view(10, 100)[2:]  # nothing
        y = view.double()  # 6400
        del x, view
        assert live.most == 4000 + 6400
        y.add_(1)
        z = torch.cat([y, y])  # 12,800
        del y
        z.sum()
    assert live.most == 6400 + 12_800

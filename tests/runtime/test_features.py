import torch

from panda_lightning.runtime.features import gather


def test_gather_orders_by_index_and_drops_repeats_and_fillers():
    parts = [
        (torch.tensor([4, 0, -1]), torch.tensor([[4.0], [0.0], [99.0]])),
        (torch.tensor([2, 4]), torch.tensor([[2.0], [4.0]])),
    ]
    index, values = gather(parts)
    assert index.tolist() == [0, 2, 4]
    assert values.tolist() == [[0.0], [2.0], [4.0]]

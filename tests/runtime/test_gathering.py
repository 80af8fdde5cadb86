import pytest
import torch

from panda_lightning.runtime.gathering import gather


@pytest.mark.parametrize("index", [[[4, 0, -1], [2, 4]], [[-1, 0, 2, 4]], [[0, 2], [4]], [[0, 0, 2, 4]], [[4, 2, 0]]])
def test_gather_orders_by_index_and_drops_repeats_and_fillers(index):
    parts = [(torch.tensor(i), torch.tensor(i) * 10.0, torch.tensor(i).view(-1, 1, 1).expand(-1, 2, 3)) for i in index]
    found, values, more = gather(parts)
    assert found.tolist() == [0, 2, 4]
    assert values.tolist() == [0.0, 20.0, 40.0]
    assert torch.equal(more, found.view(-1, 1, 1).expand(-1, 2, 3))


def test_gather_copies_nothing_where_one_batch_is_in_order():
    part = (torch.tensor([0, 2, 3]), torch.rand(3, 2))
    assert all(ours is theirs for ours, theirs in zip(gather([part]), part, strict=True))


def test_gather_of_fillers_alone_is_empty():
    index, values = gather([(torch.tensor([-1, -1]), torch.ones(2, 3))])
    assert (len(index), tuple(values.shape)) == (0, (0, 3))
    index, values = gather([(torch.tensor([], dtype=torch.long), torch.ones(0, 3))])
    assert (len(index), tuple(values.shape)) == (0, (0, 3))


def test_gather_merges_processes_with_many_rows_few_or_none(as_processes):
    shares = [[[5, 1]], [], [[0], [3, 4, 2, 1, -1]], [[]]]

    def values(index):
        index = torch.tensor(index, dtype=torch.long)
        return index, (index.view(-1, 1) * torch.tensor([1, 10])).half(), index % 2 == 0

    def merge(rank):
        return gather([values(index) for index in shares[rank]])

    for found in as_processes(4, merge):
        for ours, theirs in zip(found, values([0, 1, 2, 3, 4, 5]), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    own = as_processes(2, lambda rank: gather([values([2 + rank, rank])], merged=False)[0].tolist())
    assert own == [[0, 2], [1, 3]]


@pytest.mark.parametrize("merged", [False, True])
def test_a_process_without_a_batch_gets_columns_of_the_others_form(as_processes, merged):
    shares = [[], [(torch.tensor([1, 0]), torch.ones(2, 3, 2).bfloat16(), torch.tensor([True, False]))], []]
    for rank, found in enumerate(as_processes(3, lambda rank: gather(shares[rank], merged))):
        count = 2 if merged or rank == 1 else 0
        assert [tuple(column.shape) for column in found] == [(count,), (count, 3, 2), (count,)]
        assert [column.dtype for column in found] == [torch.long, torch.bfloat16, torch.bool]


@pytest.mark.parametrize("merged", [False, True])
def test_nccl_is_given_what_lies_on_a_gpu_and_rows_come_back_where_they_lay(as_processes, merged):
    def merge(rank):
        index = torch.tensor([rank, rank + 2])
        columns = (index, index.float().to("cuda:0"), index > 1)
        found = gather([] if rank == 2 else [columns], merged)
        assert [column.device.type for column in found] == ["cpu", "cuda", "cpu"]
        return [column.tolist() for column in found]

    for rank, found in enumerate(as_processes(3, merge, "nccl")):
        rows = [0, 1, 2, 3] if merged else [[0, 2], [1, 3], []][rank]
        assert found == [rows, rows, [row > 1 for row in rows]]

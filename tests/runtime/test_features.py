import io

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from rich.console import Console

from panda_lightning import PandaError
from panda_lightning.runtime.features import extract, gather, on_device


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, **{"enable_progress_bar": False, **options}
    )


def batch(*index):
    index = torch.tensor(index)
    return {"index": index, "image": index.view(-1, 1) * torch.tensor([1.0, 10.0]), "label": index}


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
def test_batches_nowhere_are_a_mistake_that_is_said(as_processes, merged):
    def nothing(rank):
        with pytest.raises(PandaError, match="no images were seen: the loader gave no batch"):
            gather([], merged)

    nothing(0)
    as_processes(2, nothing)
    with pytest.raises(PandaError, match="no images were seen"):
        extract(trainer(), lambda b: b["image"], [], "title", merged)


def test_a_process_without_images_extracts_no_rows(as_processes):
    run, shares = trainer(), [[batch(1)], [], [batch(0)]]
    found = as_processes(3, lambda rank: extract(run, lambda b: b["image"], shares[rank], "title", merged=False))
    assert [features.tolist() for features in found] == [[[1.0, 10.0]], [], [[0.0, 0.0]]]
    assert found[1].shape == (0, 2)


def test_features_are_extracted_in_order_and_of_the_type_to_keep(as_processes):
    def embed(found):
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        return found["image"] * scale

    scale = torch.tensor(1 / 3, requires_grad=True)
    loader = [batch(3, 1), batch(0, 2)]
    expected = batch(0, 1, 2, 3)["image"] / 3
    features = extract(trainer(), embed, loader, "title")
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad
    torch.testing.assert_close(extract(trainer(), embed, loader, "title", dtype=torch.float16), expected.half())

    run = trainer()
    shares = [[batch(2, 0)], [batch(3, 1)]]
    merged, own = (
        as_processes(2, lambda rank, merged=merged: extract(run, embed, shares[rank], "title", merged).detach())
        for merged in (True, False)
    )
    for rank in (0, 1):
        torch.testing.assert_close(merged[rank], expected)
        torch.testing.assert_close(own[rank], expected[rank::2])


def test_features_are_taken_at_the_trainers_precision():
    def embed(found):
        seen.append(torch.is_autocast_enabled("cpu"))
        return found["image"]

    seen: list[bool] = []
    for precision in ("32-true", "bf16-mixed"):
        features = extract(trainer(precision=precision), embed, [batch(0)], "title")
        assert features.dtype == torch.float32
    assert seen == [False, True]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    return console.file


@pytest.mark.parametrize(
    ("bar", "options", "shown"), [(True, {}, True), (False, {}, False), (True, {"refresh_rate": 0}, False)]
)
def test_a_bar_shows_title_and_progress_where_the_trainer_shows_its_own(terminal, bar, options, shown):
    run = trainer(enable_progress_bar=bar, callbacks=[TQDMProgressBar(**options)] if bar else [])
    batches = list(on_device(run, (batch(i) for i in range(3)), "Some features", 3))
    assert [b["index"].tolist() for b in batches] == [[0], [1], [2]]
    out = terminal.getvalue()
    assert ("Some features" in out) == shown
    assert ("67%" in out) == shown  # two of three
    assert out.rstrip("\n").endswith("\x1b[2K") == shown  # and is gone at the end
    extract(run, lambda b: b["image"], [batch(0)], "Other features")
    assert ("Other features" in terminal.getvalue()) == shown

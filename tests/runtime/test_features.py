import io

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from rich.console import Console

from panda_lightning import PandaError
from panda_lightning.runtime.features import extract, on_device
from panda_lightning.runtime.gathering import gather


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, **{"enable_progress_bar": False, **options}
    )


def batch(*index):
    index = torch.tensor(index)
    return {"index": index, "image": index.view(-1, 1) * torch.tensor([1.0, 10.0]), "label": index}


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


@pytest.mark.parametrize("merged", [False, True])
def test_batches_nowhere_are_a_mistake_that_is_said(as_processes, merged):
    def nothing(rank):
        with pytest.raises(PandaError, match="no images were seen: the loader gave no batch"):
            gather([], merged)

    nothing(0)
    as_processes(2, nothing)
    with pytest.raises(PandaError, match="no images were seen"):
        extract(trainer(), lambda b: b["image"], [], "title", merged)

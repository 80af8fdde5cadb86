import errno
import os

import pytest
import pytorch_lightning as pl
import torch

from panda_lightning import PANDA, ImageFolder, PandaError
from panda_lightning.runtime import checkpoints
from panda_lightning.runtime.checkpoints import WholeCheckpointIO, newest_whole, require_whole


def checkpoint(epoch):
    return {"epoch": epoch, "weights": torch.full((1000,), float(epoch))}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),  # what torch says of it
    ],
)
def test_a_failed_write_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch, error):
    io, path = WholeCheckpointIO(), tmp_path / "deep" / "last.ckpt"

    def full_disk(obj, file):
        file.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(PandaError, match=r"last.ckpt could not be written \(.*\). There is no earlier one."):
            io.save_checkpoint(checkpoint(1), path)
    io.save_checkpoint(checkpoint(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(PandaError, match=rf"could not be written .*resume with --ckpt_path {path}"):
            io.save_checkpoint(checkpoint(2), path)
    assert io.load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_really_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda value, _: real(value, "/dev/full"))
    with pytest.raises(PandaError, match=r"last.ckpt could not be written \(.*\)"):
        WholeCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")


@pytest.mark.parametrize("replaces", [True, False])
def test_a_file_is_mapped_only_where_it_can_be_replaced_nevertheless(tmp_path, monkeypatch, replaces):
    def load(*args, mmap, **options):
        seen.append(mmap)
        return real(*args, mmap=mmap, **options)

    seen, real = [], torch.load
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(checkpoints, "REPLACES_OPEN_FILES", replaces)
    WholeCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert checkpoints.read_tensors(tmp_path / "last.ckpt", mmap=True)["epoch"] == 1
    assert checkpoints.read_tensors(tmp_path / "last.ckpt")["epoch"] == 1
    assert seen == [replaces, False]


def spoil(path, how):
    whole = path.read_bytes()
    middle = whole.index(torch.full((100,), 3.0).numpy().tobytes()) + 1000
    path.write_bytes(
        {
            "cut off": whole[: len(whole) // 2],
            "empty": b"",
            "none": b"this is text",
            "zeros": bytes(len(whole)),
            "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[how]
    )


@pytest.mark.parametrize("how", ["cut off", "empty", "none", "zeros", "one bit"])
def test_a_broken_checkpoint_is_refused_and_the_newest_whole_one_named(tmp_path, how):
    io, paths = WholeCheckpointIO(), [tmp_path / f"{n}.ckpt" for n in (1, 2, 3)]
    for n, path in enumerate(paths, 1):
        io.save_checkpoint(checkpoint(n), path)
        os.utime(path, (n, n))
    spoil(paths[2], how)
    with pytest.warns(UserWarning, match="3.ckpt is broken .* and is skipped"):
        assert newest_whole(tmp_path) == paths[1]
    with pytest.raises(
        PandaError, match=rf"3.ckpt is broken \(.+\). The newest complete one in its folder is {paths[1]}."
    ):
        io.load_checkpoint(paths[2])
    assert io.load_checkpoint(paths[1])["epoch"] == 2
    for path in paths[:2]:
        path.unlink()
    with pytest.raises(PandaError, match="There is no complete one in its folder"):
        require_whole(paths[2])


def test_a_checkpoint_without_checksums_is_taken(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(1), tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert newest_whole(tmp_path) == tmp_path / "a.ckpt"


@pytest.mark.parametrize("plugin", [None, pl.plugins.io.AsyncCheckpointIO()])
def test_it_stands_in_for_lightnings_own_but_not_for_the_users(tmp_path, folder, plugin):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        plugins=[plugin] if plugin else [],
    )
    data = ImageFolder(root=str(folder), image_size=32, normal_class="spot")
    trainer.fit(PANDA("panda_tiny", ewc_weight=0), data)
    assert type(trainer.strategy.checkpoint_io) is (type(plugin) if plugin else WholeCheckpointIO)
    path = trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["state_dict"]["_extra_state"]["derived"]["steps_trained"] == 1

import errno

import pytest
import pytorch_lightning as pl
import torch

from panda_lightning import PANDA, ImageFolder
from panda_lightning.checkpoints import WholeCheckpointIO


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    io, path = WholeCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"epoch": 1}, path)

    def full_disk(obj, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            io.save_checkpoint({"epoch": 2}, path)
    assert io.load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


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
    assert torch.load(path, weights_only=True)["steps"]["trained"] == 1

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from panda_lightning import PANDA
from tests.detectors.test_panda import data, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Counts(PANDA):
    """Counts its banks."""

    made = 0

    def make_bank(self):
        self.made += 1
        return super().make_bank()


@pytest.mark.parametrize(
    ("options", "banks"),
    [
        ({}, 5),  # before training, and with each validation
        ({"limit_val_batches": 0}, 5),  # before training, and at each epoch's end
        ({"check_val_every_n_epoch": 2}, 3),
        ({"check_val_every_n_epoch": 2, "limit_val_batches": 0}, 5),
        ({"val_check_interval": 2}, 6),  # after two batches of each epoch's three, and at the end of the run
        ({"max_steps": 7}, 4),  # before, two epochs, and the step after them
    ],
    ids=str,
)
def test_a_bank_is_made_once_for_the_weights_that_need_one(tmp_path, folder, options, banks):
    detector = Counts("panda_tiny", ewc_weight=0, grad_clip=10.0)
    trainer(tmp_path, 4, **options).fit(detector, data(folder))
    assert detector.made == banks
    assert detector.bank_is_fresh


def test_without_validation_each_epochs_checkpoint_has_its_own_bank(tmp_path, folder):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, 3, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0)
    run.fit(PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0, lr=0.1), data(folder))
    paths = sorted(tmp_path.glob("*.ckpt"))
    found = [PANDA.load_from_checkpoint(path, weights_only=True) for path in paths]
    assert [path.name for path in paths] == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    assert all(detector.bank_is_fresh for detector in found)
    assert not torch.allclose(found[0].bank, found[2].bank)

"""What a run keeps in memory from one epoch to the next."""

import gc

import pytest
import pytorch_lightning as pl
import torch

import panda_lightning as panda
from tests.conftest import make_folder


def tensors():
    gc.collect()
    return [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]  # not fake ones


def alive(*shapes):
    """How many tensors of each shape are there with memory of their own."""
    there = tensors()
    return [len({one.untyped_storage().data_ptr() for one in there if tuple(one.shape) == shape}) for shape in shapes]


@pytest.fixture
def _unseen():
    """What is there before the test is not counted, nor looked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_unseen")
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"shard_bank": True}, {"index_backend": "torch"}])
def test_a_bank_goes_before_the_next_is_made_and_epochs_add_nothing(options, tmp_path):
    folder = make_folder(tmp_path / "images", train=11)
    detector = panda.PANDA("panda_tiny", ewc_weight=100, fisher="ones", grad_clip=1.0, **options)
    data = panda.ImageFolder(str(folder), normal_class="spot", image_size=32, batch_size=4)
    while_made, after = [], []

    class Count(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            make = pl_module.make_bank

            def counted():
                while_made.extend(alive((11, pl_module.backbone.num_features)))
                return make()

            pl_module.make_bank = counted

        def on_train_epoch_start(self, trainer, pl_module):
            hidden = data._shown["normal training"].hidden
            products = pl_module.index._products.rows
            after.append(alive(pl_module.bank.shape, products.shape, hidden.shape))

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, callbacks=[Count()],
    )  # fmt: skip
    trainer.fit(detector, data)
    assert while_made == [0] * 5
    # the bank, also in the scoring space; its side of products; what comes out of the frozen layers
    assert after == [[2 if options.get("normalize") else 1, 1, 1]] * 4

import pytest

from panda_lightning import DN2, PANDA, PandaError
from tests.detectors.test_base import ADAPT, digits, fitted, scored
from tests.detectors.test_panda import trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_trainer_is_for_one_fit(tmp_path):
    detector = PANDA("panda_tiny", **ADAPT)
    runner = fitted(tmp_path, detector, digits())
    runner.fit_loop.max_epochs = 2
    for again in (detector, PANDA("panda_tiny", **ADAPT)):  # Lightning would go on with new optimisers
        with pytest.raises(
            PandaError, match="this Trainer has already made 1 steps: make a new one, and give ckpt_path"
        ):
            runner.fit(again, digits())


def test_another_number_of_steps_is_no_place_to_go_on(tmp_path):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits(batch_size=5)).save_checkpoint(path)
    runner = trainer(tmp_path, 2, accumulate_grad_batches=2)
    with pytest.raises(PandaError, match="an epoch has 2 steps here, but 4 in the run to resume"):
        runner.fit(PANDA("panda_tiny", **ADAPT), digits(batch_size=5), ckpt_path=path)


def test_what_a_test_saved_is_no_run_to_go_on_with(tmp_path):
    detector, runner = PANDA("panda_tiny", **ADAPT), trainer(tmp_path)
    fitted(tmp_path, detector, digits())
    runner.test(detector, digits(), verbose=False)
    runner.save_checkpoint(tmp_path / "tested.ckpt")
    with pytest.raises(PandaError, match="weights were trained for 1 steps, but the Trainer that saved it had made 0"):
        fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits(), epochs=2, ckpt_path=tmp_path / "tested.ckpt")


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_an_untrained_detector_has_no_scores(tmp_path, verb):
    with pytest.raises(PandaError, match="PANDA-EWC is untrained, .*: train it with fit, or give ckpt_path"):
        getattr(trainer(tmp_path), verb)(PANDA("panda_tiny"), digits())


def test_a_checkpoint_is_for_its_own_method(tmp_path):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits()).save_checkpoint(path)
    with pytest.raises(PandaError, match="the checkpoint is from PANDA, not DN2: use PANDA"):
        scored(tmp_path, DN2("panda_tiny"), digits(), ckpt_path=path)


def test_weights_alone_are_no_run_to_go_on_with(tmp_path):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits()).save_checkpoint(path, weights_only=True)
    with pytest.raises(PandaError, match="has only weights .* test it, or start a new run"):
        fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits(), epochs=2, ckpt_path=path)


class ByHand(PANDA):
    def __init__(self):
        super().__init__("panda_tiny")
        self.automatic_optimization = False


def test_steps_that_nobody_counts_are_refused(tmp_path):
    with pytest.raises(
        PandaError, match="PANDA-EWC sets automatic_optimization=False, and its steps would not be counted"
    ):
        fitted(tmp_path, ByHand(), digits())


def test_loaders_alone_are_no_data_module(tmp_path):
    detector = DN2("panda_tiny")
    scored(tmp_path, detector, digits())
    with pytest.raises(
        PandaError, match="DN2 predicts images of a data module, such as UnlabelledImages; got NoneType"
    ):
        trainer(tmp_path).predict(detector, dataloaders=digits().test_dataloader())


@pytest.mark.parametrize(("steps", "said"), [(3, True), (4, False)])
def test_an_epoch_that_was_cut_is_told_when_training_goes_on(tmp_path, recwarn, steps, said):
    def fit(last, path=None):
        run = trainer(tmp_path, -1, max_steps=last)
        run.fit(PANDA("panda_tiny", **ADAPT), digits(batch_size=7, train_limit=14), ckpt_path=path)
        return run

    fit(steps).save_checkpoint(tmp_path / "a.ckpt")
    fit(6, tmp_path / "a.ckpt")
    told = [str(one.message) for one in recwarn if "ended inside an epoch" in str(one.message)]
    assert len(told) == said
    assert all("after 3 steps of 2 an epoch" in one for one in told)

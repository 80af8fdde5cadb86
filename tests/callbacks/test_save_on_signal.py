import signal

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from torch.utils._pytree import keystr, tree_flatten_with_path

from panda_lightning import PANDA, PANDAOE, ImageFolder, SaveOnSignal
from panda_lightning.runtime.systems import ENDING
from tests.conftest import make_clouds, make_folder
from tests.windows import WINDOWS


class Seen(pl.Callback):
    """The images of each step and the AUROC of each validation; does ``act`` at one step."""

    def __init__(self, step=None, act=None):
        self.step, self.act = step, act
        self.steps, self.aurocs = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parts = batch.values() if "normal" in batch else [batch]
        self.steps[trainer.global_step] = [part["index"].tolist() for part in parts]
        if trainer.global_step == self.step:
            self.act()

    def on_validation_end(self, trainer, pl_module):
        self.aurocs[pl_module.steps_trained] = float(trainer.callback_metrics["val/auroc"])


class KilledError(Exception):
    pass


def killed():
    raise KilledError


def fit(
    tmp_path, folder, *callbacks, oe=False, epochs=3, ckpt_path=None, accumulate=1, each=1, interval=1.0, **options
):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0, accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=each, val_check_interval=interval,
        callbacks=list(callbacks), enable_checkpointing=any(
            isinstance(callback, Checkpoint) for callback in callbacks
        ),
    )  # fmt: skip
    data = ImageFolder(
        root=str(folder), image_size=32, crop="squash", normal_class="spot",
        outliers=str(folder.parent / "others") if oe else None, **{"batch_size": 2, **options},
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    detector = PANDAOE("panda_tiny", grad_clip=1.0) if oe else PANDA("panda_tiny", grad_clip=1.0, lr=0.1)
    trainer.fit(detector, data, ckpt_path=ckpt_path)
    return detector


def numbers(detector):
    """All tensors and primitives that a detector holds, but for the name of its run."""
    leaves, _ = tree_flatten_with_path(detector.state_dict())
    return {keystr(path): value for path, value in leaves if "run_id" not in keystr(path)}


def same(one, two):
    one, two = numbers(one), numbers(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(two[name], value) if isinstance(value, torch.Tensor) else two[name] == value, name


@pytest.fixture
def undisturbed(tmp_path, one_thread):
    """Images, and a run on them that nothing happens to: 3 epochs of 6 steps."""
    folder, whole = make_folder(tmp_path / "images"), Seen()
    return folder, whole, fit(tmp_path / "undisturbed", folder, whole)


@pytest.mark.parametrize(("outliers", "on_disk"), [(0, False), (3, True), (14, False)])  # fewer or more than normal
@pytest.mark.usefixtures("one_thread")
def test_a_signal_and_a_resume_are_the_undisturbed_run(tmp_path, folder, outliers, on_disk):
    make_clouds(tmp_path / "others", outliers)
    options = {"oe": outliers > 0} | ({"memory_gb": 0, "num_workers": 1} if on_disk else {})
    whole, part, rest = Seen(), Seen(8, lambda: signal.raise_signal(ENDING[0])), Seen()
    detector = fit(tmp_path, folder, whole, **options)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as status:
        fit(tmp_path, folder, part, SaveOnSignal(), **options)  # 6 steps an epoch: the second step of the second
    assert status.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = fit(tmp_path, folder, rest, SaveOnSignal(), ckpt_path=tmp_path / "checkpoints/last.ckpt", **options)
    assert list(part.steps) == list(range(1, 9))
    assert part.steps | rest.steps == whole.steps
    assert not part.steps.keys() & rest.steps.keys()
    assert part.aurocs | rest.aurocs == whole.aurocs
    same(detector, resumed)


@pytest.mark.parametrize(
    ("batch", "accumulate", "stopped"),
    [(12, 1, 2), (12, 4, 2), (2, 4, 3), (2, 9, 2)],  # an epoch has 1, 1, 6, 6 batches and 1, 1, 2, 1 steps
)
@pytest.mark.usefixtures("one_thread")
def test_a_signal_is_heeded_however_few_steps_an_epoch_has(tmp_path, folder, batch, accumulate, stopped):
    options = {"batch_size": batch, "accumulate": accumulate}
    whole, part, rest = Seen(), Seen(stopped, lambda: signal.raise_signal(signal.SIGTERM)), Seen()
    detector = fit(tmp_path, folder, whole, **options)
    with pytest.raises(SystemExit) as status:
        fit(tmp_path, folder, part, SaveOnSignal(), **options)
    assert status.value.code == 75
    assert max(part.steps) == stopped
    resumed = fit(tmp_path, folder, rest, SaveOnSignal(), ckpt_path=tmp_path / "checkpoints/last.ckpt", **options)
    assert part.aurocs | rest.aurocs == whole.aurocs
    same(detector, resumed)


@pytest.mark.skipif(WINDOWS, reason="Lightning handles no signals there")
def test_a_run_that_sigterm_ends_does_not_look_done(tmp_path, folder):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as status:
        fit(tmp_path, folder, Seen(2, lambda: signal.raise_signal(signal.SIGTERM)))
    assert status.value.code == 128 + signal.SIGTERM  # as of a process that the signal ended at once
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(WINDOWS, reason="Lightning handles no signals there")
def test_work_before_the_first_batch_heeds_sigterm_too(tmp_path, folder):
    class Kill(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            signal.raise_signal(signal.SIGTERM)

    seen = Seen()
    with pytest.raises(SystemExit) as status:
        fit(tmp_path, folder, Kill(), seen)
    assert status.value.code == 128 + signal.SIGTERM
    assert not seen.steps
    assert not seen.aurocs


@pytest.mark.parametrize("step", [1, 5, 6, 13])  # 6 is an epoch's last, whose validation is still to come
def test_a_death_and_a_resume_are_the_undisturbed_run(tmp_path, undisturbed, step):
    def save():
        return ModelCheckpoint(tmp_path / "checkpoints", filename="last", enable_version_counter=False)

    (folder, whole, detector), rest = undisturbed, Seen()
    with pytest.raises(KilledError):
        fit(tmp_path, folder, Seen(step + 1, killed), SaveOnSignal(every_n_steps=1), save())
    path = tmp_path / "checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == step
    resumed = fit(tmp_path, folder, rest, SaveOnSignal(every_n_steps=1), save(), ckpt_path=path)
    assert rest.steps == {n: rows for n, rows in whole.steps.items() if n > step}
    assert rest.aurocs == {n: auroc for n, auroc in whole.aurocs.items() if n > step}
    same(detector, resumed)


@pytest.mark.parametrize("step", [6, 18])
def test_lightnings_own_checkpoint_of_an_epochs_last_step_is_validated_after_a_resume(tmp_path, undisturbed, step):
    def save():
        return ModelCheckpoint(tmp_path / "checkpoints", filename="step", every_n_train_steps=6, save_top_k=1)

    (folder, whole, detector), part, rest = undisturbed, Seen(), Seen()
    part.on_validation_start = lambda trainer, pl_module: killed() if pl_module.steps_trained == step else None
    with pytest.raises(KilledError):
        fit(tmp_path, folder, part, save())
    path = next((tmp_path / "checkpoints").iterdir())
    assert torch.load(path, weights_only=True)["global_step"] == step
    resumed = fit(tmp_path, folder, rest, ckpt_path=path)
    assert part.aurocs | rest.aurocs == whole.aurocs
    same(detector, resumed)


@pytest.mark.parametrize(("outliers", "on_disk"), [(0, False), (0, True), (3, True)])
@pytest.mark.usefixtures("one_thread")
def test_a_step_that_failed_is_made_by_the_run_that_goes_on(tmp_path, folder, outliers, on_disk):
    make_clouds(tmp_path / "others", outliers)
    options = {"oe": outliers > 0} | ({"memory_gb": 0, "num_workers": 1} if on_disk else {})
    whole, part, rest = Seen(), Seen(), Seen()
    detector = fit(tmp_path, folder, whole, **options)
    part.on_before_backward = lambda trainer, pl_module, loss: killed() if trainer.global_step == 8 else None
    with pytest.raises(KilledError):
        fit(tmp_path, folder, part, OnExceptionCheckpoint(tmp_path), **options)
    resumed = fit(tmp_path, folder, rest, ckpt_path=tmp_path / "on_exception.ckpt", **options)
    assert list(part.steps) == list(range(1, 9))
    assert part.steps | rest.steps == whole.steps
    assert part.aurocs | rest.aurocs == whole.aurocs
    same(detector, resumed)


def test_a_validation_that_failed_is_made_by_the_run_that_goes_on(tmp_path, undisturbed):
    (folder, whole, detector), part, rest = undisturbed, Seen(), Seen()
    part.on_validation_batch_end = lambda trainer, pl_module, *_: killed() if pl_module.steps_trained == 6 else None
    with pytest.raises(KilledError):
        fit(tmp_path, folder, part, OnExceptionCheckpoint(tmp_path))
    resumed = fit(tmp_path, folder, rest, ckpt_path=tmp_path / "on_exception.ckpt")
    assert part.steps | rest.steps == whole.steps
    assert part.aurocs | rest.aurocs == whole.aurocs
    same(detector, resumed)


@pytest.mark.parametrize(("each", "interval"), [(1, 2), (2, 0.5), (None, 4)])
@pytest.mark.usefixtures("one_thread")
def test_a_resume_after_any_step_validates_when_the_undisturbed_run_does(tmp_path, folder, each, interval):
    class Keep(Checkpoint):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options = {"each": each, "interval": interval, "epochs": 2}
    whole = Seen()
    fit(tmp_path, folder, whole, Keep(), **options)
    for step in range(2, 13, 2):
        rest = Seen()
        fit(tmp_path, folder, rest, ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert rest.steps == {n: rows for n, rows in whole.steps.items() if n > step}
        assert rest.aurocs == {n: auroc for n, auroc in whole.aurocs.items() if n >= step}


def test_with_several_threads_a_resume_agrees_to_rounding(tmp_path, folder):
    """Threads may add in another order each time: what is promised then is what rounding grows to in so many steps."""
    whole, part, rest = Seen(), Seen(8, lambda: signal.raise_signal(ENDING[0])), Seen()
    detector = fit(tmp_path, folder, whole)
    with pytest.raises(SystemExit):
        fit(tmp_path, folder, part, SaveOnSignal())
    resumed = fit(tmp_path, folder, rest, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert part.steps | rest.steps == whole.steps  # the same images in the same steps, whatever the arithmetic
    assert (part.aurocs | rest.aurocs).keys() == whole.aurocs.keys()
    one, two = numbers(detector), numbers(resumed)
    for name, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            scale = float(value.abs().max())
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)

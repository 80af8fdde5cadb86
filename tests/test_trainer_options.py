"""Every option of Lightning's Trainer works with right numbers, or is refused in a sentence before any work.

Scores are compared, not AUROC alone, which is 1 on these pictures whatever the weights.
"""

import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.trainer.states import TrainerFn

from panda_lightning import PANDA, Backbone, DeepSVDD, ImageFolder, MultiHeadRotNet, PandaError
from panda_lightning.runtime.options import require_options
from tests.conftest import fast, make_folder
from tests.test_cli import curve, refusal, rows
from tests.test_distributed import launch

pytestmark = pytest.mark.usefixtures("one_thread")


class Curve(pl.Callback):
    """Keeps what each validation of fit scored, and the weights after each step."""

    def __init__(self):
        self.epochs, self.scores, self.weights = [], [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.epochs.append(round(float(trainer.callback_metrics["epochs_trained"]), 3))
            self.scores.append(pl_module.scores.score.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: p.detach().clone() for name, p in pl_module.backbone.adapted().items()})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three batches of training images, four of test images; and the test images alone."""
    root = tmp_path_factory.mktemp("options")
    make_folder(root / "all")
    (root / "elsewhere").mkdir()
    (root / "elsewhere/test").symlink_to(root / "all/test")
    return root


def data(folder, **options):
    options = {"batch_size": 4, "eval_batch_size": 4, "image_size": 32, "crop": "squash", **options}
    return ImageFolder(root=str(folder), normal_class="spot", **options)


def panda(**options):
    return PANDA("panda_tiny", **{"ewc_weight": 0, "grad_clip": 10.0, "lr": 0.1, **options})


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{"accelerator": "cpu", "default_root_dir": folder, "max_epochs": 2, **quiet, **options})


def fitted(images, folder, *more, detector=None, module=None, ckpt_path=None, **options):
    """A run with these options: its detector, Trainer and curve, and the checkpoint, where it writes one."""
    found, keep = Curve(), callbacks.ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    writes = [keep] if options.get("enable_checkpointing", True) else []
    run = trainer(folder, **{**options, "callbacks": [*more, found, *writes]})
    detector = detector or panda()
    run.fit(detector, module or data(images / "all"), ckpt_path=ckpt_path)
    return SimpleNamespace(detector=detector, trainer=run, curve=found, last=folder / "last.ckpt")


def scored_by(path, images):
    """Scores by a checkpoint where there are no training images."""
    detector = PANDA.load_from_checkpoint(path, weights_only=True)
    trainer(path.parent, enable_checkpointing=False).test(detector, data(images / "elsewhere"), verbose=False)
    return detector.scores.score


@pytest.fixture(scope="module")
def plain(images):
    """A run of two epochs without any option."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = fitted(images, images / "plain")
    torch.set_num_threads(before)
    return found


# ---- options that change no number --------------------------------------------------------------------------------

NEUTRAL = {
    "profiler": ["simple", "advanced"],
    "detect_anomaly": [True],
    "deterministic": [True, "warn"],
    "benchmark": [True],
    "inference_mode": [False],
    "use_distributed_sampler": [True, False],  # our loaders deal images out themselves
    "sync_batchnorm": [True],  # of one process; of more it is refused, see below
    "reload_dataloaders_every_n_epochs": [1],  # the frozen layers' output is kept all the same
    "num_sanity_val_steps": [2, -1],
    "enable_checkpointing": [False],
    "enable_progress_bar": [True],
    "enable_model_summary": [True],
    "logger": [True],
    "log_every_n_steps": [1],
    "min_epochs": [1],
    "max_time": [timedelta(days=1)],
    "val_check_interval": [1.0, 3],
    "limit_train_batches": [1.0, 99],
    "limit_val_batches": [1.0, 99],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NEUTRAL for value in NEUTRAL[name]])
def test_an_option_that_changes_no_number(plain, images, tmp_path, capsys, name, value):
    run = fitted(images, tmp_path, **{name: value})
    assert run.curve.epochs == [0, 1, 2]
    for ours, theirs in zip(run.curve.scores, plain.curve.scores, strict=True):
        assert torch.equal(ours, theirs)
    assert run.last.exists() == (name != "enable_checkpointing")
    if run.last.exists():
        torch.testing.assert_close(scored_by(run.last, images), run.detector.scores.score, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: callbacks.EarlyStopping("val/auroc", mode="max", patience=9),
        lambda: callbacks.LearningRateMonitor(),
        lambda: callbacks.Timer("00:01:00:00"),
        lambda: callbacks.TQDMProgressBar(),
        lambda: callbacks.RichProgressBar(),
    ],
    ids=["EarlyStopping", "LearningRateMonitor", "Timer", "TQDM", "Rich"],
)
def test_a_callback_that_changes_no_number(plain, images, tmp_path, make):
    run = fitted(images, tmp_path, make(), logger=CSVLogger(tmp_path), enable_progress_bar=True)
    assert torch.equal(torch.stack(run.curve.scores), torch.stack(plain.curve.scores))
    shown = run.trainer.progress_bar_callback.get_metrics(run.trainer, run.detector)
    assert shown.keys() == {"v_num", "val/auroc", "train/loss"}
    assert float(shown["val/auroc"]) == 1


@pytest.mark.pictures
def test_a_profile_lies_beside_each_runs_logs_and_none_is_overwritten(images, tmp_path):
    for version in (0, 1):
        profiler = SimpleProfiler(filename="profile")
        fitted(images, tmp_path, logger=CSVLogger(tmp_path, name="x"), profiler=profiler, max_epochs=1)
        assert (tmp_path / f"x/version_{version}/fit-profile.txt").stat().st_size > 1000
        assert (tmp_path / f"x/version_{version}/report.png").is_file()


# ---- options that change when there is a validation ---------------------------------------------------------------

EVERY_SCORE = 13
COUNTED = [  # options; where validations are; steps; images scored; why
    ({"accumulate_grad_batches": 2}, [0, 1, 2], 4, EVERY_SCORE, "an epoch of three batches is two steps"),
    ({"val_check_interval": 0.5}, [0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], 6, EVERY_SCORE, "half of three is one"),
    ({"val_check_interval": 2}, [0, 2 / 3, 5 / 3, 2], 6, EVERY_SCORE, "the last step of a run is scored too"),
    (
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        [0, 4 / 3, 2], 6, EVERY_SCORE, "batches counted over epochs",
    ),
    ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [0, 2, 3], 9, EVERY_SCORE, "the last epoch is scored too"),
    ({"val_check_interval": "00:01:00:00"}, [0, 2], 6, EVERY_SCORE, "a run that is shorter than the time"),
    ({"max_steps": 4}, [0, 1, 4 / 3], 4, EVERY_SCORE, "ends within an epoch, and its checkpoint has its bank"),
    ({"max_steps": 3, "max_epochs": -1}, [0, 1], 3, EVERY_SCORE, "ends with an epoch: no second validation"),
    ({"limit_train_batches": 2}, [0, 1, 2], 4, EVERY_SCORE, "such an epoch has two steps"),
    ({"limit_train_batches": 0.5}, [0, 1, 2], 2, EVERY_SCORE, "half of three is one"),
    ({"limit_val_batches": 3}, [0, 1, 2], 6, 12, "the first 12 of 13 images"),
    ({"fast_dev_run": 3}, [0, 1], 3, 12, "three batches of everything, nothing is written"),
    ({"min_epochs": 2, "max_epochs": 9}, [0, 1, 2], 6, EVERY_SCORE, "EarlyStopping may stop after two"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "epochs", "steps", "scored", "why"), COUNTED, ids=[str(c[0]) for c in COUNTED])
def test_an_option_that_says_when_to_score(images, tmp_path, options, epochs, steps, scored, why):
    stop = [callbacks.EarlyStopping("val/auroc", mode="max", stopping_threshold=0)] if "min_epochs" in options else []
    run = fitted(images, tmp_path, *stop, **options)
    assert run.curve.epochs == pytest.approx(epochs, abs=1e-3), why
    assert (run.detector.steps_trained, len(run.detector.scores.score)) == (steps, scored)
    assert run.last.exists() == ("fast_dev_run" not in options)
    if run.last.exists():
        torch.testing.assert_close(scored_by(run.last, images)[:scored], run.detector.scores.score, rtol=1e-5, atol=0)


def test_time_may_end_a_run_within_an_epoch(images, tmp_path):
    run = fitted(images, tmp_path, max_epochs=-1, max_time=timedelta(seconds=0.3))
    assert run.curve.epochs[-1] == pytest.approx(run.detector.steps_trained / 3, abs=1e-3)
    torch.testing.assert_close(scored_by(run.last, images), run.detector.scores.score, rtol=1e-5, atol=0)


def test_the_last_step_is_scored_whatever_the_method(images, tmp_path):
    detector, run = MultiHeadRotNet(depth=10, width=1), trainer(tmp_path, max_steps=4, enable_checkpointing=False)
    run.fit(detector, data(images / "all"))
    assert run.callback_metrics["epochs_trained"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(("verb", "count"), [("test", 2), ("predict", 2), ("validate", 2), ("test", 0.5)])
def test_part_of_the_images_may_be_scored(plain, images, tmp_path, verb, count):
    name = {"validate": "val"}.get(verb, verb)
    detector = PANDA.load_from_checkpoint(plain.last, weights_only=True)
    run = trainer(tmp_path, enable_checkpointing=False, **{f"limit_{name}_batches": count})
    if verb == "predict":
        found = torch.cat([batch["score"] for batch in run.predict(detector, data(images / "all"))])
        assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 8
    else:
        with pytest.warns(UserWarning, match="AUROC covers only the first 8 of 13 test images: set data.test_limit"):
            getattr(run, verb)(detector, data(images / "all"), verbose=False)
        found = detector.scores.score
    torch.testing.assert_close(found, plain.detector.scores.score[:8], rtol=1e-5, atol=0)


def test_the_sanity_check_says_nothing_of_parts(images, tmp_path, recwarn):
    fitted(images, tmp_path, max_epochs=1, num_sanity_val_steps=1)
    assert not [w for w in recwarn if "of 13 test images" in str(w.message)]


# ---- weights that are averaged --------------------------------------------------------------------------------------


def averaged(weights, start, decay):
    """EMA by hand; the first step is taken as it is. ``decay`` None: the plain mean."""
    if decay is None:
        return {name: torch.stack([w[name] for w in weights]).mean(dim=0) for name in start}
    found = weights[0]
    for after in weights[1:]:
        found = {name: decay * found[name] + (1 - decay) * after[name] for name in start}
    return found


@pytest.mark.parametrize("decay", [0.5, None], ids=["EMA", "mean"])
def test_averaged_weights_are_scored_and_saved_with_their_own_bank(images, tmp_path, decay):
    average = callbacks.WeightAveraging() if decay is None else callbacks.EMAWeightAveraging(decay=decay)
    run = fitted(images, tmp_path, average)
    kept = torch.load(run.last, weights_only=True)["state_dict"]
    expected = averaged(run.curve.weights, run.detector.start, decay)
    backbone = Backbone.pretrained("panda_tiny", adapt_stages=2)
    for name, value in expected.items():
        torch.testing.assert_close(kept[f"backbone.model.{name}"], value, rtol=1e-5, atol=1e-7)
        backbone.adapted()[name].data.copy_(value)
    assert max(float((value - run.curve.weights[-1][name]).abs().max()) for name, value in expected.items()) > 1e-4
    module = data(images / "all")
    module.interpolation = backbone.interpolation
    normal = module.normal_dataloader().dataset
    with torch.no_grad():
        bank = backbone(normal.__getitems__(range(11))["image"])
    torch.testing.assert_close(kept["_extra_state"]["derived"]["bank"], bank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored_by(run.last, images), run.detector.scores.score, rtol=1e-5, atol=0)


def test_averaging_goes_on_as_if_undisturbed(images, tmp_path):
    def average():
        return callbacks.EMAWeightAveraging(decay=0.5)

    whole = fitted(images, tmp_path / "whole", average(), max_epochs=3)
    first = fitted(images, tmp_path, average(), max_epochs=2)
    second = fitted(images, tmp_path, average(), max_epochs=3, ckpt_path=first.last)
    assert second.curve.epochs == [3]
    torch.testing.assert_close(second.curve.scores[-1], whole.curve.scores[-1], rtol=1e-5, atol=0)


def test_averages_of_epochs_are_saved_with_their_own_bank(images, tmp_path):
    class OfEpochs(callbacks.WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None  # after the epoch's validation

    run = fitted(images, tmp_path, OfEpochs())
    assert PANDA.load_from_checkpoint(run.last, weights_only=True).bank_is_fresh
    assert scored_by(run.last, images).isfinite().all()


# ---- no validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [None, 0.5], ids=["plain", "EMA"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"max_steps": 5}], ids=str)
def test_without_validation_checkpoints_have_a_bank_of_their_weights(images, tmp_path, options, average):
    def more():
        return [callbacks.EMAWeightAveraging(decay=average)] if average else []

    run = fitted(images, tmp_path, *more(), limit_val_batches=0, **options)
    assert run.curve.epochs == []
    with_validation = fitted(images, tmp_path / "with", *more(), **options).detector
    torch.testing.assert_close(scored_by(run.last, images), with_validation.scores.score, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_without_validation_many_processes_are_one(images, tmp_path):
    words = ["fit", *fast(images / "all"), "--model.grad_clip=10", "--model.ewc_weight=0", "--model.shard_bank=true"]
    words += ["--trainer.limit_val_batches=0", "--trainer.use_distributed_sampler=false"]
    words += ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=.5"]
    one, two = (launch(tmp_path, f"on{n}", words, n) / "checkpoints/last.ckpt" for n in (1, 2))
    a, b = (torch.load(p, weights_only=True)["state_dict"]["_extra_state"]["derived"] for p in (one, two))
    assert a["bank"].shape == (11, 256)
    torch.testing.assert_close(b["bank"], a["bank"], rtol=1e-4, atol=1e-4 * float(a["bank"].abs().max()))
    torch.testing.assert_close(scored_by(two, images), scored_by(one, images), rtol=1e-3, atol=1e-4)


# ---- what is refused ----------------------------------------------------------------------------------------------

REFUSED = [
    ({"overfit_batches": 1}, "overfit_batches=1 uses the first images.* data.train_limit and data.test_limit"),
    ({"overfit_batches": 0.5}, "overfit_batches=0.5 uses the first images"),
    ({"limit_train_batches": 0}, "limit_train_batches=0 leaves no batches to fit"),
    ({"limit_train_batches": 0.1}, "limit_train_batches=0.1 of 3 batches leaves none: choose 0.333 or more"),
    ({"limit_val_batches": 0.1}, "limit_val_batches=0.1 of 4 batches leaves none: choose 0.25 or more"),
    ({"val_check_interval": 9}, "val_check_interval=9 is more than the 3 batches of an epoch"),
    ({"val_check_interval": 3, "limit_train_batches": 2}, "val_check_interval=3 is more than the 2 batches"),
    ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 would be ignored: set model.grad_clip"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 is not allowed"),
]  # fmt: skip
CALLBACKS = [
    (lambda: callbacks.StochasticWeightAveraging(0.01), "resets BatchNorm .* use WeightAveraging or EMAWeightAv"),
    (lambda: callbacks.EMAWeightAveraging(update_starting_at_epoch=1), "=1 averages .*update_starting_at_step"),
    (lambda: callbacks.GradientAccumulationScheduler({0: 2}), "number of steps .*accumulate_grad_batches"),
    (lambda: callbacks.LearningRateFinder(), "set model.lr"),
    (lambda: callbacks.BatchSizeFinder(), "set data.batch_size"),
    (lambda: callbacks.BackboneFinetuning(), "set model.adapt_stages"),
    (lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5), "renames weights"),
]


@pytest.fixture
def undecoded(monkeypatch):
    monkeypatch.setattr("panda_lightning.datamodules.base.decoded", lambda *_: pytest.fail("decoded first"))


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[str(options) for options, _ in REFUSED])
@pytest.mark.usefixtures("undecoded")
def test_an_option_that_cannot_be_right_is_refused_before_images_are_decoded(images, tmp_path, options, sentence):
    with pytest.raises(PandaError, match=sentence):
        fitted(images, tmp_path, **options)


def test_sync_batchnorm_has_nothing_to_do(tmp_path):
    run = pl.Trainer(accelerator="cpu", strategy="ddp", devices=1, sync_batchnorm=True, default_root_dir=tmp_path)
    run.state.fn = TrainerFn.FITTING  # a real fit would leave its process group to the tests that follow
    with pytest.raises(PandaError, match="sync_batchnorm=true has no effect"):
        require_options(run)


@pytest.mark.usefixtures("undecoded")
def test_barebones_leaves_out_what_training_is_judged_by(images, tmp_path):
    run = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(PandaError, match="barebones=true turns off the metrics"):
        run.fit(panda(), data(images / "all"))


@pytest.mark.parametrize(("make", "sentence"), CALLBACKS, ids=[str(i) for i in range(len(CALLBACKS))])
@pytest.mark.usefixtures("undecoded")
def test_a_callback_that_cannot_be_right_is_refused(images, tmp_path, make, sentence):
    callback = make()
    with pytest.raises(PandaError, match=f"^{type(callback).__name__}.*{sentence}"):
        fitted(images, tmp_path, callback)


@pytest.mark.usefixtures("undecoded")
def test_a_network_that_is_not_there_yet_cannot_be_averaged(images, tmp_path):
    run = trainer(tmp_path, callbacks=[callbacks.WeightAveraging()], enable_checkpointing=False)
    with pytest.raises(PandaError, match="DeepSVDD makes its network only when it knows its images"):
        run.fit(DeepSVDD(pretrain_epochs=1), data(images / "all"))


@pytest.mark.parametrize(("verb", "name"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
@pytest.mark.usefixtures("undecoded")
def test_nothing_to_score_is_refused(images, tmp_path, verb, name):
    run = trainer(tmp_path, **{f"limit_{name}_batches": 0})
    with pytest.raises(PandaError, match=f"limit_{name}_batches=0 leaves no batches to {verb}"):
        getattr(run, verb)(panda(), data(images / "all"))


# ---- the same from the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trainer.overfit_batches=2"], "set data.train_limit and data.test_limit"),
        (
            ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=.01"],
            "StochasticWeightAveraging resets BatchNorm",
        ),
        (["--trainer.val_check_interval=9"], "val_check_interval=9 is more than the 3 batches"),
        (["--trainer.limit_val_batches=.1"], "limit_val_batches=0.1 of 4 batches leaves none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_refuses_them_too(run, capsys, images, workdir, words, sentence):
    said = refusal(run, capsys, "fit", *fast(images / "all"), *words)
    assert re.search(sentence, said), said
    assert not list((workdir / "runs").rglob("*.ckpt"))


def test_last_of_a_run_with_averages_is_tested_with_its_last_auroc(run, workdir, images):
    words = [*fast(images / "all"), "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=.5"]
    words += ["--model.grad_clip=10", "--model.lr=.1", "--model.ewc_weight=0"]
    run("fit", *words)
    run("test", *words, "--ckpt_path=last")
    trained, scored = (workdir / f"runs/t/version_{n}" for n in (0, 1))
    assert curve(scored, "test/auroc") == [curve(trained)[-1]]
    assert [row["epochs_trained"] for row in rows(scored / "metrics.csv")] == ["2.0"]


# ---- who chooses the epoch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: callbacks.EarlyStopping("val/auroc", mode="max", stopping_threshold=0.0), True),
        (lambda folder: callbacks.ModelCheckpoint(folder / "best", monitor="val/auroc", mode="max"), True),
        (lambda folder: callbacks.EarlyStopping("train/loss"), False),
        (lambda folder: callbacks.ModelCheckpoint(folder / "all", every_n_epochs=2), False),
    ],
    ids=["EarlyStopping, AUROC", "ModelCheckpoint, AUROC", "EarlyStopping, loss", "ModelCheckpoint"],
)
def test_where_test_labels_choose_the_epoch_it_is_said(images, tmp_path, caplog, make, says):
    callback = make(tmp_path)
    with caplog.at_level("INFO"):
        run = fitted(images, tmp_path, callback)
    sentence = f"{type(callback).__name__} monitors val/auroc: test labels then choose the epoch"
    assert caplog.text.count("an oracle result") == caplog.text.count(sentence) == says
    stopped = isinstance(callback, callbacks.EarlyStopping) and says
    assert run.curve.epochs == ([0, 1] if stopped else [0, 1, 2])
    for path in [run.last, *tmp_path.glob("best/*.ckpt")]:
        assert scored_by(path, images).isfinite().all()

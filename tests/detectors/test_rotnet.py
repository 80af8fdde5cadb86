from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from panda_lightning import MultiHeadRotNet, PandaError
from panda_lightning.networks.scratch import Dropout
from tests.callbacks.test_save_on_signal import Seen
from tests.detectors.test_panda import data, trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depth": 10, "width": 1}


def transformed(image, turn, right, down, shift=8):
    padded = np.pad(np.rot90(image, turn, (1, 2)), ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
    top, left = shift - down, shift - right
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def chances(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def test_the_score_sums_over_all_36_transforms(folder):
    torch.manual_seed(0)
    detector, module = MultiHeadRotNet(**SMALL).eval(), data(folder)
    module.setup("test")
    batch = module.test_dataloader().dataset.__getitems__(range(3))
    with torch.no_grad():
        got = detector.anomaly_score(batch)
        for image, score in zip(batch["image"].numpy(), got, strict=True):
            expected = 0.0
            for turn in range(4):
                for x in range(3):
                    for y in range(3):
                        moved = transformed(image, turn, (x - 1) * 8, (y - 1) * 8).astype(np.float32)
                        out = detector.head(detector.network(torch.from_numpy(moved[None] / 127.5 - 1)))[0].numpy()
                        heads = (out[:4], out[4:7], out[7:])
                        expected -= sum(chances(h)[t] for h, t in zip(heads, (turn, x, y), strict=True))
            np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_the_loss_is_the_mean_of_three_cross_entropies(folder, tmp_path):
    torch.manual_seed(0)
    steps = []

    class Watched(MultiHeadRotNet):
        def logits(self, images, transform):
            found = super().logits(images, transform)
            if self.training:
                steps.append((transform, [f.detach().numpy() for f in found]))
            return found

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    trainer(tmp_path, epochs=1).fit(Watched(**SMALL), data(folder))
    assert len(losses) == 3
    for loss, (transform, heads) in zip(losses, steps, strict=True):
        errors = [
            -np.log(chances(head[b])[t[b]])
            for head, t in zip(heads, transform.T.numpy(), strict=True)
            for b in range(len(head))
        ]
        np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)
    kinds = torch.cat([t for t, _ in steps])
    assert kinds.amax(dim=0).tolist() == [3, 2, 2]  # each kind is drawn
    assert kinds.amin(dim=0).tolist() == [0, 0, 0]


def fit(detector, folder, tmp_path, path=None, stop=None):
    """Three epochs of three steps, or the first ``stop`` of them; the checkpoint's path."""
    saved = ModelCheckpoint(dirpath=tmp_path / f"{stop}-{path is None}", filename="last")
    run = trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[saved])
    if stop:
        detector.on_train_epoch_end = lambda: setattr(run, "should_stop", run.current_epoch + 1 == stop)
    run.fit(detector, data(folder), ckpt_path=path)
    return saved.best_model_path


def test_the_rate_falls_along_a_cosine_and_a_resumed_run_is_the_undisturbed_one(folder, tmp_path):
    rates = []

    class Watched(MultiHeadRotNet):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def run(path=None, stop=None):
        torch.manual_seed(0)
        detector = Watched(**SMALL)
        return detector, fit(detector, folder, tmp_path, path, stop)

    whole, _ = run()
    np.testing.assert_allclose(rates, [0.1 * (1 + np.cos(np.pi * i / 9)) / 2 for i in range(9)], rtol=1e-6)
    _, path = run(stop=1)
    resumed, _ = run(path)
    torch.testing.assert_close(resumed.scores.score, whole.scores.score, rtol=1e-3, atol=1e-3)
    again = MultiHeadRotNet.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert again.steps_trained == 3


def test_a_resumed_run_draws_the_dropout_of_the_undisturbed_one(folder, tmp_path):
    def run(path=None, stop=None):
        """Where dropout, given ones, returned zeros at each step."""
        torch.manual_seed(0 if path is None else 1)  # another process draws other numbers
        detector, steps = MultiHeadRotNet(**SMALL), []
        dropout = next(module for module in detector.modules() if isinstance(module, Dropout))
        dropout.register_forward_pre_hook(lambda module, x: torch.ones_like(x[0]))
        dropout.register_forward_hook(lambda module, x, out: steps.append(out == 0) if module.training else None)
        return steps, fit(detector, folder, tmp_path, path, stop)

    whole, _ = run()
    first, path = run(stop=1)
    rest, _ = run(path)
    assert len(whole) == 9
    for ours, theirs in zip([*first, *rest], whole, strict=True):
        assert 0.2 < theirs.double().mean() < 0.4
        assert torch.equal(ours, theirs)
    assert not torch.equal(whole[0], whole[3])  # one batch in its place after the other: each step draws anew


def test_a_run_that_is_resumed_to_be_longer_has_the_rates_of_its_new_length(folder, tmp_path):
    """Also a finished one, whose rate had come to 0; and what an earlier version saved, with torch's own schedule."""

    def run(epochs, path=None):
        rates = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer, *args):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        saved = ModelCheckpoint(tmp_path / f"{epochs}", filename="last")
        fit = trainer(tmp_path, epochs, enable_checkpointing=True, callbacks=[Rates(), saved])
        fit.fit(MultiHeadRotNet(**SMALL), data(folder), ckpt_path=path)
        return rates, Path(saved.best_model_path)

    whole, _ = run(4)
    first, path = run(2)
    assert run(4, path)[0] == whole[6:] == sorted(whole[6:], reverse=True)
    assert first != whole[:6]
    saved = torch.load(path, weights_only=True)
    steps = saved["lr_schedulers"][0].pop("steps")
    saved["lr_schedulers"][0] |= {"T_max": steps, "eta_min": 0.0}
    torch.save(saved, tmp_path / "earlier.ckpt")
    assert run(4, tmp_path / "earlier.ckpt")[0] == whole[6:]


@pytest.mark.parametrize("step", [1, 5, 6])  # of 9 in three epochs; 6 is validated after the resume
def test_a_run_resumed_within_an_epoch_goes_on_with_the_batches_that_were_left(folder, tmp_path, step):
    """Asking for the number of steps, for the schedule, makes Lightning forget the loader's place."""

    def run(path=None):
        torch.manual_seed(0)
        detector, seen = MultiHeadRotNet(**SMALL), Seen()
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1 if path is None else 0)
        fit = trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[seen, every])
        fit.fit(detector, data(folder), ckpt_path=path)
        return detector, seen

    whole, undisturbed = run()
    resumed, rest = run(tmp_path / f"step={step}.ckpt")
    assert rest.steps == {number: images for number, images in undisturbed.steps.items() if number > step}
    assert rest.aurocs == {number: auroc for number, auroc in undisturbed.aurocs.items() if number >= step}
    assert torch.equal(resumed.scores.score, whole.scores.score)


def test_batches_of_a_step_and_other_seeds_drop_anew(folder, tmp_path):
    def run(seed):
        detector, drawn = MultiHeadRotNet(**SMALL), []
        dropout = next(module for module in detector.modules() if isinstance(module, Dropout))
        dropout.register_forward_pre_hook(lambda module, x: torch.ones_like(x[0]))
        dropout.register_forward_hook(lambda module, x, out: drawn.append(out == 0) if module.training else None)
        trainer(tmp_path, 1, accumulate_grad_batches=2).fit(detector, data(folder, seed=seed))
        return drawn

    first, second, _ = run(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(1)[0])


@pytest.mark.parametrize("epochs", [-1, None])  # Lightning makes -1 of None where max_time is given
def test_a_run_without_an_end_is_refused_before_images_are_decoded(folder, tmp_path, epochs):
    said = "max_epochs=-1 sets no end, but MultiHeadRotNet's .*: set max_epochs to 1 or more, or max_steps"
    module = data(folder)
    with pytest.raises(PandaError, match=said):
        trainer(tmp_path, epochs, max_time="00:00:10:00").fit(MultiHeadRotNet(**SMALL), module)
    assert not module.decoded
    trainer(tmp_path, -1, max_steps=2).fit(MultiHeadRotNet(**SMALL), data(folder))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_may_have_hardly_any_steps(folder, tmp_path, steps):
    detector = MultiHeadRotNet(**SMALL)
    trainer(tmp_path, -1, max_steps=steps).fit(detector, data(folder))
    assert detector.steps_trained == steps


@pytest.mark.parametrize("depth", [4, 9, 12])
def test_a_depth_that_no_such_network_has_is_refused(depth):
    with pytest.raises(PandaError, match=f"depth={depth} is not that of a WideResNet: choose 10, 16, 22"):
        MultiHeadRotNet(depth=depth)

"""Scores without a Trainer: the same number through every door, its p-value, and what it is made of."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import DN2, PANDA, ImageFolder, PandaError, UnlabelledImages
from tests.conftest import make_clouds, make_folder
from tests.test_any_order import DETECTORS, trainer
from tests.windows import WINDOWS


def images(folder, **options):
    kept = {"normal_class": "spot", "image_size": 32, "batch_size": 4, "eval_batch_size": 5, "num_workers": 0}
    return ImageFolder(str(folder), **kept | options)


def learned(detector, data, tmp_path):
    """The detector after fit, or after a test where it trains nothing."""
    run = trainer(tmp_path, 2)
    if detector.learns:
        run.fit(detector, data)
    else:
        run.test(detector, data, verbose=False)
    return run


def close(found, expected):
    expected = np.asarray(expected, dtype=np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", DETECTORS)
def test_every_door_gives_the_same_score(tmp_path, folder, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    outliers = str(make_clouds(tmp_path / "clouds", 8)) if name == "PANDA-OE" else None
    detector, data = DETECTORS[name](), images(folder, outliers=outliers, calibration_fraction=0.4)
    run = learned(detector, data, tmp_path)
    expected = detector.scores.score.numpy()
    run.save_checkpoint("last.ckpt")

    names = [str(folder / n) for n in data.names(data.test_images)]
    close(detector.score(names).score, expected)
    trainer(tmp_path).test(detector, data, verbose=False)
    close(detector.scores.score.numpy(), expected)
    for batch_size in (1, 32):
        again = type(detector).load_from_checkpoint("last.ckpt")
        found = again.score(folder / "test", batch_size=batch_size, alpha=0.25)
        assert found.names == names
        close(found.score, expected)

    again = type(detector).load_from_checkpoint("last.ckpt")
    for data in (images(folder), UnlabelledImages(str(folder / "test"), num_workers=0)):
        outputs = trainer(tmp_path).predict(again, data)
        close(torch.cat([output["score"] for output in outputs]), expected)
        rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
        close([float(row["score"]) for row in rows], expected)
        np.testing.assert_array_equal([float(row["p_value"]) for row in rows], found.p_value)
        assert [row["anomalous"] for row in rows] == [""] * len(rows)  # .05 needs 19 calibration images


class Rooted(DN2):
    """A user's own score."""

    def anomaly_score(self, batch):
        return super().anomaly_score(batch).sqrt()


def test_a_score_of_the_users_own_goes_through_every_door(tmp_path, folder):
    detector = Rooted("panda_tiny")
    learned(detector, images(folder), tmp_path)
    found = detector.score(folder / "test")
    close(found.score, detector.scores.score.numpy())
    assert found.neighbours is None  # they would explain another score


def test_half_precision_is_that_of_the_run(tmp_path, folder):
    detector = DN2("panda_tiny")
    run = trainer(tmp_path)
    run = type(run)(
        accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    run.test(detector, images(folder), verbose=False)
    found = detector.score(folder / "test").score
    np.testing.assert_allclose(found, detector.scores.score, rtol=0.02)
    wide = DN2("panda_tiny")
    trainer(tmp_path).test(wide, images(folder), verbose=False)
    assert np.abs(wide.scores.score.numpy() - found).max() > 1e-4 * found.max()


def test_state_is_made_ready_once_and_again_after_a_change(tmp_path, folder, monkeypatch):
    detector = DN2("panda_tiny", k=1)
    learned(detector, images(folder), tmp_path)
    one = detector.score(folder / "test")
    calls = []
    monkeypatch.setattr(DN2, "fit_index", lambda self, real=DN2.fit_index: calls.append(1) or real(self))
    detector.score(folder / "test")
    assert not calls
    detector.k = 3
    three = detector.score(folder / "test")
    assert calls
    np.testing.assert_allclose(three.distances[:, 0], one.score, rtol=1e-6)
    np.testing.assert_allclose(three.distances[:, :3].sum(axis=1), three.score, rtol=1e-6)
    with torch.no_grad():
        next(detector.parameters()).mul_(2)
    with pytest.raises(PandaError, match="no bank of normal images for its weights"):
        detector.score(folder / "test")


def test_a_checkpoint_from_before_calibrations_scores_and_has_no_p_values(tmp_path, folder):
    detector = PANDA("panda_tiny")
    run = learned(detector, images(folder), tmp_path)
    run.save_checkpoint(tmp_path / "new.ckpt")
    old = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for name in ("bank_names", "held_out", "first_neighbours", "first_rank"):
        old["state_dict"]["_extra_state"]["derived"].pop(name, None)
    torch.save(old, tmp_path / "old.ckpt")
    found = PANDA.load_from_checkpoint(tmp_path / "old.ckpt").score(folder / "test")
    close(found.score, detector.scores.score.numpy())
    assert found.p_value is None
    assert found.neighbours[0, 0].isdecimal()  # names are not known, rows are


def test_objects_score_twice_with_other_data_between(tmp_path, folder):
    other = make_folder(tmp_path / "other", train=15)
    for n in range(15):  # another normal class under the same name
        (other / f"train/spot/{n:03d}.png").write_bytes((other / f"test/stripe/{n % 6:03d}.png").read_bytes())
    detector, found = DN2("panda_tiny"), []
    for data in (images(folder), images(other), images(folder)):
        trainer(tmp_path).test(detector, data, verbose=False)
        found.append(detector.score(folder / "test"))
        fresh = DN2("panda_tiny")
        trainer(tmp_path).test(fresh, data, verbose=False)
        expected = fresh.score(folder / "test")
        np.testing.assert_array_equal(found[-1].score, expected.score)
        np.testing.assert_array_equal(found[-1].p_value, expected.p_value)
        assert (found[-1].neighbours == expected.neighbours).all()
    np.testing.assert_array_equal(found[0].score, found[2].score)
    assert np.abs(found[0].score - found[1].score).max() > 1


def test_a_callback_serves_two_predictions(tmp_path, folder, monkeypatch):
    from panda_lightning.callbacks import Predictions

    monkeypatch.chdir(tmp_path)
    detector, table = DN2("panda_tiny"), Predictions()
    learned(detector, images(folder), tmp_path)
    pairs = ((UnlabelledImages(str(folder / "test/spot"), num_workers=0), 7), (images(folder), 13)) * 2
    for (data, rows), end in zip(pairs, ("", "-v1", "-v2", "-v3"), strict=True):
        run = trainer(tmp_path)
        run.callbacks.append(table)
        run.predict(detector, data)
        assert len(list(csv.DictReader((tmp_path / f"predictions{end}.csv").open()))) == rows
    assert not list(tmp_path.glob("predictions.part*"))


def test_scoring_leaves_the_detector_as_it_was(tmp_path, folder):
    detector = DETECTORS["RotNet"]()
    learned(detector, images(folder), tmp_path)
    detector.train()
    before = {name: t.clone() for name, t in detector.state_dict().items() if isinstance(t, torch.Tensor)}
    detector.score(folder / "test")
    assert detector.training
    assert all(torch.equal(before[name], detector.state_dict()[name]) for name in before)


@pytest.mark.parametrize("make", [lambda: DN2("panda_tiny"), lambda: PANDA("panda_tiny")])
def test_a_detector_that_has_learned_nothing_says_so(make, folder):
    with pytest.raises(PandaError, match="is untrained|has not seen any normal images yet"):
        make().score(folder / "test")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.0}, "alpha=0.0 is not allowed"),
        ({"alpha": 1.5}, "alpha=1.5 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"alpha": 0.01}, "alpha=0.01 needs 99 calibration images or more, and there are 4"),
    ],
)
def test_options_are_checked(tmp_path, folder, options, said):
    detector = DN2("panda_tiny")
    learned(detector, images(folder, calibration_fraction=0.4), tmp_path)
    with pytest.raises(PandaError, match=said):
        detector.score(folder / "test", **options)


def test_a_k_that_the_bank_has_not_is_refused(tmp_path, folder):
    detector = DN2("panda_tiny")
    learned(detector, images(folder), tmp_path)
    detector.k = 12
    with pytest.raises(PandaError, match="k=12 neighbours cannot be found in a bank of 11"):
        detector.score(folder / "test")


def test_tests_and_predictions_compute_as_the_run_did(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector, data = PANDA("panda_tiny"), images(folder, calibration_fraction=0.4)
    half = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    run = type(trainer(tmp_path))(precision="bf16-mixed", max_epochs=1, **half)
    run.fit(detector, data)
    run.save_checkpoint("last.ckpt")
    expected = detector.scores.score
    again = PANDA.load_from_checkpoint("last.ckpt")
    for options in ({}, {"precision": "bf16-mixed"}):
        outputs = type(run)(**half, **options).predict(again, images(folder))
        np.testing.assert_allclose(torch.cat([output["score"] for output in outputs]), expected, rtol=1e-5)
        assert next(csv.DictReader((tmp_path / "predictions.csv").open()))["p_value"]
        type(run)(**half, **options).test(again, images(folder), verbose=False)
        np.testing.assert_allclose(again.scores.score, expected, rtol=1e-5)
    whole = PANDA("panda_tiny")
    type(run)(max_epochs=1, **half).fit(whole, data)
    with pytest.warns(UserWarning, match="precision or weights have changed"):
        type(run)(**half, precision="bf16-mixed").predict(whole, data)
    assert not next(csv.DictReader((tmp_path / "predictions-v2.csv").open()))["p_value"]


def test_nothing_is_said_of_what_cannot_be_read(tmp_path, folder):
    detector = DN2("panda_tiny")
    learned(detector, images(folder), tmp_path)
    found = detector.score([folder / "test/spot/100.png", "gone.png"], maps=True)
    assert np.isnan(found.score[1])
    assert np.isnan(found.distances[1]).all()
    assert np.isnan(found.maps[1]).all()
    assert set(found.neighbours[1]) == {""}
    assert np.isfinite(found.maps[0]).all()


# ---- lightning predict ----


def test_predict_needs_no_config_and_writes_a_table(run, workdir, folder, caplog):
    detector = PANDA("panda_tiny", lr=0.1, grad_clip=1.0)
    learned(detector, images(folder, calibration_fraction=0.4), workdir).save_checkpoint("last.ckpt")
    loose = make_folder(workdir / "loose", train=0, normal=3, anomalous=2) / "test"
    (loose / "broken.png").write_text("no image")
    run("predict", "--ckpt_path=last.ckpt", f"--data.images={loose}", "--alpha=0.2", "--alpha_fdr=0.5")
    made = workdir / "lightning_logs/version_0"
    rows = [json.loads(line) for line in (made / "predictions.jsonl").read_text().splitlines()]
    found = detector.score(loose, alpha=0.2)
    assert [row["path"] for row in rows] == found.names
    assert [row["anomalous"] for row in rows] == [
        None if reason else flag for flag, reason in zip(found.anomalous.tolist(), found.unreadable, strict=True)
    ]
    assert rows[0] == {
        "path": str(loose / "broken.png"), "score": None, "p_value": None, "anomalous": None, "anomalous_fdr": None,
        "neighbours": [], "unreadable": "not an image",
    }  # fmt: skip
    assert [n["path"] for n in rows[1]["neighbours"]] == found.neighbours[1].tolist()
    table = list(csv.DictReader((made / "predictions.csv").open()))
    assert float(table[1]["distance_5"]) == pytest.approx(found.distances[1, 4], rel=1e-5)
    assert "4 normal images held out" in caplog.text
    assert "On average at most 20.0% of new normal images are flagged" in caplog.text
    assert not list(made.glob("predictions.part*"))


def test_predict_goes_on_where_it_was_cut_short(run, workdir, folder, monkeypatch, caplog):
    from panda_lightning.callbacks import Predictions

    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    words = ["predict", "--ckpt_path=last.ckpt", f"--data.images={folder / 'test'}", "--data.eval_batch_size=2"]
    whole = DN2.load_from_checkpoint("last.ckpt").score(folder / "test")
    write, batches = Predictions._write, []

    def dying(self, rows):
        batches.append(rows)
        if len(batches) == 4:  # the header and two batches stay, and half of a third
            self._file.write(json.dumps(rows[0]).encode()[:20])
            self._file.flush()
            raise OSError(28, "No space left on device")
        write(self, rows)

    monkeypatch.setattr(Predictions, "_write", dying)
    with pytest.raises((OSError, SystemExit)):
        run(*words)
    monkeypatch.setattr(Predictions, "_write", write)
    run(*words)
    assert "9 images to score; 4 were scored before" in caplog.text
    rows = list(csv.DictReader((workdir / "lightning_logs/version_1/predictions.csv").open()))
    assert [row["path"] for row in rows] == whole.names
    close([float(row["score"]) for row in rows], whole.score)
    assert not list((workdir / "lightning_logs").rglob("predictions.part*"))
    caplog.clear()
    run(*words)
    assert "13 images to score" in caplog.text  # what is done is not taken up again


def test_predict_on_changed_images_starts_anew(run, workdir, folder, monkeypatch, caplog):
    from panda_lightning.callbacks import Predictions

    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    words = ["predict", "--ckpt_path=last.ckpt", f"--data.images={folder / 'test'}", "--data.eval_batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "_finish", lambda self: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises((OSError, SystemExit)):
            run(*words)
    Image.new("RGB", (40, 40), "red").save(folder / "test/spot/100.png")
    caplog.clear()
    run(*words)
    assert "13 images to score\n" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.images=nowhere"], "nowhere is not a file or a folder"),
        (["--data.images=empty"], "there are no images in empty"),
        (["--data.images=bad"], "none of the 2 images can be read"),
        (["--data.images=images/test", "--alpha=0"], "alpha"),
        (["--data.images=images/test", "--alpha=0.001"], "alpha=0.001 needs 999 calibration images or more"),
        (["--ckpt_path=gone.ckpt", "--data.images=images/test"], "gone.ckpt is not a file"),
    ],
)
def test_predict_refuses_in_a_sentence(run, workdir, folder, capsys, words, said):
    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    (workdir / "empty").mkdir()
    (workdir / "bad").mkdir()
    for name in "ab":
        (workdir / f"bad/{name}.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        run("predict", *([] if "ckpt" in words[0] else ["--ckpt_path=last.ckpt"]), *words)
    assert said in f"{stopped.value} {capsys.readouterr().err}"


class Runs:
    """What a hostile checkpoint would do."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("kind", ["code", "cut", "foreign", "weights", "no bank", "text"])
def test_predict_refuses_other_checkpoints(run, workdir, folder, kind, capsys):
    detector = DN2("panda_tiny")
    learned(detector, images(folder), workdir).save_checkpoint("last.ckpt")
    whole = torch.load("last.ckpt", weights_only=True)
    if kind == "code":
        torch.save({**whole, "callbacks": Runs()}, "last.ckpt")
    elif kind == "cut":
        data = (workdir / "last.ckpt").read_bytes()
        (workdir / "last.ckpt").write_bytes(data[: len(data) // 2])
    elif kind == "foreign":
        torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {}}, "last.ckpt")
    elif kind == "weights":
        torch.save({"state_dict": whole["state_dict"]}, "last.ckpt")
    elif kind == "no bank":
        whole["state_dict"]["_extra_state"]["derived"]["bank"] = None
        torch.save(whole, "last.ckpt")
    else:
        (workdir / "last.ckpt").write_text("no checkpoint")
    with pytest.raises(SystemExit) as stopped:
        run("predict", "--ckpt_path=last.ckpt", f"--data.images={folder / 'test'}")
    said = f"{stopped.value} {capsys.readouterr().err}"
    expected = {
        "code": "may contain only tensors and primitives", "cut": "is broken", "foreign": "has no format number",
        "weights": "required: predict.model", "no bank": "has no bank for its weights", "text": "is broken",
    }  # fmt: skip
    assert expected[kind] in said
    assert not (workdir / "ran").exists()
    assert not list(workdir.rglob("predictions.*"))


def cut_short(run, words, monkeypatch):
    """Run predict until its table is to be made."""
    from panda_lightning.callbacks import Predictions

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "_finish", lambda self: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises((OSError, SystemExit)):
            run(*words)


def test_what_could_not_be_read_is_tried_again(run, workdir, folder, monkeypatch, caplog):
    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    words = ["predict", "--ckpt_path=last.ckpt", f"--data.images={folder / 'test'}"]
    cut_short(run, [*words, "--data.max_megapixels=0.0005"], monkeypatch)
    caplog.clear()
    run(*words)
    assert "13 images to score" in caplog.text
    rows = list(csv.DictReader((workdir / "lightning_logs/version_1/predictions.csv").open()))
    assert not any(row["unreadable"] for row in rows)


def test_an_attempt_is_taken_up_by_one_run_alone(workdir, folder):
    from panda_lightning.callbacks.predictions import _taken

    part = workdir / "predictions.part-1.jsonl"
    part.write_text('{"identity": "a"}\n')
    assert _taken(part, "b") is None
    first = _taken(part, "a")
    assert first is not None
    assert _taken(part, "a") is None
    first.close()
    again = _taken(part, "a")
    assert again is not None
    again.close()


@pytest.mark.skipif(WINDOWS, reason="the signal ends a process there at once")
def test_sigterm_ends_predict_with_its_status(workdir, folder):
    import signal
    import subprocess
    import sys
    import time

    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    (workdir / "many.txt").write_text("\n".join([str(folder / "test/spot/100.png")] * 60_000))
    words = ["predict", "--ckpt_path=last.ckpt", "--data.images=many.txt", "--data.eval_batch_size=20"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    process = subprocess.Popen([sys.executable, "-m", "panda_lightning", *words], stderr=subprocess.DEVNULL)
    try:
        part, deadline = None, time.monotonic() + 120
        while time.monotonic() < deadline and (part is None or part.stat().st_size < 5000):
            part = next(iter((workdir / "lightning_logs").glob("version_0/predictions.part-*")), None)
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert part.is_file()


def test_flags_of_loose_images_come_in_any_order(run, workdir, folder):
    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    run("predict", "--ckpt_path=last.ckpt", "--data.eval_batch_size=4", f"--data.images={folder / 'test'}")
    assert (workdir / "lightning_logs/version_0/predictions.csv").is_file()


def test_maps_of_an_earlier_run_are_not_claimed(run, workdir, folder, caplog):
    learned(DN2("panda_tiny"), images(folder), workdir).save_checkpoint("last.ckpt")
    words = ["predict", "--ckpt_path=last.ckpt", f"--data.images={folder / 'test'}", "--trainer.logger=false"]
    run(*words, "--maps=true")
    assert ", maps to " in caplog.text
    caplog.clear()
    run(*words)
    assert ", maps to " not in caplog.text

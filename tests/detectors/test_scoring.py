"""Scores without a Trainer: the same number through every door, its p-value, and what it is made of."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import DN2, OCSVM, PANDA, SPADE, ImageFolder, PandaError, PatchCore, UnlabelledImages
from tests.conftest import make_clouds, make_folder
from tests.test_any_order import DETECTORS, trainer


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
    for data, rows in ((UnlabelledImages(str(folder / "test/spot"), num_workers=0), 7), (images(folder), 13)) * 2:
        run = trainer(tmp_path)
        run.callbacks.append(table)
        run.predict(detector, data)
        assert len(list(csv.DictReader((tmp_path / "predictions.csv").open()))) == rows
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
    with pytest.raises(PandaError, match="is untrained|knows no normal images yet"):
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
    with pytest.warns(UserWarning, match="precision or weights are others"):
        type(run)(**half, precision="bf16-mixed").predict(whole, data)
    assert not next(csv.DictReader((tmp_path / "predictions.csv").open()))["p_value"]


def test_nothing_is_said_of_what_cannot_be_read(tmp_path, folder):
    detector = DN2("panda_tiny")
    learned(detector, images(folder), tmp_path)
    found = detector.score([folder / "test/spot/100.png", "gone.png"], maps=True)
    assert np.isnan(found.score[1])
    assert np.isnan(found.distances[1]).all()
    assert np.isnan(found.maps[1]).all()
    assert set(found.neighbours[1]) == {""}
    assert np.isfinite(found.maps[0]).all()


# ---- decisions ----


@pytest.mark.parametrize("averaging", [None, "EMAWeightAveraging", "WeightAveraging"])
@pytest.mark.parametrize("validated", [True, False])
def test_the_calibration_is_of_the_weights_that_are_saved(tmp_path, folder, averaging, validated):
    from pytorch_lightning import callbacks as c

    more = [] if averaging is None else [getattr(c, averaging)()]
    run = type(trainer(tmp_path))(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        limit_val_batches=1.0 if validated else 0, default_root_dir=tmp_path,
        callbacks=[*more, c.ModelCheckpoint(tmp_path, filename="last")],
    )  # fmt: skip
    data = images(folder, calibration_fraction=0.4)
    run.fit(PANDA("panda_tiny", lr=0.1, grad_clip=1.0), data)
    again = PANDA.load_from_checkpoint(tmp_path / "last.ckpt")
    held = again.score([str(p) for p in data.calibration_images.sources])
    assert held.calibration == "4 normal images held out"
    close(again.held_out[0].numpy(), held.score)


def test_without_validations_and_bank_there_is_no_calibration(tmp_path, folder):
    run = type(trainer(tmp_path))(
        accelerator="cpu", max_epochs=1, logger=False, limit_val_batches=0, default_root_dir=tmp_path
    )
    with pytest.raises(PandaError, match="leave trainer.limit_val_batches=0 out"):
        run.fit(DETECTORS["RotNet"](), images(folder, calibration_fraction=0.4))


def test_p_values_are_those_of_the_images_that_were_held_back(tmp_path, folder):
    detector, data = PANDA("panda_tiny", lr=0.1, grad_clip=1.0), images(folder, calibration_fraction=0.4)
    learned(detector, data, tmp_path)
    held = detector.score([str(p) for p in data.calibration_images.sources]).score
    assert len(held) == 4
    found = detector.score(folder / "test", alpha=0.4)
    expected = [(1 + (held >= s).sum()) / 5 for s in found.score]
    np.testing.assert_array_equal(found.p_value, expected)
    np.testing.assert_array_equal(found.anomalous, np.array(expected) <= 0.4)
    assert found.calibration == "4 normal images held out"
    assert detector.score(folder / "test").anomalous is None  # .05 is not possible with 4
    detector.k = 5
    with pytest.warns(UserWarning, match="no p-values: k, normalize, centroids, precision or weights are others"):
        assert detector.score(folder / "test").p_value is None


def test_images_held_back_are_in_nothing_else(tmp_path, folder):
    data = images(folder, calibration_fraction=0.4)
    detector = PANDA("panda_tiny", lr=0.1, grad_clip=1.0)
    learned(detector, data, tmp_path)
    held = set(data.names(data.calibration_images))
    assert len(held) == 4
    assert held.isdisjoint(detector.bank_names)
    assert held.isdisjoint(data.names(data.normal_dataloader().dataset.images))
    assert len(detector.bank) == 7
    for name in held:  # nor does training see them: without them all is the same
        (folder / name).rename(tmp_path / name.replace("/", "-"))
    alone = PANDA("panda_tiny", lr=0.1, grad_clip=1.0)
    learned(alone, images(folder), tmp_path)
    np.testing.assert_array_equal(alone.scores.score, detector.scores.score)


def test_leave_one_out_is_named_approximate_and_for_what_trains_nothing(tmp_path, folder):
    detector = DN2("panda_tiny")
    learned(detector, images(folder), tmp_path)
    found = detector.score(folder / "test")
    assert found.calibration == "11 normal images leave one out, approximate"
    bank = detector.bank
    gaps = (bank[:, None] - bank[None]).square().sum(dim=2).sort(dim=1).values[:, 1:3].sum(dim=1)
    expected = [(1 + int((gaps >= s).sum())) / 12 for s in found.score]
    np.testing.assert_allclose(found.p_value, expected)
    adapted = PANDA("panda_tiny")
    learned(adapted, images(folder), tmp_path)
    assert adapted.score(folder / "test").p_value is None


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_fraction_that_leaves_too_few_is_refused(tmp_path, folder, share):
    with pytest.raises(PandaError, match="leaves 2 or more on either side"):
        learned(DN2("panda_tiny"), images(folder, calibration_fraction=share), tmp_path)


def test_an_arrays_images_are_held_back_by_their_rows(tmp_path):
    from panda_lightning import Digits

    data = Digits(normal_class=3, image_size=32, calibration_fraction=0.5, train_limit=10)
    train, held = data.names(data.normal_images), data.names(data.calibration_images)
    assert len(train) == len(held) == 5
    assert set(train).isdisjoint(held)


# ---- why ----

BANKS = {
    "DN2": lambda: DN2("panda_tiny", k=2),
    "DN2, normalize": lambda: DN2("panda_tiny", k=6, normalize=True),
    "SPADE": lambda: SPADE("panda_tiny", k=3),
    "PatchCore": lambda: PatchCore("panda_tiny", coreset=1.0, neighbours=1),
    "OC-SVM": lambda: OCSVM(nu=0.9),
}


@pytest.mark.parametrize("name", BANKS)
def test_without_the_nearest_the_score_is_what_the_list_foretells(tmp_path, folder, name):
    detector = BANKS[name]()
    learned(detector, images(folder), tmp_path)
    found = detector.score(folder / "test/stripe/000.png")
    names, distances = found.neighbours[0], found.distances[0]
    assert list(distances) == sorted(distances)
    assert len(set(names)) == len(names) >= 5
    row = detector.bank_names.index(names[0])
    if name == "OC-SVM":
        m = detector.bank
        place = m["image"].tolist().index(row)
        term = float(m["alpha"][place] * torch.exp(-m["gamma"] * distances[0] ** 2))
        kept = torch.arange(len(m["image"])) != place
        detector.bank = {**m, **{key: m[key][kept] for key in ("support", "alpha", "image")}}
        foretold = found.score[0] + term
    elif name == "PatchCore":
        kept = detector.bank_images != row
        detector.bank, detector.bank_images = detector.bank[kept], detector.bank_images[kept]
        foretold = distances[1]  # or more, where another patch is now the farthest
    else:
        kept = torch.arange(len(detector.bank)) != row
        detector.bank = detector.bank[kept]
        k = detector.k
        foretold = distances[1 : k + 1].mean() if name == "SPADE" else distances[1 : k + 1].sum()
    now = detector.score(folder / "test/stripe/000.png").score[0]
    assert now != pytest.approx(found.score[0], rel=1e-9)
    if name == "PatchCore":
        assert now >= foretold * (1 - 1e-5)
    else:
        assert now == pytest.approx(foretold, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("make", [DN2, PANDA])
def test_the_parts_of_a_pooled_distance_sum_to_the_score(tmp_path, folder, make, normalize):
    detector = make("panda_tiny", normalize=normalize, k=3)
    learned(detector, images(folder, image_size=64), tmp_path)
    found = detector.score(folder / "test", maps=True)
    assert found.maps.shape == (13, 64, 64)
    np.testing.assert_allclose(found.maps.mean(axis=(1, 2)), found.score, rtol=1e-3, atol=1e-3 * found.score.max())
    assert detector.score(folder / "test").maps is None
    small = Image.open(folder / "test/stripe/000.png").convert("RGB").resize((64, 64))
    one = detector.score(small, maps=True).maps[0]
    other = detector.score(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), maps=True).maps[0]
    assert np.abs(one - other[:, ::-1]).max() < 0.6 * np.abs(one).max()  # the map turns with the picture


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
    assert "at most 20.0% are flagged on average" in caplog.text
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
        (["--data.images=nowhere"], "nowhere is no file and no folder"),
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
        "code": "must hold tensors and primitives alone", "cut": "is broken", "foreign": "has no format number",
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

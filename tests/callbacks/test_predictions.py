import csv

import numpy as np
import pytest

from panda_lightning.callbacks import Predictions
from panda_lightning.callbacks.anomaly_maps import coloured, outline
from panda_lightning.callbacks.predictions import _map_names
from tests.conftest import fast, make_folder


def written(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_scores_are_written_by_file(run, workdir):
    folder = make_folder(workdir / "images")
    run("test", *fast(folder, model="DN2"))
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    run("predict", *fast(folder, model="DN2"), f"--ckpt_path={last}")
    rows = written(workdir / "runs/t/version_1/predictions.csv")
    names = [f"test/spot/{n:03d}.png" for n in range(100, 107)] + [f"test/stripe/{n:03d}.png" for n in range(6)]
    assert [row["path"] for row in rows] == [str(folder / name) for name in names]
    scores = np.array([float(row["score"]) for row in rows])
    wins = scores[7:, None] > scores[None, :7]
    (logged,) = written(workdir / "runs/t/version_0/metrics.csv")
    assert wins.mean() == pytest.approx(float(logged["test/auroc"]), abs=1e-9)  # no ties among these


def test_images_without_files_are_called_by_their_rows(run, workdir):
    words = [w.replace("ImageFolder", "Digits").replace("spot", "3") for w in fast(workdir, model="DN2")]
    words = [w for w in words if "data.root" not in w] + ["--data.test_limit=10"]
    run("test", *words)
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    run("predict", *words, f"--ckpt_path={last}")
    rows = written(workdir / "runs/t/version_1/predictions.csv")
    assert [int(row["path"]) for row in rows] == np.linspace(0, 897, 10).round().tolist()


def test_sample_wise_early_stopping_has_a_column(run, workdir):
    folder = make_folder(workdir / "images")
    words = [w for w in fast(folder) if "trainer.callbacks" not in w]
    checkpoint = "{class_path: ModelCheckpoint, init_args: {filename: last, enable_version_counter: false}}"
    ses = "{class_path: SampleWiseEarlyStopping, init_args: {keep_snapshots: true}}"
    words += [f"--trainer.callbacks=[{checkpoint}, {ses}]", "--model.ewc_weight=0"]
    run("fit", *words)
    run("predict", *words, "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt")
    rows = written(workdir / "runs/t/version_1/predictions.csv")
    assert len(rows) == 13
    assert list(rows[0])[:3] == ["path", "score", "ses_score"]


def test_rows_with_other_columns_are_not_gone_on_with(run, workdir, monkeypatch):
    folder = make_folder(workdir / "images")
    words = [w for w in fast(folder) if "trainer.callbacks" not in w]
    checkpoint = "{class_path: ModelCheckpoint, init_args: {filename: last, enable_version_counter: false}}"
    ses = "{class_path: SampleWiseEarlyStopping, init_args: {keep_snapshots: true}}"
    words += ["--model.ewc_weight=0", "--data.eval_batch_size=4"]
    run("fit", *words, f"--trainer.callbacks=[{checkpoint}, {ses}]")
    end = Predictions.on_predict_batch_end

    def stopped(*told):
        end(*told)
        raise KeyboardInterrupt

    last = "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "on_predict_batch_end", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("predict", *words, last)
    run("predict", *words, f"--trainer.callbacks=[{ses}]", last)
    (table,) = (workdir / "runs/t").glob("*/predictions.csv")
    assert all(row["ses_score"] for row in written(table))
    assert len(written(table)) == 13


@pytest.mark.pictures
def test_maps_are_all_there_when_a_run_goes_on_elsewhere(run, workdir, monkeypatch):
    folder = make_folder(workdir / "images")
    run("test", *fast(folder, model="PatchCore"))
    words = ["predict", "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt", f"--data.images={folder / 'test'}"]
    words += ["--data.eval_batch_size=4", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=p"]
    draw, drawn = Predictions._draw, []

    def dying(*told):
        drawn.append(told)
        if len(drawn) == 7:  # in the second batch
            raise KeyboardInterrupt
        draw(*told)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "_draw", staticmethod(dying))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(*words)
    run(*words)
    (table,) = workdir.glob("p/**/predictions.csv")
    assert table.parent.name == "version_1"
    rows = written(table)
    assert len(rows) == len({row["map"] for row in rows}) == 13
    for row in rows:
        assert (table.parent / row["map"]).is_file()
        assert (table.parent / row["map"]).with_suffix(".png").is_file()


@pytest.mark.pictures
def test_nothing_is_written_over(run, workdir):
    folder = make_folder(workdir / "images")
    run("test", *fast(folder, model="PatchCore"))
    (workdir / "here").mkdir()
    for name, place in (("a.png", workdir), ("a.png", workdir / "here")):
        (place / name).write_bytes((folder / f"test/spot/10{len(str(place)) % 7}.png").read_bytes())
    (workdir / "list.txt").write_text(f"{workdir / 'a.png'}\na.png\n")
    words = ["predict", f"--ckpt_path={workdir}/runs/t/version_0/checkpoints/last.ckpt", "--data.images=list.txt"]
    words += ["--trainer.logger=false", "--trainer.default_root_dir=out"]
    for name in ("predictions", "predictions-v1"):
        run(*words)
        rows = written(workdir / f"out/{name}.csv")
        maps = {row["map"] for row in rows}
        assert len(maps) == len(rows) == 2
        assert all((workdir / "out" / one).is_file() for one in maps)
    assert len(list((workdir / "out").rglob("*.npy"))) == 4


def test_maps_have_places_of_their_own_in_their_folder():
    names = ["a.png", "../a.png", "b/a.png", "/a.png"]
    assert _map_names(names, "maps") == ["maps/a.png", "maps/a.png-2", "maps/b/a.png", "maps/a.png-3"]


def test_a_level_without_a_calibration_is_refused_before_any_picture_is_read(run, workdir, monkeypatch):
    folder = make_folder(workdir / "images")
    run("fit", *fast(folder, epochs=1))
    monkeypatch.setattr(Predictions, "on_predict_batch_end", None)
    with pytest.raises(SystemExit, match=r"alpha=0\.1 needs a calibration, but this detector has none"):
        run("predict", *fast(folder), "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt", "--alpha=0.1")


def test_colours_span_the_range_and_the_outline_is_the_edge_of_the_mask():
    values = np.array([[0.0, 1.0], [2.0, 9.0]], dtype=np.float32)
    colours = coloured(values, (0.0, 2.0))
    assert colours[0, 0].sum() < 10  # black
    assert (colours[1, 0] == colours[1, 1]).all()  # beyond the range is its end
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    np.testing.assert_allclose(coloured(values, (0.0, 2.0), image), colours / 2 + 50, atol=1)
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 3:8] = True
    drawn = outline(np.zeros((9, 9, 3), dtype=np.uint8), mask, (0, 255, 0))
    inside = np.zeros_like(mask)
    inside[3:6, 4:7] = True
    np.testing.assert_array_equal(drawn[..., 1] == 255, mask & ~inside)

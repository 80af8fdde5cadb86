import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM

from panda_lightning import OCSVM, Backbone, PandaError
from panda_lightning.formulas import metrics
from tests.detectors.test_panda import data, trainer


def by_hand(folder, inputs):
    """Normal training and test inputs (N, D) by NumPy and scikit-learn, and the test labels."""
    module = data(folder)
    module.setup("test")
    train, test = (
        loader.dataset.__getitems__(range(n))["image"]
        for loader, n in ((module.normal_dataloader(), 11), (module.test_dataloader(), 13))
    )
    label = module.test_dataloader().dataset.label.numpy()
    if inputs == "backbone":
        with torch.no_grad():
            return *(Backbone.pretrained("panda_tiny")(x).double().numpy() for x in (train, test)), label
    train, test = (x.numpy().astype(float).reshape(len(x), -1) for x in (train, test))
    if inputs == "pixels":
        return train / 127.5 - 1, test / 127.5 - 1, label
    centred = [x - x.mean(axis=1, keepdims=True) for x in (train, test)]
    train, test = (x / np.abs(x).mean(axis=1, keepdims=True) for x in centred)
    low, high = train.min(), train.max()
    pca = PCA(0.95).fit((train - low) / (high - low))
    return *(pca.transform((x - low) / (high - low)) for x in (train, test)), label


@pytest.mark.parametrize("inputs", ["pixels_pca", "pixels", "backbone"])
def test_scores_are_scikit_learns(folder, tmp_path, inputs):
    train, test, label = by_hand(folder, inputs)
    detector = OCSVM("panda_tiny", inputs=inputs)
    run = trainer(tmp_path)
    run.test(detector, data(folder), verbose=False)
    svm = OneClassSVM(gamma="scale", nu=0.1).fit(train)
    expected = -svm.decision_function(test) - svm.offset_[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(detector.scores.score.numpy(), expected, rtol=1e-3, atol=2e-3 * scale)
    assert float(run.callback_metrics["test/auroc"]) == pytest.approx(roc_auc_score(label, expected), abs=0.03)
    run.save_checkpoint(tmp_path / "svm.ckpt")
    again = OCSVM.load_from_checkpoint(tmp_path / "svm.ckpt", map_location="cpu", weights_only=True)
    (folder / "train").rename(folder / "away")  # the machine is in the checkpoint
    trainer(tmp_path).test(again, data(folder), verbose=False)
    assert torch.equal(again.scores.score, detector.scores.score)


def test_grey_images_count_once(folder, tmp_path):
    from PIL import Image

    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    detector = OCSVM(inputs="pixels")
    trainer(tmp_path).test(detector, data(folder), verbose=False)
    train = by_hand(folder, "pixels")[0][:, : 32 * 32]
    assert detector.bank["support"].shape[1] == 32 * 32
    assert float(detector.bank["gamma"]) == pytest.approx(1 / (32 * 32 * train.var()), rel=1e-4)


def test_selection_by_test_labels_is_the_best_of_the_grid_and_says_oracle(folder, tmp_path, capsys):
    train, test, label = by_hand(folder, "pixels")
    found = {}
    for nu in np.arange(1, 10) / 10:
        for power in range(-7, 3):
            svm = OneClassSVM(gamma=2.0**power, nu=nu).fit(train)
            found[2.0**power, nu] = roc_auc_score(label, -svm.decision_function(test))
    detector, run = OCSVM(inputs="pixels", select="test"), trainer(tmp_path)
    run.test(detector, data(folder))
    assert float(run.callback_metrics["test/auroc_oracle"]) == pytest.approx(max(found.values()))
    assert "test/auroc" not in run.callback_metrics
    assert detector.method == "OC-SVM (oracle)"
    assert "auroc_oracle" in capsys.readouterr().out


def test_a_tenth_selects_gamma_alone(folder, tmp_path):
    for i in range(20):  # so that a tenth holds both kinds
        for kind, source in (("spot", "100"), ("stripe", "000")):
            target = folder / "test" / kind / f"more{i}.png"
            target.write_bytes((folder / "test" / kind / f"{source}.png").read_bytes())
    detector, run = OCSVM(select="tenth"), trainer(tmp_path)
    run.validate(detector, data(folder), verbose=False)
    assert float(np.log2(detector.bank["gamma"])) in range(-10, 0)
    assert "val/auroc_oracle" in run.callback_metrics


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_few_images_has_both_kinds(folder, tmp_path, monkeypatch, seed):
    found = []
    auroc = metrics.auroc
    monkeypatch.setattr(
        metrics, "auroc", lambda score, label: found.append(label.sum() / len(label)) or auroc(score, label)
    )
    trainer(tmp_path).test(OCSVM(inputs="pixels", select="tenth"), data(folder, seed=seed), verbose=False)
    assert len(found) > 9  # each gamma, and the test
    assert all(0 < share < 1 for share in found)


def test_a_grey_machine_sees_the_brightness_of_coloured_images(folder, tmp_path):
    from PIL import Image

    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    detector = OCSVM(inputs="pixels")
    trainer(tmp_path).test(detector, data(folder), verbose=False)
    grey = torch.randint(1, 255, (1, 3, 32, 32), dtype=torch.uint8)
    grey[:] = grey[:, :1]
    coloured = grey.clone()
    coloured[:, 1] += 1
    coloured[:, 2] -= 1
    one, other = (detector.anomaly_score({"image": images}) for images in (grey, coloured))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inputs", ["pixels", "pixels_pca"])
def test_images_all_alike_are_refused(folder, tmp_path, inputs):
    from PIL import Image

    for path in folder.rglob("*.png"):
        Image.new("L", (32, 32), 90).save(path)
    with pytest.raises(PandaError, match="normal training images are all the same, and OC-SVM needs different ones"):
        trainer(tmp_path).test(OCSVM(inputs=inputs), data(folder), verbose=False)


def test_there_is_nothing_to_train(folder, tmp_path):
    with pytest.raises(PandaError, match=r"OC-SVM has nothing to train: run `lightning test`"):
        trainer(tmp_path).fit(OCSVM(), data(folder))

import numpy as np
import pytest

from panda_lightning import DN2, PANDA, PandaError
from tests.detectors.test_scoring import close, images, learned
from tests.test_any_order import DETECTORS, trainer


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
    with pytest.warns(UserWarning, match="no p-values: k, normalize, centroids, precision or weights have changed"):
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

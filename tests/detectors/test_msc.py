import pytest
import pytorch_lightning as pl
import torch

from panda_lightning import MSC, Backbone
from panda_lightning.detectors import msc, steps
from panda_lightning.networks import augment
from tests.detectors.test_panda import data, trainer


@pytest.mark.parametrize("angular", [False, True])
def test_training_is_a_plain_loop_over_two_views(folder, tmp_path, angular, monkeypatch):
    """Two epochs of eleven images, against torch alone; the views' random numbers are the detector's own."""
    detector, module = MSC("panda_tiny", angular=angular, lr=1e-2), data(folder)
    drawn = []

    def watched(detector, batch, columns):
        drawn.append((batch["index"], steps.draws(detector, batch, columns)))
        return drawn[-1][1]

    monkeypatch.setattr(msc, "draws", watched)
    trainer(tmp_path).fit(detector, module)
    assert len(drawn) == 6
    assert drawn[0][1].unique().numel() > 100

    backbone = Backbone.pretrained("panda_tiny")
    images = data(folder)
    images.setup("fit")
    images = images.normal_dataloader().dataset.__getitems__(range(11))["image"]

    def space(x):
        features = backbone(x)
        return features / features.norm(dim=1, keepdim=True)

    with torch.no_grad():
        centre = space(images).mean(dim=0)
    centre = centre / centre.norm() if angular else centre
    params = backbone.adapted()
    for index, numbers in drawn:
        views = [space(augment.random_view(images[index], numbers[:, part])) for part in (slice(13), slice(13, 26))]
        shifted = [(f - centre) / (f - centre).norm() for v in views for f in v]
        loss, n = torch.zeros(()), len(shifted)
        for i in range(n):
            others = torch.stack([shifted[i] @ shifted[m] / 0.25 for m in range(n) if m != i])
            loss = loss - (shifted[i] @ shifted[(i + n // 2) % n] / 0.25 - others.exp().sum().log()) / n
        if angular:
            loss = loss + torch.stack([((f - centre) ** 2).sum() for v in views for f in v]).mean()
        gradients = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for p, g in zip(params.values(), gradients, strict=True):
                p -= 1e-2 * (g + 5e-5 * p)
    for name, p in detector.backbone.adapted().items():
        torch.testing.assert_close(p, params[name], rtol=1e-4, atol=1e-6)


def test_images_stay_images_for_training_and_pass_the_frozen_layers_once_for_validation(folder, tmp_path):
    detector, module, hidden = MSC("panda_tiny"), data(folder), []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            hidden.extend(x.dataset.hidden for x in (module.normal_dataloader(), module.val_dataloader()))

    trainer(tmp_path, epochs=1, callbacks=[Look()]).fit(detector, module)
    assert hidden[0] is None
    assert len(hidden[1]) == 13
    assert module.val_dataloader().dataset.hidden is None  # the run is over
    assert detector.normalize
    assert detector.method == "MSC"


def test_random_numbers_depend_on_epoch_and_image_alone(folder, tmp_path, monkeypatch):
    seen, size = {}, 0

    def watched(detector, batch, columns):
        numbers = steps.draws(detector, batch, columns)
        for i, row in zip(batch["index"].tolist(), numbers, strict=True):
            seen.setdefault((size, detector.current_epoch, i), row)
        return numbers

    monkeypatch.setattr(msc, "draws", watched)
    for size in (4, 3):
        trainer(tmp_path).fit(MSC("panda_tiny"), data(folder, batch_size=size))
    for epoch in range(2):
        for i in range(11):
            assert torch.equal(seen[4, epoch, i], seen[3, epoch, i])
        assert not torch.equal(seen[4, epoch, 0], seen[4, epoch, 1])
    assert not torch.equal(seen[4, 0, 0], seen[4, 1, 0])

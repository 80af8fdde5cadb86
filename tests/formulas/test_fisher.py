import copy
import warnings

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch.nn import functional as F

from panda_lightning import Backbone, Batch, ImageFolder, PandaError
from panda_lightning.formulas import fisher
from tests.conftest import make_folder


def make_batches(size: int, count: int, batch: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    index = torch.arange(count)
    return [
        {"image": i, "label": torch.zeros(len(i)), "index": n}
        for i, n in zip(images.split(batch), index.split(batch), strict=True)
    ]


def plain_loop(backbone: Backbone, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """One image after the other, ordinary autograd; the label by inverting the distribution function."""
    adapted = backbone.adapted()
    total = {name: torch.zeros_like(p) for name, p in adapted.items()}
    count = 0
    for batch in batches:
        for image, index in zip(batch["image"], batch["index"], strict=True):
            logits = backbone.logits(backbone.prefix(image[None]))[0]
            uniform = torch.rand((), generator=torch.Generator().manual_seed(int(index))).item()
            below, label = 0.0, -1
            for p in logits.softmax(0).tolist():
                if below < uniform:
                    label += 1
                below += p
            gradients = torch.autograd.grad(-F.cross_entropy(logits[None], torch.tensor([label])), adapted.values())
            for name, gradient in zip(adapted, gradients, strict=True):
                total[name] += gradient**2
            count += 1
    return {name: t / count for name, t in total.items()}


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("name", ["panda_tiny", "mobilenetv2_035", "vit_tiny_patch16_224"])
def test_estimate_is_that_of_a_plain_loop(name, vectorised):
    torch.manual_seed(0)
    if name == "panda_tiny":
        backbone = Backbone.pretrained(name)
    else:
        backbone = Backbone(timm.create_model(name, num_classes=6, **({"img_size": 32} if "vit" in name else {})), 1)
    backbone.double()
    batches = make_batches(32, 7, 3)
    estimator = fisher.Estimator(backbone)
    estimator._vectorised = vectorised
    for batch in batches:
        estimator.add(batch)
    total, count = estimator.sums()
    expected = plain_loop(backbone, batches)
    assert list(total) == list(backbone.adapted())
    assert count == 7
    for key, value in expected.items():
        torch.testing.assert_close(total[key] / count, value, rtol=1e-6, atol=float(value.max()) * 1e-9)
        torch.testing.assert_close(estimator.diagonal()[key], value.float(), rtol=1e-5, atol=1e-30)


def test_groups_square_the_gradient_of_their_mean_and_are_smaller():
    backbone = Backbone.pretrained("panda_tiny").double()
    (batch,) = make_batches(32, 70, 70)
    batch["label"] = torch.randint(0, 200, (70,), generator=torch.Generator().manual_seed(1))
    each, groups = fisher.Estimator(backbone), fisher.Estimator(backbone, group=32)
    for estimator in (each, groups):
        estimator.add(batch, true_labels=True)
    assert (each.count, groups.count) == (70, 2)  # six are left over
    adapted = backbone.adapted()
    expected = {name: torch.zeros_like(p) for name, p in adapted.items()}
    for rows in (slice(0, 32), slice(32, 64)):
        logits = backbone.logits(backbone.prefix(batch["image"][rows]))
        gradients = torch.autograd.grad(F.cross_entropy(logits, batch["label"][rows]), adapted.values())
        for name, gradient in zip(adapted, gradients, strict=True):
            expected[name] += gradient**2 / 2
    for name, value in groups.diagonal().items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=0)


def test_an_operation_without_vectorised_form_falls_back_to_the_loop(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("vmap: no batching rule")

    backbone, batches = Backbone.pretrained("panda_tiny"), make_batches(32, 3, 3)
    expected = fisher.estimate(backbone, batches)
    estimator = fisher.Estimator(backbone)
    estimator._vectorised = True
    monkeypatch.setattr(fisher, "vmap", refuse)
    with caplog.at_level("INFO"):
        for part in make_batches(32, 3, 2):
            estimator.add(part)
    assert caplog.text.count("one image at a time: vmap: no batching rule") == 1
    for name, value in estimator.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6 * float(value.max()))


def test_half_files_keep_small_values(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    diagonal = {name: 10 ** (-9 * torch.rand_like(p)) * 1e-3 for name, p in backbone.adapted().items()}
    fisher.save(diagonal, tmp_path / "f.safetensors", {"estimator": "a test"}, half=True)
    assert (tmp_path / "f.safetensors").stat().st_size < 1.1 * 2 * sum(t.numel() for t in diagonal.values())
    for name, value in fisher.load(str(tmp_path / "f.safetensors"), backbone).items():
        torch.testing.assert_close(value, diagonal[name], rtol=2e-2, atol=0)


def test_a_file_of_other_weights_warns(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    diagonal = {name: torch.rand_like(p) for name, p in backbone.adapted().items()}
    fisher.save(diagonal, tmp_path / "f.safetensors", {"weights": fisher.weights_name(backbone)})
    with warnings.catch_warnings(action="error"):
        fisher.load(str(tmp_path / "f.safetensors"), backbone)
    with torch.no_grad():
        next(iter(backbone.adapted().values())).add_(1e-3)
    with pytest.warns(UserWarning, match="was made for other weights"):
        fisher.load(str(tmp_path / "f.safetensors"), backbone)


def test_estimate_depends_neither_on_batches_nor_on_chunks_nor_on_fillers():
    backbone = Backbone.pretrained("panda_tiny")
    whole = fisher.estimate(backbone, make_batches(32, 6, 6))
    parts = make_batches(32, 6, 4)
    parts.append({**parts[0], "index": torch.full_like(parts[0]["index"], -1)})
    split = fisher.estimate(backbone, parts, memory_mb=0)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-4, atol=float(whole[name].max()) * 1e-6)


def test_drawn_labels_follow_the_softmax():
    probabilities = torch.tensor([[0.1, 0.6, 0.3]]).repeat(4000, 1)
    labels = fisher._draw(probabilities, range(4000), seed=0)
    frequency = labels.bincount(minlength=3) / 4000
    assert torch.allclose(frequency, probabilities[0], atol=0.03)
    others = fisher._draw(probabilities, range(4000), seed=1)
    assert 0.4 < (others == labels).float().mean() < 0.52  # .46 where labels of one seed say nothing of another's


def test_labels_of_a_backbone_without_classifier_are_refused():
    backbone = Backbone(timm.create_model("resnet18", num_classes=0), 2)
    with pytest.raises(PandaError, match="resnet18 has none here: use --labels features"):
        fisher.Estimator(backbone)


@pytest.mark.parametrize("group", [1, 2])
def test_without_a_classifier_the_diagonal_is_that_of_the_features(group):
    backbone = headless()
    batches = make_batches(32, 4, 4)
    images, index = (torch.cat([batch[key] for batch in batches]) for key in ("image", "index"))
    estimator = fisher.Estimator(backbone, group, of="features")
    for batch in batches:
        estimator.add(batch)
    found = estimator.diagonal()
    expected = {name: torch.zeros_like(p) for name, p in backbone.adapted().items()}
    z = torch.stack([torch.randn(256, generator=torch.Generator().manual_seed(int(i))) for i in index])
    for some in torch.split(torch.arange(4), group):
        backbone.zero_grad()
        (backbone(images[some]) * z[some]).sum(dim=1).mean().backward()
        for name, p in backbone.adapted().items():
            expected[name] += p.grad.square() / (4 / group)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6 * float(expected[name].max()))


def test_its_mean_over_draws_is_the_sum_over_the_features():
    backbone = headless()
    (batch,) = make_batches(32, 1, 1)
    names = [name for name in backbone.adapted() if name.endswith("bn2.weight")]
    exact = {name: torch.zeros_like(backbone.adapted()[name]) for name in names}
    for d in range(256):
        (row,) = backbone(batch["image"])
        for name, g in zip(names, torch.autograd.grad(row[d], [backbone.adapted()[n] for n in names]), strict=True):
            exact[name] += g.square()
    drawn = {name: torch.zeros_like(value) for name, value in exact.items()}
    for seed in range(400):
        estimator = fisher.Estimator(backbone, seed=seed, of="features")
        estimator.add(batch)
        found = estimator.diagonal()
        for name in names:
            drawn[name] += found[name] / 400
    for name in names:  # the relative error of a mean of 400 squares of normal numbers is .07
        assert float((drawn[name].sum() / exact[name].sum() - 1).abs()) < 0.2
        assert torch.equal(drawn[name] == 0, exact[name] == 0)
        some = exact[name] > 0
        assert float((drawn[name][some] / exact[name][some] - 1).abs().median()) < 0.1


def headless():
    return Backbone(timm.create_model("resnet10t", num_classes=0, channels=(16, 32, 64, 256)), 2)


def test_a_file_is_of_the_same_weights_whatever_is_trained_of_them_and_however_they_are_pooled(tmp_path, recwarn):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    plain = Backbone(copy.deepcopy(model), 1)
    path = tmp_path / "f.safetensors"
    fisher.save(fisher.estimate(plain, make_batches(160, 3, 2)), path, {"weights": fisher.weights_name(plain)})
    for adapt in ("stages", "norm", "lora"):
        fisher.load(str(path), Backbone(copy.deepcopy(model), 1, adapt=adapt, lora_rank=2, pool="both"))
    assert not [w for w in recwarn if "other weights" in str(w.message)]


def test_a_change_of_low_rank_has_the_diagonal_of_its_weights():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    plain, lora = (Backbone(copy.deepcopy(model), 1, adapt=adapt, lora_rank=2) for adapt in ("stages", "lora"))
    one, other = (fisher.estimate(b, make_batches(160, 3, 2)) for b in (plain, lora))
    assert set(other) < set(one)
    for name, value in other.items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-7 * float(one[name].max()))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_are_read_by_plain_names(tmp_path, suffix):
    backbone = Backbone.pretrained("panda_tiny")
    diagonal = {name: torch.rand_like(p) for name, p in backbone.adapted().items()}
    path = tmp_path / f"fisher.{suffix}"
    extra = {"conv1.0.weight": torch.ones_like(backbone.model.get_parameter("conv1.0.weight"))}  # a frozen layer
    if suffix == "pth":
        torch.save({**diagonal, **extra}, path)
    else:
        fisher.save({**diagonal, **extra}, path, {"estimator": "a test"})
    loaded = fisher.load(str(path), backbone)
    assert list(loaded) == list(backbone.adapted())
    assert all(torch.equal(loaded[name], diagonal[name]) for name in diagonal)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_that_do_not_fit_are_refused_with_a_list(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    diagonal = {name: torch.rand_like(p) for name, p in backbone.adapted().items()}
    first, second, *_ = diagonal
    del diagonal[first]
    diagonal[second] = torch.ones(3)
    diagonal["module.extra"] = torch.ones(1)
    torch.save(diagonal, tmp_path / "f.pth")
    with pytest.raises(PandaError) as error:
        fisher.load(str(tmp_path / "f.pth"), backbone)
    for words in (
        f"{first} is missing",
        f"{second} is (3,) instead of",
        "module.extra is not in resnet10t",
        "fisher=auto",
    ):
        assert words in str(error.value)
    with pytest.raises(PandaError, match="neither a file nor one of auto, ones"):
        fisher.load("atuo", backbone)


def test_a_source_is_ones_a_file_or_what_lies_beside_the_weights(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    for name, value in fisher.from_source("ones", backbone, 2).items():
        assert torch.equal(value, torch.ones_like(backbone.adapted()[name]))
    diagonal = {name: torch.rand_like(p) for name, p in backbone.adapted().items()}
    fisher.save(diagonal, tmp_path / "f.safetensors", {})
    beside = fisher.load(str(backbone.fisher_file), backbone)
    for source, expected in ((str(tmp_path / "f.safetensors"), diagonal), ("auto", beside)):
        found = fisher.from_source(source, backbone, 2)
        assert list(found) == list(backbone.adapted())
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert fisher.from_source("auto", Backbone.pretrained("panda_tiny", adapt_stages=3), 3) is None  # it is of two
    backbone.fisher_file = tmp_path / "f.safetensors"  # which does not say of how many
    found = fisher.from_source("auto", backbone, 2)
    assert all(torch.equal(found[name], diagonal[name]) for name in diagonal)
    backbone.fisher_file = None
    assert fisher.from_source("auto", backbone, 2) is None
    assert fisher.from_source("auto", Backbone(timm.create_model("resnet18", num_classes=0), 2), 2) is None


def test_an_estimate_is_made_once_and_kept(tmp_path, caplog):
    backbone, strategy = Backbone.pretrained("panda_tiny"), pl.Trainer(accelerator="cpu", logger=False).strategy
    path = tmp_path / "new" / "folders" / "f.safetensors"
    expected = fisher.estimate(backbone, make_batches(32, 5, 3))
    with caplog.at_level("INFO"):
        first = fisher.kept_or_estimated(path, backbone, make_batches(32, 5, 3), strategy)
    assert f"Kept in {path}" in caplog.text
    assert fisher.header(path) == {"estimator": "per-sample, drawn labels"}
    again = fisher.kept_or_estimated(path, backbone, iter(lambda: pytest.fail("asks for images"), None), strategy)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6 * float(value.max()))
        assert torch.equal(again[name], first[name])


class Strategy:
    """One of the processes of a run; what process 0 broadcasts, the others get."""

    said = []

    def __init__(self, rank):
        self.is_global_zero = rank == 0

    def broadcast(self, value):
        if self.is_global_zero:
            self.said.append(value)
        return self.said[-1]


def test_machines_whose_homes_differ_use_the_file_of_process_0(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    homes = [tmp_path / str(rank) / "f.safetensors" for rank in range(2)]
    kept = {name: torch.rand_like(p) for name, p in backbone.adapted().items()}
    fisher.save(kept, homes[0], {})
    fisher.save(fisher.ones(backbone), homes[1], {})  # an older one, of this machine alone
    for rank, home in enumerate(homes):
        found = fisher.kept_or_estimated(home, backbone, iter([]), Strategy(rank))
        assert all(torch.equal(found[name], value) for name, value in kept.items())


def test_sums_are_over_all_processes(as_processes):
    batches = make_batches(32, 5, 2)
    backbone = Backbone.pretrained("panda_tiny").double()
    expected = fisher.estimate(backbone, batches)
    estimators = [fisher.Estimator(backbone) for _ in range(2)]
    for i, batch in enumerate(batches):
        estimators[i % 2].add(batch)
    for found in as_processes(2, lambda rank: estimators[rank].diagonal()):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)


def test_the_cache_is_keyed_by_weights_pixels_and_adapted_layers(tmp_path):
    spots = ImageFolder(str(make_folder(tmp_path / "a")), image_size=32, normal_class="spot")
    data, other = (loader().dataset for loader in (spots.normal_dataloader, spots.val_dataloader))
    one, two = Backbone.pretrained("panda_tiny", adapt_stages=2), Backbone.pretrained("panda_tiny", adapt_stages=1)
    path = fisher.cache_path(one, data, "32")
    assert path == fisher.cache_path(Backbone.pretrained("panda_tiny"), data, "32")
    assert path != fisher.cache_path(one, other, "32")
    assert path != fisher.cache_path(two, data, "32")
    with torch.no_grad():
        next(one.parameters())[0, 0, 0, 0] += 1e-3
    assert path != fisher.cache_path(one, data, "32")


def _cut(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: t.fill_(torch.nan), "has values that are NaN or infinite"),
        (lambda t: t.neg_(), "has negative values"),
        (lambda t: t.zero_(), "has only zeros"),
        (lambda t: t.int(), "has whole numbers, not floating-point ones"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_no_squares_of_gradients_can_be_is_refused(tmp_path, spoil, sentence, suffix):
    backbone, path = Backbone.pretrained("panda_tiny"), tmp_path / f"f.{suffix}"
    diagonal = {name: spoil(torch.ones_like(p.detach())) for name, p in backbone.adapted().items()}
    torch.save(diagonal, path) if suffix == "pth" else fisher.save(diagonal, path, {})
    with pytest.raises(PandaError, match=rf"f.{suffix} {sentence}, unlike squared gradients: make it with"):
        fisher.load(str(path), backbone)


def test_broken_files_and_other_things_are_refused(tmp_path):
    backbone = Backbone.pretrained("panda_tiny")
    fisher.save(fisher.ones(backbone), tmp_path / "cut.safetensors", {})
    _cut(tmp_path / "cut.safetensors")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"a": print}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("text")
    for name, sentence in (
        ("cut.safetensors", "is not a complete safetensors file"),
        ("list.pth", "is not a dictionary of tensors"),
        ("code.pth", "is refused, because it may contain only tensors and primitives"),
        ("text.pth", "is refused, because it may contain only tensors and primitives"),
    ):
        with pytest.raises(PandaError, match=f"{name} {sentence}"):
            fisher.load(str(tmp_path / name), backbone)


@pytest.mark.parametrize("vectorised", [True, False])
def test_squares_of_small_gradients_of_half_weights_are_not_lost(vectorised):
    """Of 1e-4 it is 1e-8, less than float16 has; squares are taken in float32."""
    backbone = Backbone.pretrained("panda_tiny").bfloat16()
    (batch,) = make_batches(32, 5, 5)
    estimator = fisher.Estimator(backbone)
    estimator._vectorised = vectorised
    seen = {}

    def likelihood(params, hidden, outcomes):
        return sum(((p.float() * 1e-4).to(p.dtype)).sum() for p in params.values()) + 0 * hidden.sum()

    estimator._log_likelihood = likelihood
    estimator.add(batch)
    for name, total in estimator.total.items():
        assert total.dtype == torch.float32
        seen[name] = float(total.flatten()[0] / estimator.count)
    assert seen == pytest.approx(dict.fromkeys(seen, 1e-8), rel=0.02)

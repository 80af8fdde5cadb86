import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from panda_lightning.formulas.pixel_metrics import PixelHistogram


def scene(seed: int = 0, scale: float = 300.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps far outside [0, 1] and masks with regions of several sizes, two of which touch at a corner."""
    torch.manual_seed(seed)
    masks = torch.zeros(5, 30, 40, dtype=torch.bool)
    masks[0, 3:9, 4:9] = masks[0, 20:22, 20:40] = True
    masks[1, 5, 5] = masks[1, 6, 6] = True
    masks[2, 10:25, 10:30] = True
    return (torch.randn(5, 30, 40) + 1.5 * masks) * scale, masks


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """8-connected regions by flooding."""
    left, found = mask.copy(), []
    while left.any():
        queue, region = [tuple(np.argwhere(left)[0])], np.zeros_like(mask)
        while queue:
            y, x = queue.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x], region[y, x] = False, True
                queue += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        found.append(region)
    return found


def plain_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Mean overlap of regions against the false positive rate, threshold by threshold, up to the limit."""
    parts = [(m, r) for m, mask in zip(maps, masks, strict=True) for r in regions(mask)]
    false, overlap = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        false.append((maps[~masks] >= threshold).mean())
        overlap.append(np.mean([(m[r] >= threshold).mean() for m, r in parts]))
    inside = np.array(false) <= limit
    x, y = [*np.array(false)[inside], limit], [*np.array(overlap)[inside], np.interp(limit, false, overlap)]
    return float(trapezoid(y, x)) / limit


@pytest.mark.parametrize("scale", [1e-6, 300.0])
def test_pixel_metrics_are_scikit_learns_and_a_plain_loops(scale):
    maps, masks = scene(scale=scale)
    counted = PixelHistogram()
    counted.add(maps[:2], masks[:2])
    counted.add(maps[2:], masks[2:])
    found = counted.metrics()
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    assert 0 < found.auroc_error < 1e-4
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=found.auroc_error)
    assert found.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-3)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert found.f1 == pytest.approx(f1.max(), abs=1e-3)
    assert found.threshold == pytest.approx(thresholds[f1.argmax()], rel=2e-4)
    assert found.pro == pytest.approx(plain_pro(maps.numpy(), masks.numpy(), 0.3), abs=1e-3)


def test_pixel_metrics_are_exact_where_no_two_pixels_share_a_bin():
    maps, masks = scene()
    order = maps.flatten().argsort().argsort().view_as(maps)
    maps = 1.001**order  # 6000 scores over 2.6 decades of a thousand: each its own bin
    counted = PixelHistogram()
    counted.add(maps, masks)
    found = counted.metrics()
    assert found.auroc_error == 0
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found.pro == pytest.approx(plain_pro(maps.numpy(), masks.numpy(), 0.3), abs=1e-12)


@pytest.mark.parametrize("shift", range(-5, 0))
def test_scores_of_either_sign_and_zero_keep_their_order(shift):
    masks = scene()[1]
    maps = torch.randint(-2, 3, masks.shape, generator=torch.Generator().manual_seed(0)) + 2 * masks + shift
    counted = PixelHistogram()
    counted.add(maps, masks)
    found = counted.metrics()
    labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = thresholds[f1.argmax()]
    assert best == 3 + shift
    assert best - abs(best) * 1.3e-4 <= found.threshold <= best  # the lower edge of its bin
    assert found.f1 == pytest.approx(f1.max(), abs=1e-12)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.pro == pytest.approx(plain_pro(maps.numpy(), masks.numpy(), 0.3), abs=1e-12)
    ties = [((scores[labels] == s).sum() / labels.sum()) * (scores[~labels] == s).mean() for s in range(-9, 9)]
    assert found.auroc_error == pytest.approx(sum(ties) / 2, abs=1e-12)


def test_counts_are_of_pixels_and_of_shares_of_regions_and_take_96_mib():
    maps, masks = scene()
    counted = PixelHistogram()
    counted.add(maps, masks)
    normal, anomalous, shares = counted.counts.sum(dim=1).tolist()
    assert (normal, anomalous) == (int((~masks).sum()), int(masks.sum()))
    assert shares == pytest.approx(sum(len(regions(mask)) for mask in masks.numpy()))
    assert counted.counts.nbytes == 96 * 2**20


def test_constant_maps_are_a_coin_and_one_kind_of_pixel_has_no_metrics():
    masks = scene()[1]
    counted = PixelHistogram()
    counted.add(torch.full(masks.shape, 7.0), masks)
    found = counted.metrics()
    assert (found.auroc, found.auroc_error) == (0.5, 0.5)  # and says that it does not know
    assert found.pro == pytest.approx(0.15)  # a straight line
    empty = PixelHistogram()
    empty.add(torch.rand(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool))
    assert empty.metrics() is None

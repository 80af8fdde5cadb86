"""Images for outlier exposure, kept apart from the test images."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from panda_lightning.datamodules.choices import evenly
from panda_lightning.pictures.images import Images
from panda_lightning.pictures.layout import images_below
from panda_lightning.pictures.looking import look
from panda_lightning.pictures.pixels import ENDINGS
from panda_lightning.pictures.view import View
from panda_lightning.runtime.float32 import full_float32
from panda_lightning.types import Batch, PandaError

SIDE, WINDOW = 32, 28  # pixels of a thumbnail, and of what is compared of it
SAME = 0.87  # correlation from which two windows show one picture; chosen in experiments/outlier_filter.py
TWINS = 0.97  # correlation from which two whole thumbnails do, less the mean; chosen in experiments/suspects.py
WORTH = 0.6  # correlation with every other window from which all are tried
ROWS = 8192  # outliers in memory at a time


def read_outliers(source: str | None, datasets: dict[str, Any]) -> Images:
    """List images that show nothing of the test classes.

    Args:
        source: A folder of images, searched with its subfolders; a ``.npy`` file (N, H, W, 3) uint8, such as
            300K_random_images.npy, which is mapped, not loaded; or a data set of this project as ``CLASS:ROOT``
            (``CIFAR100:data``), whose training images are taken.
        datasets: The data-module classes by name.

    Raises:
        PandaError: If it is none of these.
    """
    if source is None:
        raise PandaError(
            "outlier exposure needs images that do not show the test classes: set data.outliers to a folder, a "
            ".npy file such as 300K_random_images.npy, or a data set as CLASS:ROOT."
        )
    path = Path(source)
    if path.suffix == ".npy" and path.is_file():
        try:
            pixels = np.lib.format.open_memmap(path, mode="r")  # refuses objects, whose pickles could run code
        except (ValueError, OSError) as error:
            raise PandaError(f"outliers={source} cannot be read ({error}): expected uint8 (N, H, W, 3).") from error
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise PandaError(f"outliers={source} is {pixels.dtype} {pixels.shape}: expected uint8 (N, H, W, 3).")
        return Images(pixels, np.zeros(len(pixels), dtype=np.int64))
    if path.is_dir():
        files = images_below(path)
        if files:
            return Images(files, np.zeros(len(files), dtype=np.int64))
        raise PandaError(f"outliers={source} has no images: their names must end in {', '.join(ENDINGS)}.")
    name, _, root = source.partition(":")
    if root and name in datasets:
        images: Images = datasets[name](root=root).read("train")
        return images
    raise PandaError(
        f"outliers={source} is neither a folder, nor a .npy file, nor CLASS:ROOT with one of {', '.join(datasets)}."
    )


def outliers_needed(trainer: Any, normal: int, batch_size: int) -> int | None:
    """As many outliers as the steps of a run can take; None where there is no such number.

    Args:
        trainer: That of the run; None outside of one.
        normal: Number of normal training images, which an epoch sees once.
        batch_size: Normal images of a step, each with an outlier beside it.
    """
    epochs = None if trainer is None or (trainer.max_epochs or -1) < 0 else trainer.max_epochs
    steps = [] if epochs is None else [epochs * -(-normal // batch_size)]
    if trainer is not None and trainer.max_steps >= 0:
        steps.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(steps) * batch_size if steps else None


def outlier_source(data: Any) -> Images:
    """What a data module's ``outliers`` names."""
    known = data.data_sets
    found: Images = data._once(data._listed, "source", data.outliers, lambda: read_outliers(data.outliers, known()))
    return found


def outlier_images(data: Any) -> Images:
    """As many as a data module's run needs, evenly spaced, without what is, or nearly is, a test image."""
    test, intensity = data.test_images, data.view.intensity
    needed = outliers_needed(data.trainer, len(data.normal_images), data.batch_size)

    def chosen() -> Images:
        images = outlier_source(data)
        if needed is not None and needed < len(images):  # the rest would pass filter and frozen layers for nothing
            rank_zero_info(f"This run's steps need only {needed} of {len(images)} outliers.")
            images = evenly(images, needed)
        return outliers_apart(images, test, intensity)

    settings = (data.outliers, needed, test.fingerprint(data.root), intensity)
    found: Images = data._once(data._listed, "outlier", settings, chosen)
    return found


def beside(normal: DataLoader[Batch], outlier: DataLoader[Batch]) -> CombinedLoader:
    """Batches of both, each normal image once an epoch."""
    mode: Any = "min_size" if len(outlier) >= len(normal) else "max_size_cycle"
    return CombinedLoader({"normal": normal, "outlier": outlier}, mode)


def outliers_apart(images: Images, test: Images, intensity: str) -> Images:
    """Images for outlier exposure without what is, or nearly is, a test image; the number left out is said.

    Left out are copies, also when mirrored, shifted by up to 2/32 of the side, cut to 28/32 of it, made grey, 10 %
    brighter or darker, resized, compressed to JPEG quality 20, or several of these: of 40,000 such images of CIFAR-10
    and of cats and dogs none passed. Other changes may pass (91 % of cuts to 24/32 do). Colours do not count. Beside
    CIFAR-10, 0.1 to 1 % of other data sets are left out without need, and 3.1 % of its own training images, of which
    half are near duplicates indeed (90 % of those known to ciFAIR); clothes beside clothes are too much alike (91 %).

    Args:
        images: Candidates.
        test: The test images.
        intensity: See AnomalyDataModule.

    Raises:
        PandaError: If nothing is left.
    """
    kept = apart_from(test, images, intensity)
    rank_zero_info(
        f"{len(images) - len(kept)} of {len(images)} outliers are test images or near duplicates of them, and are "
        "left out"
    )
    if not len(kept):
        raise PandaError("all images of data.outliers are test images: give other images.")
    return images.take(kept)


def apart_from(test: Images, outliers: Images, intensity: str = "auto") -> npt.NDArray[np.int64]:
    """Rows of the outliers that are not, nearly, a test image, ascending; what cannot be read is for others to name."""
    return np.flatnonzero(likeness(test, outliers, intensity) < SAME)


def likeness(test: Images, outliers: Images, intensity: str = "auto") -> npt.NDArray[np.float32]:
    """How like a test image each outlier is at most: 1 is a copy, 0 nothing in common or unreadable, (N,).

    Grey thumbnails are described by their low frequencies as pHash does it, and correlated instead of rounded to bits.
    All of an outlier, and its middle, are compared with every window of a test image and of its mirror image: that
    finds cuts, and shifts whatever came in at the border. 300,000 images beside 10,000 take four minutes of one core
    and half a GB.

    Args:
        test: Images that must not be trained on.
        outliers: Candidates, each read once, a part at a time.
        intensity: See AnomalyDataModule.
    """
    _, grey = _thumbnails(test, np.arange(len(test)), intensity)
    copies = {picture.tobytes() for picture in grey.numpy()}  # flat ones too, which have no correlation
    bank = torch.cat([_windows(part) for part in torch.split(grey, 256)])
    found = np.zeros(len(outliers), dtype=np.float32)
    for start in track(range(0, len(outliers), ROWS), "Outliers beside test images", transient=True):
        rows, grey = _thumbnails(outliers, np.arange(start, min(start + ROWS, len(outliers))), intensity)
        found[rows] = _correlation(bank, grey).numpy()
        found[rows[[picture.tobytes() in copies for picture in grey.numpy()]]] = 1
    return found


def near_copies(images: Images, others: Images | None = None, intensity: str = "auto") -> list[tuple[int, int, float]]:
    """Pairs of images that show nearly the same: rows, and their correlation, the most alike first.

    Whole thumbnails and their mirror images are compared, less the mean of all, since pictures of one thing on one
    ground are all much alike. A copy may be resized, compressed, mirrored or grey, and, where pictures differ, a little
    brighter; cut and shifted ones are not found (``likeness`` finds them). For the rates see experiments/RESULTS.md.

    Args:
        images: Rows of the first of a pair.
        others: Of the second; None is the same images, each pair once.
        intensity: See AnomalyDataModule.
    """
    rows, grey = _thumbnails(images, np.arange(len(images)), intensity)
    second_rows, second = (rows, grey) if others is None else _thumbnails(others, np.arange(len(others)), intensity)
    mean = grey.mean(dim=0)
    there, mirrored = _spectrum(second - mean), _spectrum(second.flip(-1) - mean)
    pairs = []
    with full_float32(there.device):
        for start in range(0, len(rows), 1024):
            here = _spectrum(grey[start : start + 1024] - mean)
            alike = torch.maximum(here @ there.T, here @ mirrored.T)
            for i, j in (alike >= TWINS).nonzero().tolist():
                if others is not None or start + i < j:
                    pairs.append((int(rows[start + i]), int(second_rows[j]), float(alike[i, j])))
    return sorted(pairs, key=lambda pair: -pair[2])


def _thumbnails(
    images: Images, rows: npt.NDArray[np.int64], intensity: str = "auto"
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Which rows can be read, and their grey values (R, SIDE, SIDE)."""
    view = View(SIDE, "squash", 0, "bilinear", intensity=intensity)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [seen.pixels for seen in pool.map(lambda row: look(view, images.sources[row]), rows)]
    readable = np.array([picture is not None for picture in found], dtype=np.bool_)
    pictures = np.array([p for p in found if p is not None], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
    red, green, blue = torch.from_numpy(pictures).unbind(dim=1)
    return rows[readable], 0.299 * red + 0.587 * green + 0.114 * blue


def _windows(grey: Tensor) -> Tensor:
    """Spectra of all windows (T, 2, 5, 5, D) of pictures (T, SIDE, SIDE), as they are and mirrored."""
    both = torch.stack([grey, grey.flip(-1)], dim=1)
    return _spectrum(both.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1))


def _spectrum(pictures: Tensor) -> Tensor:
    """The 55 lowest frequencies but the mean of (..., n, n), whatever n, of length 1: (..., D).

    Cosine transform II, each frequency times its radius, for natural images fade with it. What is fainter than the
    rounding to grey levels stays shorter than 1.
    """
    side, order = pictures.shape[-1], torch.arange(8.0)
    waves = torch.cos(pi / side * order[:, None] * (torch.arange(side) + 0.5)) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    radius = torch.hypot(order[:, None], order)
    low = (radius > 0) & (radius < 8)
    return F.normalize((radius * (waves @ pictures @ waves.T))[..., low], dim=-1, eps=10)


def _correlation(bank: Tensor, grey: Tensor) -> Tensor:
    """Highest correlation of pictures (R, SIDE, SIDE) with windows (T, 2, 5, 5, D) where it is above WORTH, else 0.

    Each of torch's threads takes test images of its own: at every product waiting for each other, as they usually do,
    takes a busy machine 50 times as long.
    """
    margin = (SIDE - WINDOW) // 2
    queries = torch.stack([_spectrum(grey), _spectrum(grey[:, margin:-margin, margin:-margin])])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_float32(bank.device), ThreadPoolExecutor(threads) as pool:
            return torch.stack(list(pool.map(partial(_beside, queries), torch.split(bank, 32)))).amax(dim=0)
    finally:
        torch.set_num_threads(threads)


def _beside(queries: Tensor, windows: Tensor) -> Tensor:
    """See _correlation: of spectra (2, R, D) with few test images, so that products stay in a CPU's caches, (R,)."""
    found = torch.zeros(queries.shape[1])
    coarse = windows[:, :, ::2, ::2].flatten(1, 3).transpose(0, 1)  # none of the others is more than a pixel away
    worth = torch.cat([_alike(part, coarse) > WORTH for part in torch.split(queries, 1024, dim=1)])
    for all_places, rows in zip(windows.flatten(1, 3), worth.T, strict=True):
        some = rows.nonzero()[:, 0]
        found[some] = torch.maximum(found[some], _alike(queries[:, some], all_places[:, None])[:, 0])
    return found


def _alike(queries: Tensor, windows: Tensor) -> Tensor:
    """Highest correlation of two spectra a picture (2, R, D) with some windows of each image (W, T, D): (R, T)."""
    products = queries.flatten(0, 1) @ windows.flatten(0, 1).T
    return products.view(*queries.shape[:2], *windows.shape[:2]).amax(dim=2).amax(dim=0)

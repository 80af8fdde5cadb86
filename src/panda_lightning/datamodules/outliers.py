"""Images for outlier exposure, kept apart from the test images."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from panda_lightning.datamodules.images import Images, View
from panda_lightning.search.knn import KNNIndex
from panda_lightning.types import PandaError


def read_outliers(source: str, datasets: dict[str, Any]) -> Images:
    """List images that show nothing of the test classes.

    Args:
        source: A folder of images, searched with its subfolders; a ``.npy`` file (N, H, W, 3) uint8, such as
            300K_random_images.npy, which is mapped, not loaded; or a data set of this project as ``CLASS:ROOT``
            (``CIFAR100:data``), whose training images are taken.
        datasets: The data-module classes by name.

    Raises:
        PandaError: If it is none of these.
    """
    path = Path(source)
    if path.suffix == ".npy" and path.is_file():
        pixels = np.load(path, mmap_mode="r")
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise PandaError(f"outliers={source} is {pixels.dtype} {pixels.shape}: expected uint8 (N, H, W, 3).")
        return Images(pixels, np.zeros(len(pixels), dtype=np.int64))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if files:
            return Images(files, np.zeros(len(files), dtype=np.int64))
        raise PandaError(f"outliers={source} holds no images: their names must end in {', '.join(IMG_EXTENSIONS)}.")
    name, _, root = source.partition(":")
    if root and name in datasets:
        images: Images = datasets[name](root=root).read("train")
        return images
    raise PandaError(
        f"outliers={source} is neither a folder, nor a .npy file, nor CLASS:ROOT with one of {', '.join(datasets)}."
    )


def outliers_apart(source: str, datasets: dict[str, Any], test: Images) -> Images:
    """Images for outlier exposure without what is, or nearly is, a test image; the number left out is said.

    Args:
        source: See read_outliers.
        datasets: See there.
        test: The test images.

    Raises:
        PandaError: If there is no such source, or nothing is left.
    """
    images = read_outliers(source, datasets)
    kept = apart_from(test, images)
    rank_zero_info(f"{len(images) - len(kept)} of {len(images)} outliers are test images, or nearly, and are left out")
    if not len(kept):
        raise PandaError(f"data.outliers={source} holds no images besides test images: name others.")
    return images.take(kept)


def apart_from(test: Images, outliers: Images, closeness: float = 0.02) -> npt.NDArray[np.int64]:
    """Rows of the outliers that are not, nearly, a test image.

    Images are compared as thumbnails of 8 x 8 pixels, so that another size or compression does not hide a copy.

    Args:
        test: Images that must not be trained on.
        outliers: Candidates.
        closeness: Root mean square difference of thumbnails, as a fraction of full scale, up to which two are
            the same.

    Returns:
        Row numbers, ascending.
    """
    view = View(8, "squash", 0, "bilinear")
    thumbnails = [
        torch.from_numpy(np.stack([view(images.sources[i]) for i in range(len(images))])).flatten(1).float() / 255
        for images in (test, outliers)
    ]
    distance, _ = KNNIndex().fit(thumbnails[0]).search(thumbnails[1], 1)
    return np.flatnonzero((distance[:, 0] / thumbnails[0].shape[1]).sqrt().numpy() > closeness)

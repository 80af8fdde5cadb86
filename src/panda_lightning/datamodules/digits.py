"""Handwritten digits that come with scikit-learn: nothing to download."""

from functools import cache
from typing import Any

import numpy as np
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split


class Digits(AnomalyDataModule):
    """1,797 grey digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI). Even rows train, odd rows test: our split."""

    classes = tuple("0123456789")
    own_split = True

    @override
    def read(self, split: Split) -> Images:
        digits = _digits()
        rows = slice(0 if split == "train" else 1, None, 2)
        pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # 17 grey levels, 0 to 16
        return Images(pixels, digits.target[rows].astype(np.int64))


@cache
def _digits() -> Any:
    """Read from a text file, which takes longer than all else that a short run does with them."""
    from sklearn.datasets import load_digits

    return load_digits()

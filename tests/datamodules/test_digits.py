import numpy as np
from sklearn.datasets import load_digits

from panda_lightning import Digits


def test_even_rows_train_and_odd_rows_test():
    digits = load_digits()
    for split, start in (("train", 0), ("test", 1)):
        images = Digits().read(split)
        np.testing.assert_array_equal(images.targets, digits.target[start::2])
        np.testing.assert_allclose(images.sources, digits.images[start::2] * 255 / 16, atol=0.51)

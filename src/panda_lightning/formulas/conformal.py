"""Conformal p-values and decisions, which hold for a finite sample."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from panda_lightning.types import PandaError

Array = npt.NDArray[np.float64]


def p_values(calibration: Array, scores: Array) -> Array:
    r"""Conformal p-values of scores (N,), where (n,) are those of normal images that nothing was made of.

    .. math:: p(s) = \frac{1 + \#\{i : c_i \ge s\}}{n + 1}

    For a normal image that is exchangeable with those of the calibration, P(p <= alpha) <= alpha, for every n and every
    detector; the probability is over both (Vovk, Gammerman, Shafer 2005; Bates et al. 2023, arXiv 2104.08279). NaN
    stays NaN.

    Examples:
        >>> p_values(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 3.5, 9.0])).tolist()
        [1.0, 0.4, 0.2]
    """
    below = np.searchsorted(np.sort(calibration), scores, side="left")
    found = (1 + len(calibration) - below) / (len(calibration) + 1)
    return np.where(np.isnan(scores), np.nan, found)


def flagged(p: Any, alpha: float) -> Any:
    """Where p-values are at most alpha, up to the rounding of their quotients."""
    return p <= alpha + 1e-12


def require_alpha(alpha: float, calibration: int, name: str = "alpha") -> None:
    """Refuse a level that no score can reach.

    Raises:
        PandaError: Naming the number of calibration images that are needed.
    """
    if alpha * (calibration + 1) < 1 - 1e-9:
        needed = math.ceil(1 / alpha - 1e-9) - 1
        raise PandaError(
            f"{name}={alpha:g} needs {needed} calibration images or more, and there are {calibration}, whose smallest "
            f"p-value is {1 / (calibration + 1):.3g}: raise it, or train with a larger data.calibration_fraction."
        )


def benjamini_hochberg(p: Array, level: float) -> npt.NDArray[np.bool_]:
    """Which of the p-values (N,) are discoveries: of these a share of ``level`` at most is false, in expectation.

    This holds for conformal p-values of images that are independent of each other, although one calibration serves them
    all (Benjamini, Hochberg 1995; Bates et al. 2023, theorem 2). NaN is no discovery.

    Examples:
        >>> benjamini_hochberg(np.array([0.01, 0.9, 0.03, 0.5]), 0.1).tolist()
        [True, False, True, False]
    """
    order = np.argsort(p, kind="stable")  # NaN last
    tested = int(np.isfinite(p).sum())
    passed = np.flatnonzero(p[order[:tested]] <= level * np.arange(1, tested + 1) / max(1, tested))
    found = np.zeros(len(p), dtype=np.bool_)
    found[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return found


def discoverable(images: int, calibration: int, level: float) -> int:
    """How many of so many images must have the smallest possible p-value for any to be a discovery."""
    return math.ceil(images / (level * (calibration + 1)) - 1e-9)

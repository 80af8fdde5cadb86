"""What a run on a data module's images depends on."""

from pathlib import Path
from typing import Any

from panda_lightning.datamodules.outliers import outlier_source
from panda_lightning.types import PandaError


def origin_of(data: Any, training: bool) -> dict[str, Any]:
    """Primitives for a detector to keep and to compare, see AnomalyDataModule.origin.

    Raises:
        PandaError: If there are no test images, or no training images where there must be.
    """
    test = data.test_images
    normal = None
    try:
        normal = data.normal_images
    except PandaError:
        if training:
            raise
    return {
        "data": type(data).__name__,
        "problem": data.problem,
        "view": data.view.words,
        "normal training images": normal and f"{len(normal)} ({normal.fingerprint(data.root)})",
        "test images": f"{len(test)} ({test.fingerprint(data.root)})",
        "files": normal and normal.fingerprint(data.root, times=True),  # of this machine
        "on_error": data.on_error,
        "batch_size": data.batch_size,
        "seed": data.seed,
        "calibration images": data.calibration_fraction,
        "outliers": data.outliers and training and outlier_source(data).fingerprint(Path(data.outliers)),
    }

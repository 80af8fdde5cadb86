"""Pictures in DICOM files, through pydicom: ``pip install 'panda-lightning[dicom]'``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from panda_lightning.types import PandaError

TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(f"{c}PaletteColorLookupTable{part}" for c in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
]  # fmt: skip


Curve = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def read(source: Path) -> tuple[npt.NDArray[Any], tuple[float, float], bool, Curve | None]:
    """Read the first picture. Only what describes pixels is taken from the file, nothing of the patient.

    Returns:
        Values (H, W) after slope and intercept, or colours (H, W, 3); the range to show, which is the window that the
        file names, or else all that its bits can hold; whether large values are dark (MONOCHROME1); and, where the
        file asks for more than a linear window, what to make of the values before the range applies.

    Raises:
        ValueError: If it cannot be read; the text holds nothing of the file.
    """
    try:
        import pydicom
        from pydicom.pixels.common import PhotometricInterpretation as Kind
        from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise ValueError("DICOM needs pydicom: pip install 'panda-lightning[dicom]'") from error
    try:
        data = pydicom.dcmread(source, specific_tags=TAGS)
        if "PixelData" not in data:
            raise PandaError("DICOM without a picture")
        values: npt.NDArray[Any] = pixel_array(data, index=0)
        inverted, curve = data.PhotometricInterpretation == Kind.MONOCHROME1, None
        if data.PhotometricInterpretation == Kind.PALETTE_COLOR:
            values = apply_color_lut(values, data)
            return values, (0, 2 ** (8 * values.itemsize) - 1), False, None
        if values.ndim == 3:
            return values, (0, 2**data.BitsStored - 1), False, None
        signed = 2 ** (data.BitsStored - 1) if data.PixelRepresentation else 0
        ends = apply_modality_lut(np.array([-signed, 2**data.BitsStored - 1 - signed]), data)
        values, low, high = apply_modality_lut(values, data), float(ends.min()), float(ends.max())
        function = data.get("VOILUTFunction", "LINEAR")
        has_window = None not in (data.get("WindowCenter"), data.get("WindowWidth"))  # either may be there, and empty
        if "VOILUTSequence" in data:
            low, high = 0, 2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
            curve = partial(apply_voi_lut, ds=data)
        elif has_window and function == "SIGMOID":
            curve = partial(apply_voi_lut, ds=data)
        elif has_window:
            centre, width = (float(np.ravel(data[word].value)[0]) for word in ("WindowCenter", "WindowWidth"))
            less = function == "LINEAR" and width >= 1  # PS3.3 C.11.2.1.2, which knows no width below 1, and C.11.2.1.3
            low, high = centre - width / 2, max(centre + width / 2 - less, centre - width / 2 + 1e-6)
        if values.dtype.kind == "f" and np.array_equal(values, values.round()):
            values = values.astype(np.int64)
        return values, (low, high), inverted, curve
    except PandaError:
        raise
    except RuntimeError:  # no decoder for how it is compressed
        raise ValueError("DICOM compressed in a way that needs another package: pip install pylibjpeg[all]") from None
    except Exception as error:  # pydicom raises whatever a broken file leads to, with values of it in the text
        raise ValueError(f"DICOM that cannot be decoded ({type(error).__name__})") from None

"""Pictures in DICOM files, through pydicom: ``pip install 'panda-lightning[dicom]'``."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(f"{c}PaletteColorLookupTable{part}" for c in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
]  # fmt: skip


def read(source: Path) -> tuple[npt.NDArray[Any], tuple[float, float], bool]:
    """Read the first picture. Only what describes pixels is taken from the file, nothing of the patient.

    Returns:
        Values (H, W) after slope and intercept, or colours (H, W, 3); the range to show, which is the window that the
        file names, or else all that its bits can hold; and whether large values are dark (MONOCHROME1).

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
        values: npt.NDArray[Any] = pixel_array(data, index=0)
        inverted = data.PhotometricInterpretation == Kind.MONOCHROME1
        if data.PhotometricInterpretation == Kind.PALETTE_COLOR:
            values = apply_color_lut(values, data)
        if values.ndim == 3:
            return values, (0, 2 ** (8 * values.itemsize) - 1), False
        signed = 2 ** (data.BitsStored - 1) if data.PixelRepresentation else 0
        ends = apply_modality_lut(np.array([-signed, 2**data.BitsStored - 1 - signed]), data)
        values, low, high = apply_modality_lut(values, data), float(ends.min()), float(ends.max())
        function = data.get("VOILUTFunction", "LINEAR")
        has_window = None not in (data.get("WindowCenter"), data.get("WindowWidth"))  # either may be there, and empty
        if "VOILUTSequence" in data:
            values, low, high = apply_voi_lut(values, data), 0, 2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
        elif has_window and function == "SIGMOID":
            values = apply_voi_lut(values, data)
        elif has_window:
            centre, width = (float(np.ravel(data[word].value)[0]) for word in ("WindowCenter", "WindowWidth"))
            low = centre - width / 2
            high = max(centre + width / 2 - (function == "LINEAR"), low + 1e-6)  # PS3.3 C.11.2.1.2 and C.11.2.1.3
        if values.dtype.kind == "f" and np.array_equal(values, values.round()):
            values = values.astype(np.int64)
        return values, (low, high), inverted
    except Exception as error:  # pydicom raises whatever a broken file leads to, with values of it in the text
        raise ValueError(f"DICOM that cannot be decoded ({type(error).__name__})") from None

"""Pictures as cameras, phones, scanners and annotators write them."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a),  # the camera was turned; a viewer turns the picture clockwise
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, -1),
}  # what a file holds of an upright array, by EXIF's number


def with_orientation(path: Path, upright: np.ndarray, number: int, **options) -> Path:
    """Write an upright array (H, W, ...) as a camera that was held in another way."""
    image = Image.fromarray(np.ascontiguousarray(STORED[number](upright)))
    if path.suffix == ".tif":
        image.save(path, tiffinfo={274: number}, **options)
    else:
        exif = image.getexif()
        exif[274] = number
        image.save(path, exif=exif, **options)
    return path


def png16(path: Path, values: np.ndarray) -> Path:
    """Write (H, W, 3) uint16 as PNG of 16 bits a channel, which Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def dicom(path: Path, values: np.ndarray, bits: int = 12, kind: str = "MONOCHROME2", **tags) -> Path:
    """Write (H, W) or (H, W, 3) whole numbers as a DICOM file of a patient, uncompressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID = "Doe^Jane", "secret-17"
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = kind
    data.BitsAllocated = 8 if bits <= 8 else 16
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, int((values < 0).any())
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype(
        {8: "u1", 16: "<i2" if data.PixelRepresentation else "<u2"}[data.BitsAllocated]
    ).tobytes()
    data.save_as(path, enforce_file_format=True)
    return path

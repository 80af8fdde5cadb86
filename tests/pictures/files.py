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


def tiff(path: Path, values: np.ndarray, photometric: int, sample_format: int = 1) -> Path:
    """Write (H, W) or (H, W, 3) as a TIFF of one strip, with the tags that Pillow cannot set."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    data, bits = values.tobytes(), 8 * values.itemsize
    tags = {
        256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 8),
        277: (3, samples), 278: (4, height), 279: (4, len(data)), 339: (3, sample_format),
    }  # fmt: skip
    more = b""
    end = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, (kind, value) in tags.items():
        if tag in (258, 339) and samples > 1:
            entries += struct.pack("<HHII", tag, 3, samples, end + len(more))
            more += struct.pack("<3H", *[value] * 3)
        else:
            entries += struct.pack("<HHII", tag, kind, 1, value)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + more)
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


def reencode(source: Path, target: Path, kind: str) -> str:
    """Write a picture anew, of the same content in another form.

    Args:
        source: A picture of 8 bits.
        target: Where to write it; its ending is replaced.
        kind: grey, 16, 12, 10, int32, float, dicom or monochrome1 (all of them its grey values, 12 and 10 in files of
            16 bits); or colour and turned (JPEG of quality 95 without and with an EXIF tag, one of the eight by name).

    Returns:
        The rule for intensity that it needs.
    """
    image = Image.open(source)
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("colour", "turned"):
        number = 1 + zlib.crc32(source.name.encode()) % 8 if kind == "turned" else 1
        path = with_orientation(target.with_suffix(".jpg"), np.asarray(image.convert("RGB")), number, quality=95)
        return "auto" if path.is_file() else ""
    if kind == "dicom":
        dicom(target.with_suffix(".dcm"), grey * 16, WindowCenter=2048, WindowWidth=4096)
    elif kind == "monochrome1":
        dicom(target.with_suffix(".dcm"), 4095 - grey * 16, kind="MONOCHROME1")
    elif kind == "float":
        Image.fromarray((grey / 255).astype(np.float32)).save(target.with_suffix(".tif"))
    elif kind == "int32":
        Image.fromarray(grey.astype(np.int32) * 257).save(target.with_suffix(".tif"))
    else:
        factor = {"grey": 1, "16": 257, "12": 16, "10": 4}[kind]
        values = grey.astype(np.uint8) if kind == "grey" else grey * factor
        Image.fromarray(values).save(target.with_suffix(".png"))
    return {"12": "bits:12", "10": "bits:10", "int32": "bits:16"}.get(kind, "auto")


def redraw(source: Path, target: Path, kind: str) -> Path:
    """Write a mask anew, of the same pixels in another form.

    Args:
        source: A mask, 0 where normal.
        target: Where to write it, without the ``_mask.png`` that most kinds get.
        kind: white, one, hundred, palette, red, transparent, double (twice as large), plain_name, bmp, upper or jpeg.
    """
    drawn = np.asarray(Image.open(source).convert("L")) > 0
    target.parent.mkdir(parents=True, exist_ok=True)
    name = {"plain_name": "{}.png", "bmp": "{}_mask.bmp", "upper": "{}_MASK.PNG", "jpeg": "{}_mask.jpg"}
    path = target.with_name(name.get(kind, "{}_mask.png").format(target.name))
    image = Image.fromarray(drawn.astype(np.uint8) * {"one": 1, "hundred": 100}.get(kind, 255))
    if kind == "palette":
        image = Image.fromarray(drawn.astype(np.uint8))
        image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    elif kind == "red":
        image = Image.merge("RGB", [image, image.point(lambda _: 0), image.point(lambda _: 0)])
    elif kind == "transparent":
        image = Image.merge("LA", [image.point(lambda _: 255), image])
    elif kind == "double":
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    image.save(path)
    return path

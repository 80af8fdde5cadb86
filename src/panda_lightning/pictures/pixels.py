"""How a file becomes pixels: one rule for training, prediction, masks and ``panda check-data``.

Orientation: a picture is turned as its EXIF tag says.

Colour: grey is repeated, an alpha channel dropped. Of files with several pictures the first counts.

Intensity: 8 bits stay as they are. What is deeper follows one rule for all images of a data set. Nothing is stretched
image by image, which would hide how bright a picture is.

- ``auto``: the range of the file's own format: 16 bits 0 to 65535, packed 12 bits 0 to 4095, floating point 0 to 1,
  DICOM its window (or else its bits). 32-bit integers, which have none, are refused.
- ``bits:N``: whole numbers from 0 to 2**N - 1; larger ones are refused. 8-bit files stay as they are.
- ``window:LO,HI``: LO becomes 0 and HI becomes 255, of whatever the file holds; what lies beyond is clipped. In DICOM
  these are values after its slope and intercept, in 8-bit files 0 to 255.

Colour of 16 bits has all of them in PNG alone: Pillow reads 8 of other formats, so that rules for more are refused.

DICOM: see pictures/dicom.py.

Masks: 0, or black in a picture with colours, is background; any other value is anomalous. Where a mask has transparency
that varies, this alone counts: transparent pixels are background. Formats that may be lossy (JPEG, WebP, AVIF, JPEG
2000) are cut at 127, since 0 and 255 come out of them only nearly. ``mask_values`` names the anomalous values instead:
grey values (in colours: their brightness), numbers of a palette, 0 and 1 of a 1-bit mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm", ".pbm",
    ".jp2", ".dcm", ".dicom",
)  # fmt: skip
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's number
ORIENTATION = 0x0112

Source = Path | npt.NDArray[np.uint8] | Image.Image


@dataclass(frozen=True)
class Intensity:
    """A rule that makes 8 bits of deeper values, see above.

    Attributes:
        kind: auto, bits or window.
        low: What becomes 0.
        high: What becomes 255.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0

    @staticmethod
    @cache
    def parse(text: str) -> "Intensity":
        """Read auto, bits:N or window:LO,HI.

        Raises:
            ValueError: If it is none of these.
        """
        kind, _, numbers = text.partition(":")
        if text == "auto":
            return Intensity("auto")
        if kind == "bits" and numbers.isdecimal() and 8 <= int(numbers) <= 32:
            return Intensity(kind, 0, 2 ** int(numbers) - 1)
        if kind == "window":
            low, high = (float(number) for number in numbers.split(","))
            if -np.inf < low < high < np.inf:
                return Intensity(kind, low, high)
        raise ValueError(text)

    def deep(self, values: npt.NDArray[Any], natural: tuple[float, float] | None) -> npt.NDArray[np.uint8]:
        """Make 8 bits of the values (H, W) or (H, W, 3) of a file.

        Args:
            values: Whole or floating-point numbers.
            natural: The range that ``auto`` takes, where the format has one.

        Raises:
            ValueError: If the rule does not suit them.
        """
        whole = values.dtype.kind in "ui"
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if not np.isfinite([low, high]).all():
            raise ValueError("some values are NaN or infinite")
        says = f"its values, {low:g} to {high:g},"
        kind = "auto" if self.kind == "bits" and natural == (0, 255) else self.kind  # 8 bits stay as they are
        if kind == "bits":
            if not whole:
                raise ValueError(f"{says} are floating-point: set intensity to window:LO,HI")
            if low < 0 or high > self.high:
                raise ValueError(f"{says} exceed bits:{int(self.high).bit_length()}, 0 to {self.high:g}")
            return (values >> (int(self.high).bit_length() - 8)).astype(np.uint8)
        if kind == "auto" and natural is None:
            raise ValueError(f"{says} have no range of their own: set intensity to bits:N or window:LO,HI")
        if kind == "auto" and natural == (0, 65535):
            return (values >> 8).astype(np.uint8)
        if kind == "auto" and natural == (0, 1) and (low < 0 or high > 1):
            raise ValueError(f"{says} lie outside 0 to 1: set intensity to window:LO,HI")
        bottom, top = natural if kind == "auto" and natural is not None else (self.low, self.high)
        scaled = (values.astype(np.float64) - bottom) * 255 / (top - bottom)
        return scaled.clip(0, 255).round().astype(np.uint8)

    def shallow(self, image: Image.Image) -> Image.Image:
        """The same for a picture of 8 bits, which only a window changes."""
        if self.kind != "window":
            return image
        table = self.deep(np.arange(256), None).tolist()
        return image.point(table * len(image.getbands()))


class Frame(NamedTuple):
    """What a mask must fit: an image's upright width and height in pixels, and EXIF's number of its orientation."""

    size: tuple[int, int]
    orientation: int


@dataclass(frozen=True)
class Opened:
    """What a file holds, upright.

    Attributes:
        mode: Pillow's name for it, or DICOM.
        orientation: EXIF's number, 1 where it says none.
        picture: RGB, of 8 bits; None where values are deeper.
        values: Deeper values (H, W) or (H, W, 3).
        natural: See Intensity.deep.
        inverted: Whether large values are dark.
        coarse: Whether the picture lacks the lower 8 of the file's 16 bits.
        curve: What ``auto`` makes of the values first, where the format says so.
    """

    mode: str
    orientation: int = 1
    picture: Image.Image | None = None
    values: npt.NDArray[Any] | None = None
    natural: tuple[float, float] | None = None
    inverted: bool = False
    coarse: bool = False
    curve: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None

    @property
    def frame(self) -> "Frame":
        """Its upright size and its orientation."""
        if self.picture is not None:
            return Frame(self.picture.size, self.orientation)
        assert self.values is not None
        return Frame((self.values.shape[1], self.values.shape[0]), self.orientation)

    @property
    def extremes(self) -> tuple[float, float]:
        """The least and the largest value."""
        if self.values is not None:
            return float(self.values.min()), float(self.values.max())
        assert self.picture is not None
        bands = self.picture.getextrema()
        return float(min(low for low, _ in bands)), float(max(high for _, high in bands))  # type: ignore[misc]

    def rgb(self, intensity: str) -> Image.Image:
        """The picture by a rule for intensity."""
        rule = Intensity.parse(intensity)
        if self.coarse and rule.kind != "auto":
            raise ValueError("16-bit colour is read only from PNG: save the image as PNG, or leave intensity out")
        if self.picture is not None:
            return rule.shallow(self.picture)
        assert self.values is not None
        curved = self.curve is not None and rule.kind == "auto"
        grey = rule.deep(self.curve(self.values) if curved and self.curve else self.values, self.natural)
        return Image.fromarray(255 - grey if self.inverted else grey).convert("RGB")


def read_rgb(source: Source, intensity: str = "auto", max_megapixels: float | None = None) -> Image.Image:
    """Read an upright RGB image; see ``opened``."""
    return opened(source, max_megapixels).rgb(intensity)


def opened(source: Source, max_megapixels: float | None = None) -> Opened:
    """Read a file or an array, see this module's beginning.

    Args:
        source: A file, an array (H, W) or (H, W, 3), or an image of Pillow.
        max_megapixels: How large an image may be; None is Pillow's limit.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    if isinstance(source, np.ndarray):
        return Opened("L" if source.ndim == 2 else "RGB", picture=Image.fromarray(source).convert("RGB"))
    if isinstance(source, Path) and source.suffix.lower() in (".dcm", ".dicom"):
        from panda_lightning.pictures import dicom  # pydicom is slow to import

        values, natural, inverted, curve = dicom.read(source)
        if natural == (0, 255) and values.ndim == 3:
            return Opened("DICOM", picture=Image.fromarray(values.astype(np.uint8)))
        return Opened("DICOM", values=values, natural=natural, inverted=inverted, curve=curve)
    with _image(source, max_megapixels) as image:
        mode, (raw, most) = image.mode, _stored(image)
        orientation = _frame(image).orientation  # which may load it
        tags = getattr(image, "tag_v2", {})  # of TIFF: bits, how white is written, and how signs are
        bits, white_is_0, signed = tags.get(258, (16,))[0], tags.get(262) == 0, tags.get(339, (1,))[0] == 2
        coarse = raw.startswith(("RGB;16", "RGBA;16", "RGBX;16", "LA;16")) or (mode == "RGB" and most > 255)
        if coarse and image.format == "PNG" and isinstance(source, Path):
            return Opened(mode, orientation, values=_turned(_colour16(source), orientation), natural=(0, 65535))
        image = _upright(image)
        older = mode == "I" and (raw == "I;16B" or image.format == "PPM")  # what older Pillows say of 16 bits
        if mode.startswith("I;16") or older:
            full = 2 ** min(bits, 16) - 1
            grey = np.asarray(image).astype(np.uint16)
            return Opened(mode, orientation, values=grey, natural=(0, full), inverted=white_is_0)
        if mode in ("I", "F") or (mode == "L" and signed):
            deep: npt.NDArray[Any] = np.asarray(image)
            if mode == "I" and tags and bits == 32 and not signed:  # Pillow knows no unsigned ones
                deep = deep.view(np.uint32)
            deep = deep.view(np.int8) if mode == "L" else deep
            return Opened(mode, orientation, values=deep, natural=(0, 1) if mode == "F" else None, inverted=white_is_0)
        return Opened(mode, orientation, picture=image.convert("RGB"), coarse=coarse)


def frame(source: Source, max_megapixels: float | None = None) -> Frame:
    """What a mask of an image must fit, without decoding a picture where its file begins with that."""
    if isinstance(source, np.ndarray) or (isinstance(source, Path) and source.suffix.lower() in (".dcm", ".dicom")):
        return opened(source).frame
    with _image(source, max_megapixels) as image:
        return _frame(image)


def _stored(image: Image.Image) -> tuple[str, int]:
    """How the file of an image that is not loaded yet holds its values, in Pillow's words, and PPM's largest value."""
    how = next((tile[3] for tile in getattr(image, "tile", ())), "")
    parts = how if isinstance(how, tuple) else (how,)
    return str(parts[0] if parts else ""), int(parts[-1]) if image.format == "PPM" and parts[1:] else 0


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError):  # a broken tag is none
        return 1


def _frame(image: Image.Image) -> Frame:
    """The frame of an image that is not loaded yet."""
    orientation = _orientation(image)
    if image.format == "TIFF":
        image.load()  # Pillow turns it then, and takes the tag away
        return Frame(image.size, orientation)
    return Frame(image.size[::-1] if orientation in (5, 6, 7, 8) else image.size, orientation)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says."""
    image.load()
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


@contextmanager
def _image(source: Path | Image.Image, max_megapixels: float | None = None) -> Iterator[Image.Image]:
    """A file to be loaded within, also beyond Pillow's limit where another is given."""
    if isinstance(source, Image.Image):
        yield source
        return
    file: Any = source
    if source.suffix.lower() in (".tif", ".tiff"):  # Pillow maps such files, and scrambles them where a tag turns them
        file = BytesIO(source.read_bytes())
    with nullcontext() if max_megapixels is None else _Unlimited(), Image.open(file) as image:
        if max_megapixels is not None and image.width * image.height > max_megapixels * 1e6:
            raise ValueError(f"{image.width} x {image.height} pixels are more than max_megapixels={max_megapixels:g}")
        yield image


class _Unlimited:
    """Pillow's limit is one for all threads: off from the first that enters to the last that leaves."""

    lock, inside = Lock(), 0
    limit: int | None = None

    def __enter__(self) -> None:
        with self.lock:
            if not _Unlimited.inside:
                _Unlimited.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            _Unlimited.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            _Unlimited.inside -= 1
            if not _Unlimited.inside:
                Image.MAX_IMAGE_PIXELS = _Unlimited.limit


def _colour16(source: Path) -> npt.NDArray[np.uint16]:
    """The values (H, W, 3) of a PNG of 16 bits a channel."""
    from torchvision.io import ImageReadMode, decode_image

    values: npt.NDArray[np.uint16] = decode_image(str(source), ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return values[..., :3] if values.shape[2] > 2 else values[..., :1].repeat(3, axis=2)


def _turned(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """An array (H, W, C) as EXIF's number says: numbers above 4 swap its sides."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(values[:: -1 if down else 1, :: -1 if across else 1])


# ---- masks -------------------------------------------------------------------------------------------------------


def read_mask(
    path: Path, image: Frame, values: tuple[int, ...] | None = None, max_megapixels: float | None = None
) -> tuple[Image.Image, bool]:
    """Read the mask of an image in the image's upright frame: a grey picture, 255 where anomalous.

    A mask is turned as its own EXIF tag says. One without a tag was drawn on the upright image, or, where its sides
    fit only then, on the image as it is stored, and is turned like it. (Sides do not tell for a square image, nor for
    one that is mirrored or turned by 180 degrees: the mask is then taken for upright.)

    Args:
        path: The mask's file.
        image: The frame of the image that it belongs to.
        values: The values that are anomalous, see this module's beginning.
        max_megapixels: See ``opened``.

    Returns:
        The mask, of its own size or, if that has other sides than the image, of the image's; and whether it has.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    with _image(path, max_megapixels) as mask:
        size, own = _frame(mask)
        anomalous = Image.fromarray(_anomalous(mask, values).astype(np.uint8) * 255)
    if mask.format == "TIFF":
        own = 1  # it is upright by now
    elif own == 1 and image.orientation >= 5 and not _alike(size, image.size) and _alike(size[::-1], image.size):
        own = image.orientation
    found = anomalous.transpose(TURNS[own]) if own in TURNS else anomalous
    if _alike(found.size, image.size):
        return found, False
    return found.resize(image.size, Image.Resampling.NEAREST), True


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same sides, but for two parts in a hundred or a pixel."""
    scale = [one[i] / other[i] for i in range(2)]
    return abs(scale[0] / scale[1] - 1) < max(0.02, *(1.5 / side for side in (*one, *other)))


def _anomalous(mask: Image.Image, values: tuple[int, ...] | None) -> npt.NDArray[np.bool_]:
    """Which pixels (H, W) of a mask's file are anomalous."""
    cut = 127 if mask.format in LOSSY else 0
    if values is not None:
        numbers = np.asarray(mask if mask.mode == "P" or mask.mode[0] in "LIF1" else mask.convert("L"))
        numbers = numbers.reshape(mask.height, mask.width, -1)[..., 0]
        if cut:  # a lossy value is the nearest of those that can be meant
            levels = np.array(sorted({0, 255, *values}))
            numbers = levels[abs(numbers[..., None].astype(int) - levels).argmin(axis=-1)]
        return np.isin(numbers, values)
    if "A" in mask.mode or "transparency" in mask.info:
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        if alpha.min() < alpha.max():
            return alpha > 0
    if mask.mode[0] in "IF1" or mask.mode == "L":
        return np.asarray(mask) > cut
    colours = np.asarray(mask.convert("RGB")).max(axis=2)
    if mask.mode == "P" and (colours.min() > 0 or colours.max() == 0):  # a palette without black, or with nothing else
        colours = np.asarray(mask)
    found: npt.NDArray[np.bool_] = colours > cut
    return found

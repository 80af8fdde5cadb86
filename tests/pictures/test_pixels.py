import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from panda_lightning.pictures.pixels import Frame, _turned, frame, opened, read_mask, read_rgb
from tests.conftest import picture
from tests.pictures.files import STORED, dicom, png16, reencode, tiff, with_orientation


@pytest.fixture
def grey() -> np.ndarray:
    """(20, 30) uint8 with all that matters: 0, 255 and values between."""
    return np.linspace(0, 255, 600).round().astype(np.uint8).reshape(20, 30)


def deep(path, grey: np.ndarray):
    """The same picture with more bits, and the rule that gives it back."""
    wide = grey.astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 4, grey.shape, dtype=np.uint16)  # bits that 8 do not have
    return {
        "16.png": (lambda p: Image.fromarray(wide * 257).save(p), "auto"),
        "16.tif": (lambda p: Image.fromarray(wide * 257).save(p), "auto"),
        "16.pgm": (lambda p: p.write_bytes(b"P5 30 20 65535\n" + (wide * 257).astype(">u2").tobytes()), "auto"),
        "10.png": (lambda p: Image.fromarray(wide * 4 + noise).save(p), "bits:10"),
        "12.png": (lambda p: Image.fromarray(wide * 16 + noise * 4).save(p), "bits:12"),
        "12.tif": (lambda p: Image.fromarray(wide * 16 + noise).save(p), "bits:12"),
        "8in16.png": (lambda p: Image.fromarray(wide).save(p), "bits:8"),
        "int32.tif": (lambda p: Image.fromarray(wide.astype(np.int32) * 256).save(p), "bits:16"),
        "signed.tif": (lambda p: Image.fromarray(wide.astype(np.int32) * 3 - 300).save(p), "window:-300,465"),
        "float.tif": (lambda p: Image.fromarray((grey / 255).astype(np.float32)).save(p), "auto"),
        "celsius.tif": (lambda p: Image.fromarray(grey.astype(np.float32) / 10 - 5).save(p), "window:-5,20.5"),
        "colour.png": (lambda p: png16(p, np.stack([wide * 16 + noise] * 3, axis=2)), "bits:12"),
    }[path.name]


@pytest.mark.parametrize(
    "name",
    ["16.png", "16.tif", "16.pgm", "10.png", "12.png", "12.tif", "8in16.png", "int32.tif", "signed.tif", "float.tif",
     "celsius.tif", "colour.png"],
)  # fmt: skip
def test_deep_files_are_the_8_bit_picture_by_their_rule(tmp_path, grey, name):
    write, rule = deep(tmp_path / name, grey)
    write(tmp_path / name)
    found = np.asarray(read_rgb(tmp_path / name, rule))
    np.testing.assert_array_equal(found, np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize(
    ("values", "rule", "sentence"),
    [
        (np.arange(600, dtype=np.int32), "auto", "values, 0 to 599, have no range of their own: set intensity to bits"),
        (np.linspace(0, 40, 600, dtype=np.float32), "auto", "0 to 40, lie outside 0 to 1: set intensity to window"),
        (np.linspace(0, 1, 600, dtype=np.float32), "bits:12", "0 to 1, are floating-point: set intensity to window"),
        (np.full(600, np.nan, dtype=np.float32), "auto", "some values are NaN or infinite"),
        (np.full(600, np.nan, dtype=np.float32), "window:0,1", "some values are NaN or infinite"),
        (np.arange(600, dtype=np.uint16) * 9, "bits:12", "0 to 5391, exceed bits:12, 0 to 4095"),
    ],
)
def test_values_that_a_rule_does_not_suit_are_refused(tmp_path, values, rule, sentence):
    Image.fromarray(values.reshape(20, 30)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=sentence):
        read_rgb(tmp_path / "a.tif", rule)


def test_no_picture_is_stretched_by_itself(tmp_path, grey):
    """Brightness tells pictures apart: one half as bright stays half as bright, by every rule."""
    for factor, name in ((16, "a.png"), (8, "b.png")):
        Image.fromarray(grey.astype(np.uint16) * factor).save(tmp_path / name)
    for rule in ("auto", "bits:12", "window:0,4095"):
        bright, dark = (int(np.asarray(read_rgb(tmp_path / name, rule)).max()) for name in ("a.png", "b.png"))
        assert abs(dark - bright / 2) <= 1


def test_8_bits_stay_as_they_are_but_for_a_window(tmp_path, grey):
    Image.fromarray(grey).save(tmp_path / "a.png")
    for rule in ("auto", "bits:12"):
        np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png", rule))[..., 1], grey)
    found = np.asarray(read_rgb(tmp_path / "a.png", "window:50,100"))[..., 1]
    expected = ((grey.astype(float) - 50) / 50 * 255).clip(0, 255).round()
    np.testing.assert_array_equal(found, expected)


def test_colour_of_16_bits_without_a_rule_is_its_high_bytes(tmp_path, grey):
    wide = np.stack([grey.astype(np.uint16) * 256 + 255] * 3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_rgb(png16(tmp_path / "a.png", wide))), wide >> 8)


@pytest.mark.parametrize("name", ["a.tif", "a.ppm"])
def test_16_bit_colour_that_pillow_halves_is_refused_with_a_rule(tmp_path, grey, name):
    wide = np.stack([grey.astype(np.uint16) * 257] * 3, axis=2)
    if name == "a.tif":
        tiff(tmp_path / name, wide, photometric=2)
    else:
        (tmp_path / name).write_bytes(b"P6 30 20 65535\n" + wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / name)), wide >> 8)
    for rule in ("bits:12", "window:0,99"):
        with pytest.raises(ValueError, match="16-bit colour is read only from PNG"):
            read_rgb(tmp_path / name, rule)


def test_tiffs_whose_0_is_white_and_signs_and_large_numbers(tmp_path, grey):
    wide = grey.astype(np.uint16) * 257
    for values, rule in ((grey, "auto"), (wide, "auto"), ((grey / 255).astype(np.float32), "window:0,1")):
        kind = 3 if values.dtype == np.float32 else 1
        found = np.asarray(read_rgb(tiff(tmp_path / "white.tif", values, 0, kind), rule))[..., 0]
        np.testing.assert_array_equal(found, 255 - grey)
    large = grey.astype(np.uint32) * 2**24
    np.testing.assert_array_equal(np.asarray(read_rgb(tiff(tmp_path / "u.tif", large, 1), "bits:32"))[..., 0], grey)
    signed = (grey.astype(int) - 128).astype(np.int8)
    found = np.asarray(read_rgb(tiff(tmp_path / "s.tif", signed, 1, 2), "window:-128,127"))[..., 0]
    np.testing.assert_array_equal(found, grey)
    with pytest.raises(ValueError, match="-128 to 127, have no range of their own"):
        read_rgb(tmp_path / "s.tif")


def test_a_broken_tag_is_none(tmp_path, grey):
    Image.fromarray(grey).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png"))[..., 0], grey)


# ---- orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {"quality": 95}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("deep.png", {}),
        ("deep.tif", {}),
    ],
)
def test_pictures_are_upright(tmp_path, number, name, options):
    upright = np.asarray(picture("cloud", 3, 64))[:48]
    if name.startswith("deep"):
        upright = upright[..., 0].astype(np.uint16) * 257
    image = opened(with_orientation(tmp_path / name, upright, number, **options))
    found = np.asarray(image.rgb("auto")).astype(int)
    expected = upright.astype(int) if upright.ndim == 3 else np.stack([upright >> 8] * 3, axis=2).astype(int)
    assert image.orientation == number
    assert image.frame.size == (64, 48)
    assert frame(tmp_path / name) == image.frame
    assert found.shape == expected.shape
    assert abs(found - expected).mean() < (6 if name == "a.jpg" else 1e-9)


@pytest.mark.parametrize("number", STORED)
def test_16_bit_colour_is_upright_too(tmp_path, number):
    values = np.random.default_rng(0).integers(0, 4096, (6, 9, 3), dtype=np.uint16)
    path = png16(tmp_path / "a.png", np.ascontiguousarray(STORED[number](values)))
    found = opened(path).values  # this writer sets no tag
    np.testing.assert_array_equal(_turned(found, number), values)


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn() -> np.ndarray:
    """(20, 30) bool: what an annotator drew."""
    found = np.zeros((20, 30), dtype=np.bool_)
    found[4:9, 3:20] = True
    return found


def palette(numbers: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(colours + [0] * (768 - len(colours)))
    return image


def rgba(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colour, alpha]).astype(np.uint8))


MASKS = {
    "white.png": lambda d: Image.fromarray(d.astype(np.uint8) * 255),
    "one.png": lambda d: Image.fromarray(d.astype(np.uint8)),
    "hundred.bmp": lambda d: Image.fromarray(d.astype(np.uint8) * 100),
    "one_bit.png": lambda d: Image.fromarray(d),
    "labels.png": lambda d: Image.fromarray(d.astype(np.uint8) * 2 + (np.indices(d.shape)[1] < 9) * d),
    "deep.png": lambda d: Image.fromarray(d.astype(np.uint16)),
    "integer.tif": lambda d: Image.fromarray(d.astype(np.int32)),
    "float.tif": lambda d: Image.fromarray(d.astype(np.float32) / 10),
    "red.png": lambda d: Image.fromarray(np.dstack([d * 255, d * 0, d * 0]).astype(np.uint8)),
    "blue.jpg": lambda d: Image.fromarray(np.dstack([d * 0, d * 0, d * 255]).astype(np.uint8)),
    "palette.png": lambda d: palette(d, [0, 0, 0, 128, 0, 0]),
    "palette_without_colours.png": lambda d: palette(d, [0, 0, 0, 0, 0, 0]),
    "palette_black_second.png": lambda d: palette(~d, [9, 200, 9, 0, 0, 0]),
    "palette_bright.png": lambda d: palette(d, [80, 80, 80, 255, 255, 255]),
    "transparent.png": lambda d: rgba(np.full((*d.shape, 3), 255), d * 255),
    "black_on_transparent.png": lambda d: rgba(np.zeros((*d.shape, 3)), d * 200),
    "opaque.png": lambda d: rgba(np.dstack([d * 255] * 3), np.full(d.shape, 255)),
    "grey_alpha.png": lambda d: Image.merge("LA", [Image.new("L", (30, 20), 255), MASKS["white.png"](d)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_background_is_0_black_or_transparent(tmp_path, drawn, name):
    MASKS[name](drawn).save(tmp_path / name, **({"quality": 95, "subsampling": 0} if name.endswith("jpg") else {}))
    found, stretched = read_mask(tmp_path / name, Frame((30, 20), 1))
    assert not stretched
    wrong = (np.asarray(found) > 0) != drawn
    assert wrong.sum() <= (4 if name.endswith("jpg") else 0)


def test_lossy_masks_are_cut_in_the_middle(tmp_path, drawn):
    image = Image.fromarray(drawn.astype(np.uint8) * 255)
    image.save(tmp_path / "a.jpg", quality=20)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.jpg")))) > 10  # JPEG has smeared it
    found, _ = read_mask(tmp_path / "a.jpg", Frame((30, 20), 1))
    assert ((np.asarray(found) > 0) != drawn).mean() < 0.02


def test_mask_values_name_what_is_anomalous(tmp_path):
    numbers = np.arange(600).reshape(20, 30) % 4
    frame = Frame((30, 20), 1)
    Image.fromarray(numbers.astype(np.uint8)).save(tmp_path / "grey.png")
    palette(numbers, [0, 0, 0, 9, 9, 9, 200, 0, 0, 255, 255, 255]).save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        found, _ = read_mask(tmp_path / name, frame, (1, 3))
        np.testing.assert_array_equal(np.asarray(found) > 0, np.isin(numbers, (1, 3)))
        inverted, _ = read_mask(tmp_path / name, frame, (0,))
        np.testing.assert_array_equal(np.asarray(inverted) > 0, numbers == 0)


def test_mask_values_of_a_lossy_mask_are_the_nearest(tmp_path, drawn):
    Image.fromarray(drawn.astype(np.uint8) * 255).save(tmp_path / "a.jpg", quality=20)
    for values, expected in (((255,), drawn), ((0,), ~drawn), ((100, 255), drawn)):
        found = np.asarray(read_mask(tmp_path / "a.jpg", Frame((30, 20), 1), values)[0]) > 0
        assert (found != expected).mean() < 0.05


@pytest.mark.parametrize("number", STORED)
def test_masks_are_in_the_frame_of_their_tool(tmp_path, drawn, number):
    """Drawn upright, or on the picture as it is stored; a square one is taken for upright."""
    image = frame(with_orientation(tmp_path / "a.jpg", np.asarray(picture("cloud", 1, 30))[:20], number))
    upright = drawn.astype(np.uint8) * 255
    Image.fromarray(upright).save(tmp_path / "upright.png")
    assert np.array_equal(read_mask(tmp_path / "upright.png", image)[0], upright)
    with_orientation(tmp_path / "tagged.png", upright, number)
    assert np.array_equal(read_mask(tmp_path / "tagged.png", image)[0], upright)
    with_orientation(tmp_path / "tagged.tif", upright, number)
    assert np.array_equal(read_mask(tmp_path / "tagged.tif", image)[0], upright)
    if number >= 5:
        stored = np.ascontiguousarray(STORED[number](upright))
        Image.fromarray(stored).save(tmp_path / "stored.png")
        assert np.array_equal(read_mask(tmp_path / "stored.png", image)[0], upright)


def test_other_sizes_are_kept_and_other_sides_stretched(tmp_path, drawn):
    image = Frame((30, 20), 1)
    large = Image.fromarray(drawn.astype(np.uint8) * 255).resize((90, 60), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    found, stretched = read_mask(tmp_path / "large.png", image)
    assert (found.size, stretched) == ((90, 60), False)
    large.crop((0, 0, 90, 40)).save(tmp_path / "other.png")
    found, stretched = read_mask(tmp_path / "other.png", image)
    assert (found.size, stretched) == ((30, 20), True)


# ---- DICOM -------------------------------------------------------------------------------------------------------


def linear(value: float, centre: float, width: float) -> float:
    """DICOM PS3.3 C.11.2.1.2.1, for an output of 0 to 255."""
    if value <= centre - 0.5 - (width - 1) / 2:
        return 0
    if value > centre - 0.5 + (width - 1) / 2:
        return 255
    return ((value - (centre - 0.5)) / (width - 1) + 0.5) * 255


def test_dicom_window_slope_and_inversion(tmp_path):
    values = np.arange(-200, 400).reshape(20, 30)
    tags = {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -100}
    expected = np.array([[linear(2 * v - 100, 40, 400) for v in row] for row in values])
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        found = np.asarray(read_rgb(dicom(tmp_path / f"{kind}.dcm", values, 16, kind, **tags)))[..., 0].astype(float)
        assert abs(found - (expected if kind == "MONOCHROME2" else 255 - expected)).max() <= 0.51


def test_dicom_without_a_window_has_the_range_of_its_bits(tmp_path, grey):
    found = np.asarray(read_rgb(dicom(tmp_path / "a.dcm", grey.astype(np.uint16) * 16)))[..., 0].astype(int)
    assert abs(found - grey).max() <= 1
    for name, rule in (("b.dcm", "bits:10"), ("c.DCM", "window:0,1023")):
        found = np.asarray(read_rgb(dicom(tmp_path / name, grey.astype(np.uint16) * 4), rule))[..., 0].astype(int)
        assert abs(found - grey).max() <= 1


@pytest.mark.parametrize("tags", [{"WindowCenter": 2048}, {"WindowCenter": None, "WindowWidth": None}])
def test_dicom_with_half_a_window_has_none(tmp_path, grey, tags):
    found = np.asarray(read_rgb(dicom(tmp_path / "a.dcm", grey.astype(np.uint16) * 16, **tags)))[..., 0].astype(int)
    assert abs(found - grey).max() <= 1


def test_dicom_of_8_bits_stays_as_it_is(tmp_path, grey):
    path = dicom(tmp_path / "a.dcm", grey, 8)
    for rule in ("auto", "bits:12"):
        np.testing.assert_array_equal(np.asarray(read_rgb(path, rule))[..., 0], grey)


def test_a_window_of_ones_own_comes_in_place_of_the_files(tmp_path, grey):
    tags = {"WindowCenter": 1000, "WindowWidth": 500}
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        path = dicom(tmp_path / f"{function}.dcm", grey.astype(np.uint16) * 16, VOILUTFunction=function, **tags)
        found = np.asarray(read_rgb(path, "window:0,4080"))[..., 0]
        np.testing.assert_array_equal(found, grey)
    curve = np.asarray(read_rgb(path))[..., 0].astype(float)  # PS3.3 C.11.2.1.3.1
    expected = 255 / (1 + np.exp(-4 * (grey.astype(float) * 16 - 1000) / 500))
    assert abs(curve - expected).max() <= 1


def test_dicom_with_a_narrow_window_keeps_its_levels(tmp_path, grey):
    tags = {"WindowCenter": 0.5, "WindowWidth": 0.8, "RescaleSlope": 1 / 4080, "RescaleIntercept": 0}
    found = np.asarray(read_rgb(dicom(tmp_path / "a.dcm", grey.astype(np.uint16) * 16, **tags)))[..., 0].astype(float)
    assert abs(found - ((grey / 255 - 0.1) / 0.8 * 255).clip(0, 255)).max() <= 1


def test_dicom_in_colour_of_12_bits(tmp_path):
    values = np.asarray(picture("cloud", 5, 24)).astype(np.uint16) * 16
    found = np.asarray(read_rgb(dicom(tmp_path / "a.dcm", values, 12, "RGB"))).astype(int)
    assert abs(found - values // 16).max() <= 1


def test_dicom_in_colour(tmp_path):
    values = np.asarray(picture("cloud", 5, 24))
    found = read_rgb(dicom(tmp_path / "a.dcm", values, 8, "RGB"))
    np.testing.assert_array_equal(np.asarray(found), values)


def test_broken_dicom_tells_nothing_of_the_patient(tmp_path, caplog, capsys):
    whole = dicom(tmp_path / "a.dcm", np.zeros((20, 30), dtype=np.uint16)).read_bytes()
    (tmp_path / "a.dcm").write_bytes(whole[:-300])
    (tmp_path / "b.dcm").write_bytes(b"not DICOM, Doe^Jane")
    for name in ("a.dcm", "b.dcm"):
        with pytest.raises(ValueError, match="DICOM that cannot be decoded") as refusal:
            read_rgb(tmp_path / name)
        assert refusal.value.__cause__ is None
        assert "Doe" not in f"{refusal.value}{caplog.text}{capsys.readouterr()}"


# ---- size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_large_images_have_an_option(tmp_path, monkeypatch, name):
    Image.new("L", (400, 300)).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(Image.DecompressionBombError):
        read_rgb(tmp_path / name)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: read_rgb(tmp_path / name, max_megapixels=0.2).size, range(20)))
    assert found == [(400, 300)] * 20
    assert Image.MAX_IMAGE_PIXELS == 50_000
    assert read_mask(tmp_path / name, Frame((400, 300), 1), max_megapixels=0.2)[0].size == (400, 300)
    with pytest.raises(ValueError, match=r"400 x 300 pixels are more than max_megapixels=0\.1"):
        read_rgb(tmp_path / name, max_megapixels=0.1)
    assert Image.MAX_IMAGE_PIXELS == 50_000


# ---- real pictures -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_pictures_in_other_files(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cats_vs_dogs"], check=True)
    for path in sorted((tmp_path / "cats_vs_dogs/PetImages").rglob("*.jpg"))[::250]:
        plain = np.asarray(Image.open(path).convert("L"))
        for kind in ("16", "12", "10", "int32", "float", "dicom", "monochrome1"):
            rule = reencode(path, tmp_path / kind / path.name, kind)
            (file,) = (tmp_path / kind).glob(f"{path.stem}.*")
            found = np.asarray(read_rgb(file, rule))[..., 0].astype(int)
            assert abs(found - plain).max() <= ("dicom" in kind or kind == "monochrome1"), kind
            file.unlink()
        for kind in ("colour", "turned"):
            reencode(path, tmp_path / kind / path.name, kind)
        upright, turned = (np.asarray(read_rgb(tmp_path / kind / path.name)) for kind in ("colour", "turned"))
        assert abs(upright.astype(int) - turned).mean() < 3

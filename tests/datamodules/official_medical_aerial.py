"""DIOR and Hyper-Kvasir in their official layouts, made for the tests."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Box = tuple[str, tuple[int, int, int, int]]
"""Class name as written and xmin, ymin, xmax, ymax."""


def _noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8))


def make_dior(
    root: Path,
    train: Mapping[str, Iterable[Box]],
    test: Mapping[str, Iterable[Box]],
    main: str = "Main",
    doubled: bool = False,
    size: tuple[int, int] = (80, 60),
) -> None:
    """Write images of noise with these boxes: annotations of both splits together, id lists, two image folders."""
    again = (lambda name: f"{name}/{name}") if doubled else str
    boxes = root / (again("Annotations")) / "Horizontal Bounding Boxes"
    lists = root / main
    for folder in (boxes, lists):
        folder.mkdir(parents=True)
    for split, annotations in (("trainval", train), ("test", test)):
        images = root / again(f"JPEGImages-{split}")
        images.mkdir(parents=True)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in annotations))
        for name, objects in annotations.items():
            _noise(int(name), size).save(images / f"{name}.jpg")
            (boxes / f"{name}.xml").write_text(voc(objects))


def voc(objects: Iterable[Box]) -> str:
    """The text of an annotation."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    items = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation><size><width>800</width></size>{items}</annotation>"


LABELED: dict[str, tuple[str, str, str]] = {
    "cecum": ("lower-gi-tract", "anatomical-landmarks", "cecum"),
    "ileum": ("lower-gi-tract", "anatomical-landmarks", "ileum"),
    "bbps-2-3": ("lower-gi-tract", "quality-of-mucosal-views", "bbps-2-3"),
    "polyps": ("lower-gi-tract", "pathological-findings", "polyps"),
    "pylorus": ("upper-gi-tract", "anatomical-landmarks", "pylorus"),
}


def make_labeled(root: Path, counts: Mapping[str, int], flat: bool = False, size: tuple[int, int] = (24, 20)) -> None:
    """Write labeled images, each class in its folder or all in one."""
    for class_name, count in counts.items():
        folder = root / "labeled-images"
        if not flat:
            folder = folder.joinpath(*LABELED[class_name])
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            _noise(number, size).save(folder / f"{class_name}_{number:03d}.jpg")


def make_segmented(root: Path, count: int = 3, size: tuple[int, int] = (24, 20)) -> None:
    """Write polyps with masks, the left half of each being polyp, as JPEG."""
    for name in ("images", "masks"):
        (root / "segmented-images" / name).mkdir(parents=True)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:, : size[0] // 2] = 255
    for number in range(count):
        _noise(number, size).save(root / f"segmented-images/images/polyp{number}.jpg")
        Image.fromarray(mask).save(root / f"segmented-images/masks/polyp{number}.jpg", quality=50)

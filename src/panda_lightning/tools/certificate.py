"""Whether a file that was written scores pictures as the detector that it was made from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from panda_lightning.formulas.conformal import flagged, p_values
from panda_lightning.types import PandaError

Array = npt.NDArray[Any]
Run = Callable[[Array], dict[str, Array]]


@dataclass
class Certificate:
    """What was compared, and the largest differences.

    Attributes:
        source: The pictures.
        tolerance: A score may differ from the detector's by this times the larger of that one's size and ``unit``.
        runtime: What ran the file.
        stored: What was found in it bit for bit.
        images: How many pictures were compared.
        unit: The median score of normal images, or, where none is known, of these.
        largest: Largest difference of scores, as a share of the same.
        largest_map: That of maps, likewise, ``unit`` being the median of the largest value of each.
        reordered: Pairs of pictures whose scores have another order; all are ties within the tolerance.
        redecided: Pictures with another decision; all are within the tolerance of the threshold.
    """

    source: str
    tolerance: float
    runtime: str = ""
    stored: tuple[str, ...] = ()
    images: int = 0
    unit: float = 0.0
    largest: float = 0.0
    largest_map: float | None = None
    reordered: int = 0
    redecided: int = 0

    def words(self) -> str:
        """For people."""
        maps = "" if self.largest_map is None else f", of maps {self.largest_map:.1e}"
        stored = f"; {' and '.join(self.stored)} stored bit for bit" if self.stored else ""
        return (
            f"{self.images} pictures ({self.source}) agree in {self.runtime}: largest relative difference of "
            f"scores {self.largest:.1e}{maps} (tolerance {self.tolerance:g}), pairs ranked differently "
            f"{self.reordered}, different decisions {self.redecided}{stored}"
        )


def require_stored(path: Path, held: dict[str, Tensor]) -> tuple[str, ...]:
    """Find what no picture may touch, rows of a bank and scores of a calibration, in a file bit for bit.

    Raises:
        PandaError: If it is not there.
    """
    if path.suffix == ".pt2":
        program = torch.export.load(path)
        tensors = (*program.state_dict.values(), *program.constants.values())
        there = [t.detach().numpy() for t in tensors if isinstance(t, Tensor)]
    else:
        import onnx

        there = [onnx.numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer]
    for name, tensor in held.items():
        wanted = tensor.numpy()
        alike = [found for found in there if found.dtype == wanted.dtype and found.size == wanted.size]
        if not any(np.array_equal(f.ravel(), w.ravel()) for f in alike for w in (wanted, wanted.T)):
            raise PandaError(f"its {name} is not that of the detector")
    return tuple(held)


def in_onnxruntime(path: Path) -> tuple[Run, str]:
    """What a file makes of pictures of one size, (B, 3, H, W) uint8: its outputs by name; and what runs it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Array) -> dict[str, Array]:
        return dict(zip(names, session.run(None, {"images": images}), strict=True))

    return run, f"onnxruntime {onnxruntime.__version__}"


def in_torch(path: Path, names: list[str]) -> tuple[Run, str]:
    """The same for a program of torch.export."""
    program: Any = torch.export.load(path).module()

    def run(images: Array) -> dict[str, Array]:
        with torch.no_grad():
            found = program(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}

    return run, f"torch {torch.__version__}"


def scored(run: Run, pictures: Sequence[Array]) -> dict[str, Array]:
    """What a file makes of pictures (H, W, 3), in their order; those of one size are scored together."""
    shapes = [picture.shape for picture in pictures]
    rows, parts = [], []
    for shape in dict.fromkeys(shapes):
        places = [i for i, other in enumerate(shapes) if other == shape]
        rows += places
        parts.append(run(np.stack([pictures[i].transpose(2, 0, 1) for i in places])))
    order = np.argsort(rows)
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def compare(
    certificate: Certificate,
    reference: dict[str, Array],
    found: dict[str, Array],
    calibration: Array | None,
    level: float | None,
    normal: Array | None = None,
) -> None:
    """Fill in a certificate.

    Args:
        certificate: With its tolerance.
        reference: The detector's scores by name, (N,) each.
        found: The file's, with p_value and anomalous where there is a calibration.
        calibration: Scores of normal images.
        level: Of the decision.
        normal: Scores of normal images where there is no calibration.

    Raises:
        PandaError: If anything differs beyond the tolerance.
    """
    certificate.images = len(reference["score"])
    known = (calibration, normal, reference["score"])
    certificate.unit = next((m for m in (float(np.median(np.abs(k))) for k in known if k is not None) if m), 1.0)
    for name, one in reference.items():
        other, unit = found[name].astype(np.float64), certificate.unit if name == "score" else 1.0
        scale = np.maximum(np.abs(one), unit)
        gaps = np.abs(one - other) / np.maximum(scale, np.finfo(np.float64).tiny)
        worst = int(np.argmax(np.where(np.isnan(gaps), np.inf, gaps)))
        if not gaps[worst] <= certificate.tolerance:
            raise PandaError(
                f"{name} of picture {worst} is {other[worst]:.7g} in the file and {one[worst]:.7g} in the "
                f"detector, a relative difference of {gaps[worst]:.1e}, but only {certificate.tolerance:g} is "
                "allowed"
            )
        certificate.largest = max(certificate.largest, float(gaps[worst]))
        certificate.reordered += sum(_reordered(one, other))
    if calibration is None:
        return
    one = reference["score"]
    slack = certificate.tolerance * np.maximum(np.abs(one), certificate.unit)
    least, most = (p_values(calibration, one + sign * slack) for sign in (1, -1))
    wrong = ~((found["p_value"] >= least - 1e-12) & (found["p_value"] <= most + 1e-12))
    if wrong.any():
        worst = int(np.argmax(wrong))
        raise PandaError(
            f"the p-value of picture {worst} is {found['p_value'][worst]:.4g} in the file, but the detector's "
            f"score allows {least[worst]:.4g} to {most[worst]:.4g}"
        )
    if level is not None:
        if (wrong := found["anomalous"] != flagged(found["p_value"], level)).any():
            raise PandaError(f"the decision on picture {int(np.argmax(wrong))} does not match its p-value")
        certificate.redecided = int((found["anomalous"] != flagged(p_values(calibration, one), level)).sum())


def compare_maps(certificate: Certificate, largest: Array, gaps: Array) -> None:
    """The same for maps, of which the detector's largest values (N,) and the largest differences (N,) are known."""
    scale = np.maximum(largest, np.median(largest))
    certificate.largest_map = float(np.max(gaps / np.maximum(scale, np.finfo(np.float64).tiny)))
    if not certificate.largest_map <= certificate.tolerance:
        raise PandaError(
            f"maps differ by up to {certificate.largest_map:.1e} of their largest value, but only "
            f"{certificate.tolerance:g} is allowed"
        )


def _reordered(one: Array, other: Array) -> Iterator[int]:
    for i in range(len(one)):
        yield int((np.sign(one[i] - one[i + 1 :]) * np.sign(other[i] - other[i + 1 :]) < 0).sum())


def generated() -> list[Array]:
    """Pictures to compare with where nobody has any: noise, plain ones, textures, and scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    sides = [(64, 64), (48, 97), (300, 90), (33, 250), (256, 256), (224, 224)]
    found: list[Array] = [draw.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    found += [np.full((*side, 3), value, dtype=np.uint8) for side, value in zip(sides, range(0, 256, 51), strict=True)]
    for height, width in sides:
        y, x = np.mgrid[:height, :width]
        waves = (np.sin(x / 3) * np.cos(y / 7), np.sin((x + y) / 11), (x // 8 + y // 8) % 2)
        found.append(np.stack([127 * (wave / 2 + 0.5) for wave in waves], axis=2).astype(np.uint8))
    for photograph in load_sample_images().images:
        found += [photograph, photograph[:, ::-1], photograph[::2, ::2], photograph[:400, 100:220]]
        found += [photograph[y : y + 128, x : x + 160] for y in (0, 150, 290) for x in (0, 240, 480)]
    return [np.ascontiguousarray(picture) for picture in found]

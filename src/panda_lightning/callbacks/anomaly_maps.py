"""Anomaly maps to look at: those that err most, as maps.png and in W&B."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pytorch_lightning.loggers import WandbLogger
from rich import get_console
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks.media import alike
from panda_lightning.callbacks.report import headline
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch, Scores


class AnomalyMaps(pl.Callback):
    """Draws the anomalous images that stand out least and the normal ones that stand out most, as maps.png.

    Anomalous images are ordered by the mean of their map within the mask, or without masks by their score. One is
    called missed where normal images score higher, and a normal one a false alarm where anomalous images score lower.
    Only one number an image is kept: the maps drawn are computed again.
    """

    ROWS = 8  # of each kind

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._parts = []

    on_test_epoch_start = on_validation_epoch_start

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seen = outputs["score"]
        if "mask" in batch:
            area = batch["mask"].sum(dim=(1, 2))
            inside = (outputs["map"] * batch["mask"]).sum(dim=(1, 2)) / area.clamp(min=1)
            seen = torch.where(area > 0, inside, seen)
        self._parts.append((batch["index"], seen, batch["label"]))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer, pl_module, trainer.val_dataloaders)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer, pl_module, trainer.test_dataloaders)

    def _finish(self, trainer: pl.Trainer, detector: Any, loader: Any) -> None:
        index, seen, label = (column.cpu() for column in gather(self._parts))
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if not trainer.is_global_zero or trainer.sanity_checking or not len(index):
            return
        order = seen.argsort(stable=True)
        chosen = [*order[label[order] == 1][: self.ROWS], *order[label[order] == 0].flip(0)[: self.ROWS]]
        names = detector.data.names(loader.dataset.images)
        rows, drawn = index[torch.stack(chosen)], {}
        for some, batch in loader.dataset.batches(rows):
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                found = detector.predict_step(trainer.strategy.batch_to_device(batch), 0)
            anomalous = [bool(label) for label in batch["label"]]
            for i, (row, score) in enumerate(zip(some.tolist(), found["score"].tolist(), strict=True)):
                drawn[row] = Panel(
                    f"{'/'.join(names[row].split('/')[-2:])}\n{verdict(score, anomalous[i], detector.scores)}",
                    anomalous[i],
                    batch["image"][i].permute(1, 2, 0).numpy(),
                    found["map"][i].cpu().numpy(),
                    batch["mask"][i].numpy() if "mask" in batch else None,
                )
        panels = [drawn[row] for row in rows.tolist()]
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / "maps.png", panels, detector.value_range, detector.threshold, headline(detector))
        log(trainer, panels, detector)
        console = get_console()
        console.print(f"Anomaly maps: {folder / 'maps.png'}", soft_wrap=True)
        if (m := detector.pixel_metrics) is not None:
            console.print(
                f"Pixels: AUROC {m.auroc:.4f} (exact to {m.auroc_error:.0e}), PRO {m.pro:.4f} (to "
                f"{detector.pixels.LIMIT:g} false positives), AP {m.ap:.4f}, best F1 {m.f1:.4f} (oracle); at "
                f"{'the size of each image' if detector.map_size == 'original' else loader.dataset.view.pixels}, sigma "
                f"{detector.sigma:g}",
                soft_wrap=True,
            )


@dataclass(frozen=True)
class Panel:
    """What is shown of one image: its name, whether it is anomalous, (H, W, 3) uint8, its map and mask (H, W)."""

    title: str
    anomalous: bool
    image: npt.NDArray[np.uint8]
    map: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_] | None


def verdict(score: float, anomalous: bool, scores: Scores) -> str:
    """An image's score, and how many images of the other kind it is confused with."""
    others = scores.score[scores.label == (0 if anomalous else 1)]
    wrong = int((others > score).sum() if anomalous else (others < score).sum())
    if not wrong:
        return f"score {score:.4g}"
    kind, other, where = ("missed", "normal", "higher") if anomalous else ("false alarm", "anomalous", "lower")
    return f"score {score:.4g}, {kind}: {wrong} of {len(others)} {other} images score {where}"


def draw(
    path: Path, panels: list[Panel], value_range: tuple[float, float], threshold: float | None, title: str = ""
) -> None:
    """Draw anomalous images on the left and normal ones on the right: image, map, outlines of mask and threshold.

    Args:
        path: The picture's file.
        panels: Worst first.
        value_range: Least and largest value of all maps, the ends of the colours.
        threshold: Where the second outline is drawn; None for none.
        title: What all of it is of.
    """
    side, gap, line, top = 208, 6, 15, 80
    parts = [[p for p in panels if p.anomalous == anomalous] for anomalous in (True, False)]
    cells = [ImageOps.contain(Image.fromarray(panel.image), (side, side)).size for panel in panels] or [(side, side)]
    across, down = (max(sides) for sides in zip(*cells, strict=True))  # strips leave no room for squares
    wide, high = 3 * (across + gap) + 2 * gap, down + 2 * line + gap
    picture = Image.new("RGB", (2 * wide, top + max(map(len, parts)) * high), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    pen.text((gap, gap), title, "black", ImageFont.load_default(15))
    notes = f"image | map from {value_range[0]:.4g} (black) to {value_range[1]:.4g} (yellow) | outlines"
    masked = any(p.mask is not None for p in panels)
    notes += " - green: mask" * masked
    notes += f" - red: map at {threshold:.4g}, best F1 of pixels (oracle)" if threshold is not None else ""
    pen.text((gap, gap + 22), notes, "black", font)
    heads = (
        f"Anomalous images, lowest {'map within the mask' if masked else 'score'} first",
        "Normal images, highest score first",
    )
    for i, (part, head) in enumerate(zip(parts, heads, strict=True)):
        pen.text((gap + i * wide, gap + 3 * line), head, "black", ImageFont.load_default(15))
        for j, panel in enumerate(part):
            outlined = panel.image
            if panel.mask is not None:
                outlined = outline(outlined, panel.mask, (0, 255, 0))
            if threshold is not None:
                outlined = outline(outlined, panel.map >= threshold, (255, 0, 0))
            pen.text((gap + i * wide, top + j * high), panel.title, "black", font)
            for n, shown in enumerate((panel.image, coloured(panel.map, value_range), outlined)):
                cell = ImageOps.contain(Image.fromarray(shown), (side, side))
                picture.paste(cell, (gap + i * wide + n * (across + gap), top + j * high + 2 * line))
    with new_file(path) as new:
        picture.save(new, format="png")


def coloured(
    values: npt.NDArray[np.float32], value_range: tuple[float, float], image: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Colours (H, W, 3) of a map (H, W), black to yellow over the range; over an image, half and half.

    Where the map is NaN there is no colour: the image stays as it is.
    """
    from matplotlib import colormaps

    low, high = value_range
    colours = colormaps["inferno"]((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]
    if image is None:
        return np.asarray(colours)
    return np.where(np.isnan(values)[..., None], image, colours // 2 + image // 2)


def outline(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], colour: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """Draw the edge of a mask (H, W) on an image (H, W, 3), one part in 200 of its side wide."""
    from scipy.ndimage import binary_erosion

    width = -(-len(mask) // 200)
    edge = mask & ~binary_erosion(mask, iterations=width, border_value=1)
    return np.where(edge[..., None], np.array(colour, dtype=np.uint8), image)


def log(trainer: pl.Trainer, panels: list[Panel], detector: Any) -> None:
    """Log images with their masks, true and found, to W&B."""
    for run in (logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)):
        import wandb

        labels = {0: "normal", 1: "anomalous"}
        images, sized = [], alike([panel.image for panel in panels])
        for panel, image in zip(panels, sized, strict=True):
            masks = {} if panel.mask is None else {"ground_truth": panel.mask}
            masks |= {} if detector.threshold is None else {"found": panel.map >= detector.threshold}
            masks = {kind: alike([mask, image[..., 0]])[0] for kind, mask in masks.items()}
            images.append(
                wandb.Image(
                    image,
                    caption=panel.title,
                    masks={k: {"mask_data": m.astype(np.uint8), "class_labels": labels} for k, m in masks.items()},
                )
            )
        run.log({"images/maps": images, "epochs_trained": detector.epochs_trained})

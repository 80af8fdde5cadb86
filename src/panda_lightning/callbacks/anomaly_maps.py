"""Anomaly maps to look at: those that err most, as maps.png and in W&B."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from rich import get_console
from torch import Tensor
from typing_extensions import override

from panda_lightning.features import gather
from panda_lightning.types import Batch


class AnomalyMaps(pl.Callback):
    """Draws the worst misses and the worst false alarms of a validation or test, worst first.

    A miss is an anomalous image whose map is low within the mask (mean), or without masks one whose score is low; a
    false alarm is a normal image whose score is high. Only one number an image is kept: the maps drawn are computed
    again.
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
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        order = seen.argsort(stable=True)
        chosen = [*order[label[order] == 1][: self.ROWS], *order[label[order] == 0].flip(0)[: self.ROWS]]
        rows = index[torch.stack(chosen)].tolist()
        batch = loader.dataset.__getitems__(rows)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            found = detector.predict_step(trainer.strategy.batch_to_device(batch), 0)
        names = detector.data.names(loader.dataset.images)
        panels = [
            Panel(
                f"{'/'.join(names[row].split('/')[-2:])}\nscore {score:.4g}",
                bool(batch["label"][i]),
                batch["image"][i].permute(1, 2, 0).numpy(),
                found["map"][i].cpu().numpy(),
                batch["mask"][i].numpy() if "mask" in batch else None,
            )
            for i, (row, score) in enumerate(zip(rows, found["score"].tolist(), strict=True))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / "maps.png", panels, detector.value_range, detector.threshold)
        log(trainer, panels, detector)
        console = get_console()
        console.print(f"Anomaly maps: {folder / 'maps.png'}", soft_wrap=True)
        if (m := detector.pixel_metrics) is not None:
            console.print(
                f"Pixels: AUROC {m.auroc:.4f} (exact to {m.auroc_error:.0e}), PRO {m.pro:.4f} (to "
                f"{detector.pixels.LIMIT:g} false positives), AP {m.ap:.4f}, best F1 {m.f1:.4f} (oracle); at "
                f"{found['map'].shape[-1]} px, sigma {detector.sigma:g}",
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


def draw(path: Path, panels: list[Panel], value_range: tuple[float, float], threshold: float | None) -> None:
    """Draw misses on the left and false alarms on the right: image, map, outlines of mask and of the map's threshold.

    Args:
        path: The picture's file.
        panels: Worst first.
        value_range: Least and largest value of all maps, the ends of the colours.
        threshold: Where the second outline is drawn; None for none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = [[p for p in panels if p.anomalous == anomalous] for anomalous in (True, False)]
    rows = max(map(len, sides))
    figure = Figure(figsize=(13, 2.2 * rows + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, 6, squeeze=False)
    for cell in grid.flat:
        cell.set_axis_off()
    heads = ("Misses: lowest map within the mask first", "False alarms: highest score first")
    for columns, side, head in zip((grid[:, :3], grid[:, 3:]), sides, heads, strict=True):
        columns[0, 1].set_title(head, fontsize=10)
        for (first, second, third), panel in zip(columns, side, strict=False):
            first.imshow(panel.image)
            first.set_title(panel.title, fontsize=7, loc="left")
            colours = second.imshow(panel.map, cmap="inferno", vmin=value_range[0], vmax=value_range[1])
            third.imshow(panel.image)
            if panel.mask is not None and panel.mask.any():
                third.contour(panel.mask, levels=[0.5], colors=["lime"], linewidths=1.2)
            if threshold is not None and panel.map.min() < threshold <= panel.map.max():
                third.contour(panel.map, levels=[threshold], colors=["red"], linewidths=1.0)
    figure.colorbar(colours, ax=grid[-1].tolist(), location="bottom", shrink=0.4, aspect=50, pad=0.03, label="map")
    notes = ["green: mask"] if any(p.mask is not None for p in panels) else []
    notes += ["red: map at the threshold of best F1 (oracle)"] if threshold is not None else []
    figure.suptitle("; ".join(["image, map, outlines", *notes]), fontsize=9)
    figure.savefig(path, dpi=80)


def log(trainer: pl.Trainer, panels: list[Panel], detector: Any) -> None:
    """Log images with their masks, true and found, to W&B."""
    for run in (logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)):
        import wandb

        labels = {0: "normal", 1: "anomalous"}
        images = []
        for panel in panels:
            masks = {} if panel.mask is None else {"ground_truth": panel.mask}
            masks |= {} if detector.threshold is None else {"found": panel.map >= detector.threshold}
            images.append(
                wandb.Image(
                    panel.image,
                    caption=panel.title,
                    masks={k: {"mask_data": m.astype(np.uint8), "class_labels": labels} for k, m in masks.items()},
                )
            )
        run.log({"images/maps": images, "epochs_trained": detector.epochs_trained})

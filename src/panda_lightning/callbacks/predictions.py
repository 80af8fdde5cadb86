"""What ``lightning predict`` leaves behind: a table of scores, and anomaly maps."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks.anomaly_maps import coloured, outline
from panda_lightning.runtime.features import gather
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch


class Predictions(pl.Callback):
    """Writes ``predictions.csv`` (file and scores, a line an image, in the data set's order) to the run's folder.

    From a detector with maps, ``maps/<file>.npy`` holds the map, (H, W) float32, and ``maps/<file>.png`` the image
    under its colours, which span the maps of the test that saved the checkpoint; the outline is its threshold of best
    F1 (oracle). <file> has its ending (``maps/cam.png.npy``), since ``cam.jpg`` may lie beside ``cam.png``.
    """

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._parts: list[tuple[Tensor, ...]] = []
        self._kinds: list[str] = []
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._kinds = [kind for kind in outputs if kind.endswith("score")]
        self._parts.append((outputs["index"], *(outputs[kind] for kind in self._kinds)))
        if "map" in outputs:
            dataset: Any = trainer.predict_dataloaders.dataset  # type: ignore[union-attr]
            names = pl_module.data.names(dataset.images)
            images = batch["image"].permute(0, 2, 3, 1).cpu().numpy()
            for row, image, values in zip(batch["index"].tolist(), images, outputs["map"].cpu().numpy(), strict=True):
                path = self._folder / "maps" / names[row]
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(f"{path}.npy", values)
                shown = coloured(values, pl_module.value_range or (values.min(), values.max()), image)
                if pl_module.threshold is not None:
                    shown = outline(shown, values >= pl_module.threshold, (255, 255, 255))
                Image.fromarray(shown).save(f"{path}.png")

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        index, *scores = gather(self._parts)
        if not trainer.is_global_zero:
            return
        dataset: Any = trainer.predict_dataloaders.dataset  # type: ignore[union-attr]
        names = pl_module.data.names(dataset.images)
        with new_file(self._folder / "predictions.csv") as part, part.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(("file", *self._kinds))
            lines.writerows(zip((names[i] for i in index.tolist()), *(s.tolist() for s in scores), strict=True))
        rank_zero_info(f"Scores{' and maps' if (self._folder / 'maps').is_dir() else ''} written to {self._folder}")

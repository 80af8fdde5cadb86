"""Images that nobody has labelled, for ``lightning predict``."""

import os
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Checked, Count, Number, Positive
from panda_lightning.callbacks import Predictions
from panda_lightning.datamodules.loaders import ShardedSampler, to_gpu
from panda_lightning.pictures.images import as_is
from panda_lightning.pictures.loose import Loose, LooseDataset, pointed_at
from panda_lightning.pictures.view import View
from panda_lightning.types import Batch, PandaError


class UnlabelledImages(Checked, pl.LightningDataModule):
    """Unlabelled images to score with a detector from a checkpoint; the checkpoint defines how to resize them.

    Images are read only when they are scored, so any number fits in memory; an unreadable image gets a row with the
    reason. An interrupted run can continue: see Predictions. The detector and its bank are not changed.

    Args:
        images: A folder (with its subfolders), a file, a pattern (``photos/2026-*/*.jpg``), or a text file with one
            path per line; see pictures.loose.pointed_at.
        eval_batch_size: Images per step, on each process.
        num_workers: Processes that read images; None is the number of processors, at most 8.
        max_megapixels: See AnomalyDataModule.
    """

    def __init__(
        self,
        images: str,
        eval_batch_size: Count = 128,
        num_workers: Number | None = None,
        max_megapixels: Positive | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.images = images
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.max_megapixels = max_megapixels

    @override
    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise PandaError(f"unlabelled images cannot be used for {stage}: score them with `lightning predict`.")
        self._found = pointed_at(self.images)

    def names(self, images: Loose) -> list[str]:
        """What images are called."""
        return images.names

    @property
    def view(self) -> View:
        """How images are resized: as the detector's were."""
        detector: Any = self.trainer.lightning_module  # type: ignore[union-attr]  # Lightning has set the trainer
        return View.of(detector.origin["view"], self.max_megapixels)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        trainer: Any = self.trainer
        detector: Any = trainer.lightning_module
        detector.require_learned()
        table = next(c for c in trainer.callbacks if isinstance(c, Predictions))
        left = table.left(trainer, detector, self._found)
        done = len(self._found) - len(left)
        rank_zero_info(f"{len(left)} images to score" + (f"; {done} were scored before" if done else ""))
        workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        dataset = LooseDataset(self._found, self.view, threads=not workers, rows=left)
        batch = self.eval_batch_size
        return DataLoader(
            dataset,
            batch_size=batch,
            sampler=ShardedSampler(
                len(left), trainer.world_size, trainer.global_rank, shuffle=False, kinds=dataset.kinds, batch=batch
            ),
            collate_fn=as_is,
            num_workers=workers,
            pin_memory=to_gpu(trainer),
        )

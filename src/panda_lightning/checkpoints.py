"""Checkpoint files: written whole or not at all, in one pass."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from typing_extensions import override


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a killed run leaves the old checkpoint or the new one.

    Lightning does the same by way of a copy in memory, which takes three to six times as long
    (experiments/RESULTS.md), and is still used for addresses of remote storage.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # half of the time, and torch.load does not look at it
        try:
            torch.save(checkpoint, part)
            part.replace(path)
        finally:
            torch.serialization.set_crc32_options(crc)
            part.unlink(missing_ok=True)

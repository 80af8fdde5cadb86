"""What detectors share that say where an image is anomalous: pyramids of features, maps, and their metrics."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from typing_extensions import override

from panda_lightning.arguments import Bounds
from panda_lightning.callbacks import AnomalyMaps
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.formulas.pixel_metrics import PixelHistogram, PixelMetrics
from panda_lightning.networks.backbones import Optimize
from panda_lightning.networks.pyramid import level_pieces, pyramid
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract
from panda_lightning.runtime.processes import of_each, world_size
from panda_lightning.search.knn import Backend, KNNIndex, full_float32
from panda_lightning.types import Batch, PandaError

Level = Annotated[int, Bounds(1, 4)]


class SegmentationDetector(PretrainedDetector):
    """Scores every pixel by comparing its patch of a pretrained network's feature maps with those of normal images.

    A method overrides ``embed``, ``make_bank``, ``fit_index`` and ``score_and_map``. Nothing is trained: ``lightning
    test`` builds the bank, scores the test images and saves ``last.ckpt``. Maps have the size of the resized images,
    and so have the masks that they are held against.

    Args:
        backbone: See DN2; a checkpoint of PANDA gives its adapted network.
        weights: See DN2.
        levels: Levels of the network's feature pyramid, 1 to 4: layer1 to layer4 of a ResNet.
        sigma: Of the Gaussian that smooths maps, in pixels; 0 leaves them as they are.
        tile: Cut images into squares of so many pixels, which pass the network one by one: for high resolutions.
        half_bank: Keep the bank in float16.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.

    Attributes:
        pixels: Counts of the pixels of the validation or test that runs, on this process.
        pixel_metrics: Those of the last whole one, equal on every process; None without masks.
        threshold: Where pixels had the best F1 in the last validation or test (oracle).
        value_range: Least and largest value of the maps there.
    """

    bank = Derived[Tensor | None](None)
    threshold = Derived[float | None](None)
    value_range = Derived[tuple[float, float] | None](None)

    def __init__(
        self,
        backbone: str,
        weights: str | None,
        levels: tuple[int, ...],
        sigma: float,
        tile: int | None,
        half_bank: bool,
        optimize: Optimize,
        index_backend: Backend,
        index_memory_mb: int,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.save_hyperparameters()
        self.index = KNNIndex(index_backend, index_memory_mb)
        self.levels = levels
        self.sigma = sigma
        self.tile = tile
        self.half_bank = half_bank
        self.pixels = PixelHistogram()
        self.pixel_metrics: PixelMetrics | None = None

    @abstractmethod
    def score_and_map(self, batch: Batch) -> dict[str, Tensor]:
        """See Detector.explained; map is not smoothed yet."""

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        return self.score_and_map(batch)["score"]

    @override
    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        found = self.score_and_map(batch)
        return {**found, "map": self._smoothed(found["map"])}

    @override
    def explained(self, batch: Batch) -> dict[str, Tensor]:
        return self.outputs(batch)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        found = super().validation_step(batch, batch_idx)
        if len(shown := found["map"][batch["index"] >= 0]):
            low, high = (float(value) for value in shown.aminmax())
            least, largest = self.value_range or (low, high)
            self.value_range = (min(low, least), max(high, largest))
        if "mask" in batch:
            known = batch["has_mask"]
            self.pixels.add(found["map"][known], batch["mask"][known])
        return found

    test_step = validation_step

    def _smoothed(self, maps: Tensor) -> Tensor:
        if not self.sigma:
            return maps
        radius = min(round(4 * self.sigma), maps.shape[1] - 1, maps.shape[2] - 1)
        with full_float32(maps.device):  # in half precision a map would hold some 200 values
            smooth: Tensor = gaussian_blur(maps.unsqueeze(1), [2 * radius + 1] * 2, [self.sigma] * 2)
        return smooth[:, 0]

    # ---- features ----------------------------------------------------------------------------------------------------

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        level_pieces(self.backbone, self.levels)  # what the network lacks is said before images are decoded
        size, tile = data.view.size, self.tile or data.view.size
        if size % tile:
            raise PandaError(f"tile={tile} does not suit image_size={size}: choose a divisor.")
        self.backbone.require_side("tile", tile)

    def pyramid(self, images: Tensor, pooled: bool = False) -> list[Tensor]:
        """Float32 feature maps (B, C, h, w) of images (B, 3, S, S), one a level; with ``pooled``, then (B, D)."""
        tile = self.tile or images.shape[-1]
        n = images.shape[-1] // tile
        tiles = images.view(-1, 3, n, tile, n, tile).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, tile, tile)
        found = [f.float() for f in pyramid(self.backbone, tiles, self.levels, pooled)]
        maps, rest = found[: len(self.levels)], found[len(self.levels) :]
        return [*(_stitched(m, n) for m in maps), *(p.view(-1, n * n, p.shape[1]).mean(dim=1) for p in rest)]

    def normal_rows(self) -> Tensor:
        """What ``embed`` makes of the normal training images, (N, ...); says beforehand what memory it takes."""
        count, side = len(self.data.normal_images), self.data.view.size
        one = self.embed({"image": torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)})  # type: ignore[typeddict-item]
        dtype = torch.float16 if self.half_bank else torch.float32
        rank_zero_info(
            f"{self.method}: features of {count} normal images take {count * one.numel() * dtype.itemsize / 2**30:.2f} "
            f"GiB, twice that while they are put together; maps {4 * side**2 / 2**20:.2f} MiB an image of a batch."
        )
        loader = self.data.normal_dataloader()
        return extract(self.trainer, self.embed, loader, "Normal features", dtype=dtype)

    @override
    def trace_search(self, index: Any, keep: Callable[[Tensor], Tensor]) -> None:
        assert self.bank is not None
        self.index, self.bank = index, keep(self.bank)
        self.fit_index()

    # ---- metrics -----------------------------------------------------------------------------------------------------

    @override
    def configure_callbacks(self) -> Any:
        return [*super().configure_callbacks(), AnomalyMaps()]

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.pixels, self.value_range = PixelHistogram(), None

    on_test_epoch_start = on_validation_epoch_start

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_pixels("val")

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_pixels("test")

    def _log_pixels(self, stage: str) -> None:
        if world_size() > 1:
            self.pixels.counts = self.trainer.strategy.reduce(self.pixels.counts.to(self.device), reduce_op="sum").cpu()
            low, high = of_each(torch.tensor(self.value_range or (torch.inf, -torch.inf), device=self.device)).T
            self.value_range = (float(low.min()), float(high.max()))
        found = self.pixel_metrics = self.pixels.metrics()
        if found is not None:
            self.threshold = found.threshold
            values = {"pixel_auroc": found.auroc, "pro": found.pro, "pixel_ap": found.ap, "pixel_f1_oracle": found.f1}
            self.log_dict({f"{stage}/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()})


def _stitched(maps: Tensor, n: int) -> Tensor:
    """Maps (B n n, C, h, w) of tiles as maps of whole images (B, C, n h, n w)."""
    _, channels, height, width = maps.shape
    rows = maps.view(-1, n, n, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, channels, n * height, n * width)

"""What detectors share that say where an image is anomalous: pyramids of features, maps, and their metrics."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.arguments import Bounds
from panda_lightning.callbacks import AnomalyMaps
from panda_lightning.detectors.checks import require_finite
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.formulas.pixel_metrics import PixelHistogram, PixelMetrics
from panda_lightning.networks.backbones import portions
from panda_lightning.networks.folding import Optimize
from panda_lightning.networks.pyramid import level_strides, pyramid
from panda_lightning.networks.tiles import blended, cut, places, require_tiles
from panda_lightning.pictures.view import MapSize
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract
from panda_lightning.runtime.float32 import full_float32
from panda_lightning.runtime.processes import of_each, sum_of_all, world_size
from panda_lightning.runtime.sizes import in_words
from panda_lightning.search.knn import Backend, KNNIndex
from panda_lightning.types import Batch, PandaError

Level = Annotated[int, Bounds(1, 4)]
TILES = 16  # that pass the network together: as many as a CPU's caches hold, whose activations any GPU holds


class SegmentationDetector(PretrainedDetector):
    """Scores every pixel by comparing its patch of a pretrained network's feature maps with those of normal images.

    A method overrides ``embed``, ``make_bank``, ``fit_index`` and ``score_and_map``. Nothing is trained: ``lightning
    test`` builds the bank, scores the test images and saves ``last.ckpt``. Maps, and the masks that they are compared
    with, have the size of the resized images, unless ``map_size`` says otherwise.

    Args:
        backbone: See DN2; a checkpoint of PANDA gives its adapted network.
        weights: See DN2.
        levels: Levels of the network's feature pyramid, 1 to 4: layer1 to layer4 of a ResNet.
        sigma: Standard deviation of the Gaussian that smooths maps, in pixels; 0 turns smoothing off.
        tile: Cut images into squares of this many pixels, which pass through the network 16 at a time: for high
            resolutions. Images may have any height and width of at least ``tile``; see networks/tiles.py.
        overlap: Pixels that neighbouring tiles share; their maps are blended there, so that there are no visible seams.
            Like ``tile``, it must be a multiple of the deepest level's stride.
        half_bank: Keep the bank in float16. Features computed in batches of another size, for example with several
            processes, may round differently, which can change a choice in PatchCore's coreset.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
        map_size: Compute pixel metrics on the network's input (view), or on all pixels of each image and its mask at
            their original size (original); pixels outside the crop then count as the least anomalous.

    Attributes:
        pixels: Pixel counts of the current validation or test, on this process.
        pixel_metrics: Metrics of the last complete validation or test, the same on every process; None without masks.
        threshold: Threshold with the best pixel F1 in the last validation or test (oracle).
        value_range: Smallest and largest value of the maps in that validation or test.
    """

    COMPUTING = (*PretrainedDetector.COMPUTING, "map_size")
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
        overlap: int,
        half_bank: bool,
        optimize: Optimize,
        index_backend: Backend,
        index_memory_mb: int,
        map_size: MapSize,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.save_hyperparameters()
        self.index = KNNIndex(index_backend, index_memory_mb)
        self.levels = levels
        self.sigma = sigma
        self.tile = tile
        self.overlap = overlap
        self.half_bank = half_bank
        self.map_size = map_size
        self.pixels = PixelHistogram()
        self._ranges: list[Tensor] = []  # least value of the maps of a batch, and the largest one's negative
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
        low, high = found["map"].flatten(1).aminmax(dim=1)
        # read when all batches are done: a float would wait for the device
        self._ranges.append(torch.stack([low, -high]).masked_fill(batch["index"] < 0, torch.inf).amin(dim=1))
        if "mask" in batch:
            self._count_pixels(found["map"], batch)
        return found

    test_step = validation_step

    def _count_pixels(self, maps: Tensor, batch: Batch) -> None:
        known, maps = (batch["has_mask"] & (batch["index"] >= 0)).cpu(), maps.float().cpu()
        if self.map_size == "view":
            self.pixels.add(maps[known], batch["mask"].cpu()[known])
            return
        loader: Any = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        shown = loader.dataset
        for row, values in zip(batch["index"].cpu()[known].tolist(), maps[known], strict=True):
            mask = torch.from_numpy(shown.view.own_mask(shown.images.masks[row], shown.images.sources[row]))
            whole = shown.view.undone(values, (mask.shape[1], mask.shape[0])).unsqueeze(0)
            self.pixels.add(torch.where(whole.isnan(), -torch.inf, whole), mask.unsqueeze(0))

    def _smoothed(self, maps: Tensor) -> Tensor:
        if not self.sigma:
            return maps
        radius = min(round(4 * self.sigma), *(side - 1 for side in maps.shape[1:]))
        with full_float32(maps.device):  # in half precision a map would hold some 200 values
            return torch.cat([_blurred(some, self.sigma, radius) for some in portions(maps.float(), 16)])

    # ---- features ----------------------------------------------------------------------------------------------------

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if len(set(self.levels)) < len(self.levels):
            raise PandaError(f"levels={list(self.levels)} names a level twice: name each once.")
        require_tiles(data.view.usual, self.tile, self.overlap, self._grid_step)  # before images are decoded

    @override
    def passed(self, data: Any) -> tuple[str, Sequence[int]]:
        return super().passed(data) if self.tile is None else ("tile", [self.tile])

    def pyramid(self, images: Tensor, pooled: bool = False) -> list[Tensor]:
        """Float32 feature maps (B, C, h, w) of images (B, 3, H, W), one a level; with ``pooled``, then (B, D).

        Pooled features of an image in tiles are the mean of theirs.

        Raises:
            PandaError: If images are smaller than a tile, or the network's maps of tiles do not lie side by side.
        """
        if self.tile is None:
            return [f.float() for f in pyramid(self.backbone, images, self.levels, pooled)]
        height, width = images.shape[2:]
        require_tiles((height, width), self.tile, self.overlap, self._grid_step)
        rows, columns = (self._places(length) for length in (height, width))
        tiles = cut(images, rows, columns, self.tile)
        found = [f.float() for f in pyramid(self.backbone, tiles, self.levels, pooled, TILES)]
        maps, rest = found[: len(self.levels)], found[len(self.levels) :]
        for stride, m in zip(level_strides(self.backbone, self.levels), maps, strict=True):
            if m.shape[2] * stride != self.tile:
                raise PandaError(
                    f"{self.backbone.architecture} gives a map of {m.shape[2]} positions of {stride} px for "
                    f"tiles of {self.tile} px, so the maps of tiles cannot be joined: leave tile out, or choose "
                    "another network."
                )
        blend = [blended(m, rows, columns, self.tile, (height, width)) for m in maps]
        return [*blend, *(p.view(-1, len(rows) * len(columns), p.shape[1]).mean(dim=1) for p in rest)]

    def _places(self, length: int) -> list[int]:
        assert self.tile is not None
        return places(length, self.tile, self.overlap, self._grid_step)

    @property
    def _grid_step(self) -> int:
        return max(level_strides(self.backbone, self.levels))

    def normal_rows(self) -> Tensor:
        """What ``embed`` makes of the normal training images, (N, ...); says beforehand what memory it takes."""
        count, size = len(self.data.normal_images), self.data.view.usual
        one = self.embed({"image": torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.device)})  # type: ignore[typeddict-item]
        dtype = torch.float16 if self.half_bank else torch.float32
        rank_zero_info(
            f"{self.method}: features of {count} normal images take "
            f"{in_words(count * one.numel() * dtype.itemsize)}, and twice that while they are concatenated; maps "
            f"take {4 * math.prod(size) / 2**20:.2f} MiB per image of a batch{self._tiles_in_words(size)}."
        )
        loader = self.data.normal_dataloader()
        features = extract(self.trainer, self.embed, loader, "Normal features", dtype=dtype)
        require_finite(self, torch.stack(features.aminmax()).abs().amax())
        return features

    def _tiles_in_words(self, size: tuple[int, int]) -> str:
        """The memory that tiles of images of this height and width take."""
        if self.tile is None:
            return ""
        count = math.prod(len(self._places(length)) for length in size)
        tile = torch.zeros(1, 3, self.tile, self.tile, dtype=torch.uint8, device=self.device)
        held = 4 * count * sum(m.numel() for m in pyramid(self.backbone, tile, self.levels))
        return (
            f", the features of its {count} tiles {held / 2**20:.2f} MiB; {TILES} tiles pass through the network at "
            "a time"
        )

    @override
    def drop_bank(self) -> None:
        super().drop_bank()
        self.index = type(self.index)(self.index.backend, self.index.memory_mb)

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
        self.pixels, self.value_range, self._ranges = PixelHistogram(), None, []

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
        nothing = torch.full((2,), torch.inf, device=self.device)
        low, high = torch.stack([nothing, *self._ranges]).amin(dim=0).tolist()
        if world_size() > 1:
            self.pixels.counts = sum_of_all(self.pixels.counts)
            low, high = of_each(torch.tensor([low, high])).amin(dim=0).tolist()
        if low < torch.inf:
            self.value_range = (low, -high)
        found = self.pixel_metrics = self.pixels.metrics()
        if found is not None:
            self.threshold = found.threshold
            values = {"pixel_auroc": found.auroc, "pro": found.pro, "pixel_ap": found.ap, "pixel_f1_oracle": found.f1}
            self.log_dict({f"{stage}/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()})


def _blurred(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Maps (B, H, W) smoothed by a Gaussian, rows and columns one after the other, mirrored at the border."""
    weights = torch.arange(-radius, radius + 1, dtype=torch.float64).div(sigma).square().mul(-0.5).softmax(dim=0)
    weights = weights.to(maps, non_blocking=True)
    padded = F.pad(maps.unsqueeze(1), [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]

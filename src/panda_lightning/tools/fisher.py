"""``panda fisher --backbone NAME --data FOLDER -o FILE``: the Fisher diagonal of any timm model, for EWC."""

import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from rich import get_console
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Bounds, Count, Seed
from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.formulas import fisher
from panda_lightning.networks.backbones import Backbone, Pool
from panda_lightning.pictures.images import ImageDataset, Images, as_is, decoded
from panda_lightning.pictures.layout import images_below
from panda_lightning.pictures.view import View
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.systems import peak_memory
from panda_lightning.types import Batch, PandaError

HELP = "Estimate the Fisher-information diagonal of a network's pretraining task, which weights EWC."
SAVE_EVERY = 512  # images between two savings of what a killed run has done


def arguments(parser: OneSentenceParser) -> None:
    """Accept the network, the images, the estimator, and where to compute and write."""
    add = parser.add_argument
    add("--backbone", type=str, required=True, help="As model.backbone: a timm name, local-dir:FOLDER, panda_tiny, ...")
    add("--weights", type=str | None, default=None, help="As model.weights: a file with other weights.")
    add("--adapt_stages", type=Count, default=2, help="Number of last stages that EWC will protect.")
    add("--pool", type=Pool | None, default=None, help="As model.pool; used only for --labels features.")
    add(
        "--data",
        type=str,
        required=True,
        help="A folder of images: FOLDER/<class>/..., or any layout if no labels are needed.",
    )
    add(
        "--labels",
        type=Literal["true", "sampled", "features"] | None,
        default=None,
        help="true: folder names are class names of the head (ImageNet synsets or names); sampled: drawn from the "
        "model's predictions, the default; features: no labels, the default for a network without a classifier.",
    )
    add("--samples", type=Count | None, default=None, help="Number of images, evenly spaced over the sorted files.")
    add("--per-sample", action="store_true", help="Square each image's gradient (the default).")
    several = Annotated[int, Bounds(2)] | None
    add("--batch", type=several, default=None, help="Square the gradient of the mean over this many images instead.")
    add("--image_size", type=Count | None, default=None, help="Image size in pixels; by default as in pretraining.")
    add("--crop", type=Literal["center", "squash"], default="center", help="As data.crop.")
    add("--half", action="store_true", help="Write float16.")
    add("--seed", type=Seed, default=0, help="Seed of the sampled labels, and of the image order for --batch.")
    add("--memory_mb", type=Count, default=1024, help="Memory for the gradients of one chunk of images, in MiB.")
    add("--accelerator", type=str, default="auto", help="As trainer.accelerator.")
    add("--devices", type=Count, default=1, help="As trainer.devices.")
    add("-o", "--output", type=Path, required=True, help="The safetensors file.")


def run(config: Namespace) -> int:
    """Estimate, save, and print the file's header."""
    if config.per_sample and config.batch is not None:
        raise PandaError(f"--per-sample and --batch {config.batch} are two estimators: choose one.")
    backbone = Backbone.pretrained(config.backbone, config.weights, config.adapt_stages, pool=config.pool)
    labels_of = config.labels or ("sampled" if backbone.num_classes else "features")
    if labels_of != "features":
        fisher.require_classifier(backbone)
    files, labels = find(Path(config.data), backbone, labels_of == "true", config.samples)
    if config.batch is not None and len(files) < config.batch:
        raise PandaError(f"--batch {config.batch} needs {config.batch} or more images, but there are {len(files)}.")
    size = config.image_size or int(backbone.config["pretrained_cfg"]["input_size"][-1])
    view = View(size, config.crop, round(size / 0.875), backbone.interpolation, None)
    in_memory = len(files) * 3 * size**2 < 4 * 2**30
    found = decoded(Images(files, labels), view, in_memory, False, "Decoding images")
    dataset = ImageDataset(found, labels, view)
    convention = "per-sample" if config.batch is None else f"batch {config.batch}"
    metadata = {
        "backbone": config.backbone if config.weights is None else f"{config.backbone} {config.weights}",
        "architecture": backbone.architecture,
        "weights": fisher.weights_name(backbone),
        "estimator": {
            "true": "true labels",
            "sampled": f"labels drawn from the softmax, seed {config.seed}",
            "features": f"features, seed {config.seed}" + (f", pool {config.pool}" if config.pool else ""),
        }[labels_of],
        "convention": convention + (f", order seed {config.seed}" if config.batch else ""),
        "samples": str(len(files)),
        "adapt_stages": str(config.adapt_stages),
        "image_size": f"{size} {config.crop}",
        "data": fingerprint(dataset),
    }
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy="ddp" if config.devices > 1 else "auto",
        inference_mode=False,
        use_distributed_sampler=False,  # the blocks below are dealt out already
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    work = FisherRun(backbone, dataset, metadata, config)
    trainer.test(work, verbose=False)
    if trainer.is_global_zero:
        peak = peak_memory()
        memory = f", at most {peak / 2**30:.1f} GiB" if peak else ""
        seconds = time.perf_counter() - start
        console = get_console()
        console.print(f"{config.output} ({config.output.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True)
        for key, value in sorted(fisher.header(config.output).items()):
            console.print(f"  {key}: {value}", soft_wrap=True, highlight=False)
        console.print(f"{len(files)} images ({work.found} of them from an earlier run) in {seconds:.0f} s{memory}")
    return 0


class FisherRun(pl.LightningModule):
    """One pass over the images by Lightning's engines; what was done is kept beside the file, and found again.

    Args:
        backbone: Whose diagonal.
        dataset: The images in order.
        metadata: What the file will say of itself; a part with another one is of other work.
        config: The command's arguments.
    """

    def __init__(self, backbone: Backbone, dataset: ImageDataset, metadata: dict[str, str], config: Namespace) -> None:
        super().__init__()
        self.backbone, self.dataset, self.metadata, self.config = backbone, dataset, metadata, config
        self.part = config.output.with_name(f"{config.output.name}.part.safetensors")
        self.of: fisher.Likelihood = "features" if metadata["estimator"].startswith("features") else "labels"
        self.rows = config.batch or 32  # of a block; blocks, not images, are dealt to the processes
        order = torch.arange(len(dataset))
        if config.batch:  # neighbours are of one class: shuffled, for a batch that is like those of pretraining
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
        self.blocks = [block.tolist() for block in torch.split(order, self.rows)]
        self.done = 0  # blocks
        if self.part.is_file():
            found = fisher.header(self.part)
            if {key: found.get(key) for key in metadata} == metadata:
                self.done = int(found["done"])
        self.found = min(self.done * self.rows, len(dataset))

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        mine = self.blocks[self.done :][self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(self.dataset, batch_sampler=mine, collate_fn=as_is)

    @override
    def on_test_start(self) -> None:
        self.estimator = fisher.Estimator(
            self.backbone, self.config.batch or 1, self.config.memory_mb, self.config.seed, self.of
        )
        if self.done and self.trainer.is_global_zero:
            earlier = load_file(self.part)
            self.estimator.count += earlier.pop("count")
            for name, value in earlier.items():
                self.estimator.total[name] += value.to(self.device)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.estimator.add(batch, self.config.labels == "true")
        world = self.trainer.world_size
        rounds = (len(self.blocks) - self.done) // world  # in which every process has a block
        every = max(1, SAVE_EVERY // (self.rows * world))
        if (batch_idx + 1) % every == 0 and batch_idx < rounds:
            total, count = self.estimator.sums()
            if self.trainer.is_global_zero:
                done = self.done + (batch_idx + 1) * world
                fisher.save({**total, "count": count}, self.part, {**self.metadata, "done": str(done)})

    @override
    def on_test_epoch_end(self) -> None:
        diagonal = self.estimator.diagonal()
        if self.trainer.is_global_zero:
            fisher.save(diagonal, self.config.output, self.metadata, self.config.half)
            self.part.unlink(missing_ok=True)


def find(folder: Path, backbone: Backbone, true_labels: bool, samples: int | None) -> tuple[list[Path], Any]:
    """Image files below a folder, and the number of each one's class in the network's head, -1 where not asked for.

    Raises:
        PandaError: If there are none, or a folder is named as no class of the head.
    """
    files = images_below(folder) if folder.is_dir() else []
    if not files:
        raise PandaError(f"--data {folder} has no images: give a folder of images.")
    if samples is not None and samples < len(files):
        files = [files[i] for i in np.linspace(0, len(files) - 1, samples).round().astype(int)]
    if not true_labels:
        return files, np.full(len(files), -1, dtype=np.int64)
    known = head_classes(backbone)
    names = [path.relative_to(folder).parts[0] for path in files]
    unknown = sorted({name for name in names if _plain(name) not in known})
    if unknown:
        example = ", ".join(list(known)[:3])
        raise PandaError(
            f"--labels true: {len(unknown)} folders such as {', '.join(unknown[:3])} do not have the name of a "
            f"class of {backbone.architecture} ({example}, ...): rename them, or use --labels sampled."
        )
    return files, np.array([known[_plain(name)] for name in names], dtype=np.int64)


def head_classes(backbone: Backbone) -> dict[str, int]:
    """Number of each class of the network's head by synset id and by each of its names, in lower case.

    Raises:
        PandaError: If neither the network's config nor timm knows them.
    """
    named = backbone.config["pretrained_cfg"].get("label_names")
    if named:
        return {_plain(name): i for i, name in enumerate(named)}
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.model)
    if subset is None:
        raise PandaError(
            f"--labels true: the {backbone.num_classes} classes of {backbone.architecture} have no names here: give "
            "label_names in its config.json, or use --labels sampled."
        )
    info: Any = ImageNetInfo(subset)
    classes = {_plain(name): i for i, name in enumerate(info.label_names())}
    for i in range(info.num_classes()):
        for name in info.index_to_description(i).split(","):
            classes.setdefault(_plain(name), i)  # "crane" is a bird first, and a machine after
    return classes


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().lower()

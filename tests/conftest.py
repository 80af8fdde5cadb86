"""What the tests share. Nothing here needs network, GPU or ../shared."""

import gc
import json
import operator
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(os.environ.get("PANDA_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_finish() -> None:
    """Searches for garbage are rare, and do not go through all that imports have made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fisher files and W&B's folders of the tests stay out of the user's home, and W&B finds no credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NETRC", "/nonexistent")
        home = str(tmp_path_factory.mktemp("home"))
        for name in ("HOME", "USERPROFILE"):  # the latter on Windows
            patch.setenv(name, home)
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs draw neither report.png nor maps.png, which takes half a second, but in tests with the mark ``pictures``."""
    with pytest.MonkeyPatch.context() as patch:
        if "pictures" not in request.keywords:
            from panda_lightning.callbacks import Report, anomaly_maps  # not before pytest's log handlers are there

            patch.setattr(Report.__init__, "__defaults__", (False,))
            patch.setattr(anomaly_maps, "draw", lambda path, *_: path.touch())
        yield


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """A run with several processes tells its rank by the environment: in a later test Lightning would wait for them."""
    yield
    assert "LOCAL_RANK" not in os.environ
    assert not torch.distributed.is_initialized()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that compare two trainings: only then do they agree bit for bit on every machine (README, clusters)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; a W&B run that the test leaves open is closed."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    import wandb

    if wandb.run is not None:
        wandb.finish()


def script(path: str) -> Any:
    """A script of the project as a module."""
    spec = spec_from_file_location(Path(path).stem, Path(__file__).parents[1] / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared() -> Path:
    """The folder of real images and weights, where it is."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (or PANDA_SHARED)")
    return SHARED


def picture(kind: str, number: int, size: int = 40) -> Image.Image:
    """A small picture: round spots are normal, stripes are anomalous, clouds are neither; each number another one."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:size, :size] / size
    if kind == "spot":
        cx, cy = rng.uniform(0.35, 0.65, 2)
        grey = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) * 25)
    elif kind == "cloud":
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        grey = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    else:
        grey = np.sin((x * rng.uniform(0.5, 1) + y * rng.uniform(0.5, 1)) * 40) / 2 + 0.5
    rgb = grey[..., None] * rng.uniform(0.6, 1, 3) + rng.normal(0, 0.03, (size, size, 3))
    return Image.fromarray((rgb.clip(0, 1) * 255).astype(np.uint8))


@pytest.fixture
def as_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Call a function of the rank in some threads that take themselves for processes; returns what each returned.

    tests/test_distributed.py starts real ones, which takes seconds. With ``nccl`` each has a GPU of tests/played.py,
    and tensors of the CPU are refused.
    """

    from tests.played import Machine  # not before pytest's log handlers: Lightning looks for them

    def call(world: int, function: Callable[[int], Any], backend: str = "gloo") -> list[Any]:
        meeting, mine, mail = threading.Barrier(world, timeout=60), threading.local(), [None] * world

        def exchange(thing: Any) -> list[Any]:
            mail[mine.rank] = thing
            meeting.wait()
            found = list(mail)
            meeting.wait()
            return found

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            if backend == "nccl" and not tensor.is_cuda:
                raise RuntimeError("No backend type associated with device type cpu")
            return tensor.clone()

        def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
            for part, found in zip(parts, exchange(sent(tensor)), strict=True):
                assert part.shape == found.shape
                assert part.dtype == found.dtype
                part.copy_(found)

        def start(rank: int) -> Any:
            mine.rank = rank
            try:
                with Machine("cuda:0") if backend == "nccl" else nullcontext():
                    return function(rank)
            except BaseException:
                meeting.abort()
                raise

        dist = {
            "is_initialized": lambda: True, "get_world_size": lambda: world, "get_rank": lambda: mine.rank,
            "get_backend": lambda: backend, "all_gather": all_gather,
            "all_gather_object": lambda parts, thing: operator.setitem(parts, slice(None), exchange(thing)),
            "all_reduce": lambda tensor: tensor.copy_(torch.stack(exchange(sent(tensor))).sum(dim=0)),
        }  # fmt: skip
        with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
            for name, value in dist.items():
                patch.setattr(torch.distributed, name, value)
            return list(pool.map(start, range(world)))

    return call


MIXED = ((64, 64), (128, 64), (64, 90))  # width and height of images of three sizes
SMALL = {  # architectures of vision transformers and what makes them small; patches of 8 pixels
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    "eva": (
        "vit_tiny_patch16_dinov3_qkvb",
        {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3},
    ),
}


def small_network(folder: Path, kind: str) -> str:
    """Write a small vision transformer as timm keeps networks in folders: a ViT with a classifier, or a DINOv3 without.

    Returns:
        What model.backbone takes.
    """
    import timm
    from safetensors.torch import save_file

    architecture, args = SMALL[kind]
    classes = 7 if kind == "vit" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=classes, **args)
        for block in model.blocks:  # a fresh one hardly changes its input
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                torch.nn.init.normal_(layer.weight, std=0.2)
            for name in {"gamma_1", "gamma_2"} & dict(block.named_parameters()).keys():
                torch.nn.init.ones_(getattr(block, name))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": classes}
    config = {"architecture": architecture, "num_classes": classes, "model_args": args, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"local-dir:{folder}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: train/spot 11 images; test/spot 7, test/stripe 6."""
    return make_folder(tmp_path / "images")


def make_clouds(folder: Path, count: int) -> Path:
    """Write pictures like nothing in an image folder, for outlier exposure."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture("cloud", 1000 + number).save(folder / f"{number:03d}.png")
    return folder


def make_folder(root: Path, train: int = 11, normal: int = 7, anomalous: int = 6) -> Path:
    """Write an image folder of spots and stripes."""
    for split, kind, numbers in (
        ("train", "spot", range(train)),
        ("test", "spot", range(100, 100 + normal)),
        ("test", "stripe", range(anomalous)),
    ):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
        for n in numbers:
            picture(kind, n).save(root / split / kind / f"{n:03d}.png")
    return root


def make_mixed(root: Path, train: int = 11) -> Path:
    """Write an image folder of spots and stripes of three sizes; of a stripe the left half is anomalous."""
    make_folder(root, train)
    (root / "ground_truth/stripe").mkdir(parents=True)
    for number, file in enumerate(sorted(root.glob("*/*/*.png"))):
        image = Image.open(file).resize(MIXED[number % 3])
        image.save(file)
        if "test/stripe" in file.as_posix():
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (0, 0, image.width // 2, image.height))
            mask.save(root / f"ground_truth/stripe/{file.stem}.png")
    return root


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command line; returns what it printed, and raises SystemExit where it refuses."""
    from panda_lightning.cli import main

    def call(*words: object) -> str:
        main([str(word) for word in words])
        out = capsys.readouterr()
        return out.out + out.err

    return call


def fast(root: Path, *, model: str = "PANDA", epochs: int = 2) -> list[str]:
    """Words for a quick run on an image folder with the bundled network, logged to CSV alone."""
    return [
        "--trainer.accelerator=cpu",
        f"--trainer.max_epochs={epochs}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=runs",
        "--trainer.logger.name=t",
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.filename=last",
        "--trainer.callbacks.enable_version_counter=false",
        f"--model={model}",
        "--model.backbone=panda_tiny",
        "--data=ImageFolder",
        f"--data.root={root}",
        "--data.normal_class=spot",
        "--data.image_size=32",
        "--data.crop=squash",
        "--data.batch_size=4",
        "--data.eval_batch_size=4",
    ]


@pytest.fixture
def study(workdir: Path) -> list[Any]:
    """Rows of small digits runs with the bundled network; a variant that fails lies beside the real ones."""
    from panda_lightning.tables.plan import planned  # not before pytest's log handlers: Lightning looks for them
    from tests.tables.recorded import METHODS, WORDS

    for name in ("digits.yaml", "variants"):
        (workdir / name).symlink_to(Path(__file__).parents[1] / "conf" / name)
    (workdir / "wrong.yaml").write_text("model: {class_path: DN2, init_args: {k: 4000}}\n")
    return planned(["digits.yaml"], METHODS, ["8", "9"], [0], WORDS)

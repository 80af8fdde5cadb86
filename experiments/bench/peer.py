"""anomalib's PatchCore and ours on the same images, weights, levels, size and coreset, in turn, a process each run.

    python experiments/bench/peer.py [--category bottle] [--coreset 0.01] [--repeats 3] [--root DIR] [--network DIR]

anomalib gets an environment of its own (--env; 6 GB with torch), made once. Images are those of MVTec AD below --root,
or of ../shared/data; the network a timm local-dir, or that of ../shared/weights. Both take images whole, squashed to
--size pixels, the levels 2 and 3, nine neighbours and the network's own mean and std, and write a checkpoint.

Seconds: of the whole process; from the end of its imports to the end of the bank (fit); of scoring the test images
(test). anomalib scores them once, without validation, pictures or metrics, which our seconds hold. AUROC is exact, on
raw scores. Memory: the peak of the largest process of a run (Linux), and how far above what it held after its imports.
--threads goes to both as OMP_NUM_THREADS; --workers are anomalib's processes that read images.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

PEER = "anomalib==2.7.0"
HOME = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PANDA_SHARED", HOME.parent / "shared"))
LEVELS, NEIGHBOURS = (2, 3), 9
INNER = slice(4, -4)  # positions whose patches no border reaches: there the two average differently
SIDES = ("anomalib", "ours")


def held() -> float:
    """GiB that this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**30


def peak() -> float:
    """GiB of the largest of this process and of those that it started, at its height."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20


def run_ours(options, folder):
    """Fit and test this package's PatchCore: what it held after imports, seconds of both, AUROCs, some patches."""
    import pytorch_lightning as pl
    import torch
    import torchvision  # noqa: F401 # as is imported below in any case
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint

    from panda_lightning import MVTecAD, PatchCore

    class Clock(Callback):
        def on_test_batch_start(self, *_):
            self.fitted = getattr(self, "fitted", time.perf_counter())

    imported, start, clock = held(), time.perf_counter(), Clock()
    pl.seed_everything(options.seed, verbose=False)
    data = MVTecAD(
        options.category, root=options.root, image_size=options.size, crop="squash", interpolation="bilinear",
        seed=options.seed,
    )  # fmt: skip
    detector = PatchCore(f"local-dir:{options.network}", coreset=options.coreset[0], neighbours=NEIGHBOURS,
                         levels=LEVELS)  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[clock, ModelCheckpoint(folder, filename="last")],
    )  # fmt: skip
    (metrics,) = trainer.test(detector, data, verbose=False)
    end = time.perf_counter()
    with torch.no_grad():
        batch = next(iter(data.normal_dataloader()))
        patches = detector.embed({"image": batch["image"][:1]})
    side = options.size // 2 ** (min(LEVELS) + 1)
    return {
        "imports": imported, "fit": clock.fitted - start, "test": end - clock.fitted, "auroc": metrics["test/auroc"],
        "pixel_auroc": metrics.get("test/pixel_auroc"), "entries": len(detector.bank),
        "images": [len(data.normal_images), len(data.test_dataloader().dataset)],
    }, patches.reshape(side, side, -1)[INNER, INNER]  # fmt: skip


def run_anomalib(options, folder):
    """The same of anomalib's PatchCore."""
    import torch
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    from anomalib.pre_processing import PreProcessor
    from lightning.pytorch import Callback, seed_everything
    from sklearn.metrics import roc_auc_score
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    class Keep(Callback):
        """The raw predictions: torchmetrics would take them for logits."""

        def __init__(self):
            self.rows = []

        def on_test_batch_end(self, trainer, module, outputs, *_):
            self.rows.append([getattr(outputs, n) for n in ("pred_score", "gt_label", "anomaly_map", "gt_mask")])

    imported, start, keep = held(), time.perf_counter(), Keep()
    seed_everything(options.seed, verbose=False)
    base = Path(options.root, options.category)
    kinds = sorted(f.name for f in (base / "test").iterdir() if f.is_dir() and f.name != "good")
    masks = [f"ground_truth/{kind}" for kind in kinds] if (base / "ground_truth").is_dir() else None
    data = Folder(
        options.category, "train/good", base, [f"test/{kind}" for kind in kinds], "test/good", masks,
        num_workers=options.workers, val_split_mode="none",
    )  # fmt: skip
    view = json.loads(Path(options.network, "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    resize = Resize((options.size, options.size), antialias=True)
    model = Patchcore(
        f"local-dir:{options.network}", list(LEVELS), coreset_sampling_ratio=options.coreset[0],
        num_neighbors=NEIGHBOURS, pre_processor=PreProcessor(Compose([resize, Normalize(view["mean"], view["std"])])),
        post_processor=False, evaluator=False, visualizer=False,
    )  # fmt: skip
    reductions = model.model.feature_extractor.reductions
    if list(reductions) != [2 << level for level in LEVELS]:
        sys.exit(f"maps {LEVELS} of {options.network} are of 1/{reductions} of the image: take another network.")
    engine = Engine(
        callbacks=[keep], accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    fitted = time.perf_counter()
    engine.test(model, datamodule=data, verbose=False)
    end = time.perf_counter()
    score, label, maps, mask = (None if c[0] is None else torch.cat(c) for c in zip(*keep.rows, strict=True))
    net = model.model.eval()
    with torch.no_grad():
        image = model.pre_processor.transform(data.train_data[0].image).unsqueeze(0)
        patches = net.generate_embedding({n: net.feature_pooler(f) for n, f in net.feature_extractor(image).items()})
    return {
        "imports": imported, "fit": fitted - start, "test": end - fitted, "auroc": roc_auc_score(label, score),
        "pixel_auroc": None if mask is None else roc_auc_score(mask.flatten(), maps.flatten()),
        "entries": len(net.memory_bank), "images": [len(data.train_data), len(data.test_data)],
    }, patches[0].permute(1, 2, 0)[INNER, INNER]  # fmt: skip


def one(options):
    """One run: its line of JSON, and a file of patches."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found, patches = {"ours": run_ours, "anomalib": run_anomalib}[options.only](options, folder)
    import torch

    patches.clone().numpy().tofile(options.patches)
    print(json.dumps({**found, "peak": peak(), "threads": torch.get_num_threads()}))


def environment(folder, python):
    """The Python of an environment with anomalib, made where it is not there yet; and its versions."""
    inside = folder / "bin/python"
    if not inside.exists():
        print(f"making {folder} with {PEER}", file=sys.stderr)
        if python:
            subprocess.run([python, "-m", "venv", folder], check=True)
        else:
            venv.create(folder, with_pip=True)
    if versions(inside).get("anomalib") != PEER.split("==")[1]:
        words = [inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", PEER]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
    return inside


def versions(python):
    """Of the packages that matter in the environment of this Python."""
    lines = "import json, importlib.metadata as m; found = {d.name.lower(): d.version for d in m.distributions()}; "
    done = subprocess.run([python, "-c", lines + "print(json.dumps(found))"], capture_output=True, check=True)
    names = ("anomalib", "panda-lightning", "torch", "torchvision", "timm", "lightning", "pytorch-lightning", "numpy")
    found = json.loads(done.stdout)
    return {name: found[name] for name in names if name in found}


def timed(python, side, options, coreset, seed, folder):
    """What one run measured, with the seconds of its whole process."""
    patches = folder / f"{side}.patches"
    words = [f"--root={options.root}", f"--category={options.category}", f"--network={options.network}"]
    words += [f"--size={options.size}", f"--workers={options.workers}", f"--seed={seed}", f"--only={side}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env["PYTHONPATH"] = str(HOME / "src") if side == "ours" else ""
    if options.threads:
        env |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [python, "-W", "ignore", __file__, *words, f"--coreset={coreset}", f"--patches={patches}"],
        capture_output=True, text=True, env=env, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - start}


def rows(coreset, found):
    """The lines of one coreset."""
    for side in SIDES:
        runs = found[side]
        seconds = [f"{median(r[key] for r in runs):.1f}" for key in ("whole", "fit", "test")]
        spread = f" ({min(r['whole'] for r in runs):.1f} to {max(r['whole'] for r in runs):.1f})"
        high, low = (median(r[key] for r in runs) for key in ("peak", "imports"))
        above = median(r["peak"] - r["imports"] for r in runs)
        scores = [f"{median(r[k] for r in runs):.4f}" if runs[0][k] else "-" for k in ("auroc", "pixel_auroc")]
        cells = [f"{coreset:g}", side, seconds[0] + spread, *seconds[1:], f"{high:.2f}", f"{low:.2f}", f"{above:.2f}"]
        yield f"| {' | '.join([*cells, *scores, str(runs[0]['entries'])])} |"
    pairs = list(zip(*(found[side] for side in SIDES), strict=True))
    ratios = [median(a[key] / b[key] for a, b in pairs) for key in ("whole", "fit", "test", "peak")]
    above = median((a["peak"] - a["imports"]) / (b["peak"] - b["imports"]) for a, b in pairs)
    cells = [*(f"{ratio:.1f}" for ratio in ratios[:3]), f"{ratios[3]:.2f}", "", f"{above:.2f}", "", "", ""]
    yield f"| {coreset:g} | anomalib / ours | {' | '.join(cells)} |"


def difference(folder):
    """The largest difference between the two sides' patches of the first training image, in parts of their norm."""
    import numpy as np

    one, other = (np.fromfile(folder / f"{side}.patches", dtype=np.float32) for side in SIDES)
    return np.abs(one - other).max() / np.abs(one).max()


def processor():
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main(options, work):
    """Run both in turn, and print the table."""
    pythons = {"anomalib": environment(options.env, options.python), "ours": sys.executable}
    if options.root is None:
        with tarfile.open(SHARED / "data/mvtec.tar.gz") as archive:
            archive.extractall(work, filter="data")
        options.root = work / "mvtec"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True).stdout
    heads = ("coreset", "", "whole process, s", "fit, s", "test, s", "peak, GiB", "after imports, GiB", "peak above it")
    head = f"| {' | '.join([*heads, 'image AUROC', 'pixel AUROC', 'entries'])} |"
    table, found = [head, "|---" * head.count(" | ") + "|---|"], {}
    for coreset in options.coreset:
        found = {side: [] for side in SIDES}
        for seed in range(options.repeats):
            for side in SIDES:
                found[side].append(timed(pythons[side], side, options, coreset, seed, work))
        table += rows(coreset, found)
    run = found["ours"][0]
    print(f"{options.category}: {run['images'][0]} normal images, {run['images'][1]} test images, {options.size} px, ")
    print(f"{Path(options.network).name}, levels {LEVELS}; medians of {options.repeats} runs in turn, ", end="")
    print(f"{run['threads']} of {os.cpu_count()} threads, {options.workers} workers of anomalib's; {processor()}; ")
    print(f"commit {commit.strip()}; patches of the two differ by {difference(work):.0e} of the largest value")
    for side in SIDES:
        print(f"{side}: {', '.join(f'{name} {version}' for name, version in versions(pythons[side]).items())}")
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--coreset", type=float, nargs="+", default=[0.01])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", type=Path, help="the folder of MVTec AD's categories")
    parser.add_argument("--network", type=Path, default=SHARED / "weights/mobilenetv2_100.in1k", help="a local-dir")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir(), "panda-lightning-peer"))
    parser.add_argument("--python", help="makes anomalib's environment; this one by default")
    for name in ("seed", "only", "patches"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seed = int(options.seed or 0)
    options.network = options.network.resolve()
    options.root = options.root and options.root.resolve()
    if options.only:
        one(options)
    else:
        with tempfile.TemporaryDirectory() as work:
            main(options, Path(work))

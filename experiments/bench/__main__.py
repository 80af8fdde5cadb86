"""Compare the package with a plain script and with a bare cached loop: make bench, or

    python experiments/bench [--epochs 2] [--repeats 3] [--train 256] [--test 512] [--growth] [-o FILE]

ResNet-18 (or --architecture) at 224 px, float32 (on a GPU the package and the bare loop in bf16), images of 32 x 32
pixels as CIFAR-10's; random weights and pictures, which cost the same as real ones; gradients clipped to 0.1, so that
AUROC moves. Runs alternate; medians; each run is a process of its own, timed inside after its imports. AUROC of all
three is compared epoch by epoch. Peak memory is that of the GPU where there is one.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file

from panda_lightning.datamodules.base import ShardedSampler

HERE = Path(__file__).parent
NAMES = ("plain", "ours", "floor")


def make_network(folder: Path, architecture: str) -> None:
    """A ResNet with random weights as a timm local-dir."""
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    for module in model.modules():  # statistics as training would leave them, so that activations stay in range
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 64, 64))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"input_size": [3, 224, 224], "num_classes": 1000, "first_conv": "conv1", "classifier": "fc"}
    config |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
    text = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(text))


def make_images(folder: Path, train: int, test: int) -> None:
    """Noise of any contrast, the anomalous half of the test images tinted: AUROC is not 1, and moves in training."""
    rng = np.random.default_rng(0)
    for split, name, count in (("train", "a", train), ("test", "a", test // 2), ("test", "b", test - test // 2)):
        target = folder / split / name
        target.mkdir(parents=True)
        for i in range(count):
            tint = rng.normal(0, 8 if name == "a" else 24, 3)
            coarse = (128 + tint + rng.uniform(0.1, 1.0) * rng.uniform(-128, 128, (8, 8, 3))).clip(0, 255)
            Image.fromarray(coarse.astype(np.uint8)).resize((32, 32)).save(target / f"{i:05d}.png")


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("epochs", 2), ("repeats", 3), ("train", 256), ("test", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--architecture", default="resnet18", help="a ResNet of timm's")
    parser.add_argument("--growth", action="store_true", help="instead: the bare loop with 1, 2, 4 times --train")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    sizes = [options.train * factor for factor in ((1, 2, 4) if options.growth else (1,))]
    names = ("floor",) if options.growth else NAMES
    jobs = [(size, name) for _ in range(options.repeats) for size in sizes for name in names]
    results: dict[tuple[int, str], list[dict]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory() as work:
        make_network(Path(work, "network"), options.architecture)
        for size in sizes:
            make_images(Path(work, str(size)), size, options.test)
        for size, name in track(jobs, "Benchmark"):
            results[size, name].append(run(HERE / f"{name}.py", Path(work), size, options.epochs))
    text = growth(results, sizes) if options.growth else report({n: results[sizes[0], n] for n in NAMES}, options)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def run(script: Path, work: Path, train: int, epochs: int) -> dict:
    """What one script measured, in a process of its own."""
    sampler, orders = ShardedSampler(train, 1, 0, shuffle=True), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    command = [sys.executable, script, work / "network", work / str(train), str(epochs), json.dumps(orders)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def growth(results: dict[tuple[int, str], list[dict]], sizes: list[int]) -> str:
    """Seconds of each phase by the number of training images, and the exponent of growth from first to last."""
    lines = ["| phase | " + " | ".join(f"{size} images, s" for size in sizes) + " | growth |"]
    lines += ["|" + "---|" * (len(sizes) + 2)]
    for phase in results[sizes[0], "floor"][0]["phases"]:
        seconds = [median(r["phases"][phase] for r in results[size, "floor"]) for size in sizes]
        exponent = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])
        lines.append(f"| {phase} | " + " | ".join(f"{s:.3f}" for s in seconds) + f" | n^{exponent:.2f} |")
    return "\n".join(lines)


def report(results: dict[str, list[dict]], options: argparse.Namespace) -> str:
    """The table in Markdown."""
    images = f"{options.train} training, {options.test} test images, {options.epochs} epochs, {options.repeats} repeats"
    lines = [f"{images}, {torch.get_num_threads()} threads, torch {torch.__version__}", ""]
    lines += ["| run | median s (min to max) | plain / this | largest AUROC difference to plain | peak GiB |"]
    lines += ["|---|---|---|---|---|"]
    for name in NAMES:
        seconds = [r["seconds"] for r in results[name]]
        ratios = [p["seconds"] / r["seconds"] for p, r in zip(results["plain"], results[name], strict=True)]
        pairs = [(p["aurocs"], r["aurocs"]) for p, r in zip(results["plain"], results[name], strict=True)]
        difference = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
        spread = f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        peak = median(r["peak_gib"] for r in results[name])
        lines.append(f"| {name} | {spread} | {median(ratios):.2f} | {difference:.1e} | {peak:.2f} |")
    aurocs = " ".join(f"{auroc:.4f}" for auroc in results["plain"][0]["aurocs"])
    lines += ["", f"AUROC of the plain script after 0, 1, ... epochs: {aurocs}"]
    over = median(o["seconds"] / f["seconds"] for o, f in zip(results["ours"], results["floor"], strict=True))
    lines += ["", f"ours / floor: {over:.3f}", "", "| phase (floor) | s | images/s |", "|---|---|---|"]
    both, rounds = options.train + options.test, options.epochs + 1
    work = {
        "decode": both,
        "prefix": both,
        "train": options.train * options.epochs,
        "extract": both * rounds,
        "index": options.train * rounds,
        "search": options.test * rounds,
        "metrics": options.test * rounds,
    }
    for phase, count in work.items():
        seconds = median(r["phases"][phase] for r in results["floor"])
        lines.append(f"| {phase} | {seconds:.3f} | {count / max(seconds, 1e-9):,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Seconds of each phase of a run on one device, on two, on four, ... and on all: DDP over the GPUs of this machine.

    python experiments/bench/scaling.py [--architecture resnet152] [--size 224] [--train 1024] [--test 2048] [--most 8]

Made-up images and random weights; no prefix cache, so that every image passes all layers; batches of 32 a device;
bfloat16, on a CPU float32. Three epochs, of which the median of the last two is shown.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"training": "train", "extraction": "bank", "scoring": "score"}
RUN = """-m panda_lightning fit --config {root}/conf/folder.yaml --config {root}/conf/variants/early.yaml
--data.root {work}/images --data.normal_class a --data.image_size {size} --data.crop squash --data.batch_size {batch}
--model.backbone local-dir:{work}/network --model.prefix_cache_gb 0 --trainer.max_epochs 3
--trainer.accelerator {kind} --trainer.devices {n} --trainer.strategy {strategy} --trainer.precision {precision}
--trainer.enable_progress_bar false --trainer.logger CSVLogger --trainer.logger.save_dir {work}
--trainer.logger.name on{n}"""


def rates(work: Path, n: int, options: argparse.Namespace) -> dict[str, float]:
    """Images a second of each phase on so many devices."""
    on_gpu = torch.cuda.is_available()
    words = RUN.format(
        root=ROOT, work=work, size=options.size, batch=32 * n, n=n, kind="gpu" if on_gpu else "cpu",
        strategy="ddp" if n > 1 else "auto", precision="bf16-mixed" if on_gpu else "32-true",
    ).split()  # fmt: skip
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    (path,) = work.glob(f"on{n}/version_*/checkpoints/last.ckpt")
    rows = torch.load(path, weights_only=True)["callbacks"]["Report"]["rows"][2:]
    images = {"training": options.train, "extraction": options.train, "scoring": options.test}
    return {phase: images[phase] / median(row[f"seconds/{key}"] for row in rows) for phase, key in PHASES.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet152")
    for name, default in (("size", 224), ("train", 1024), ("test", 2048), ("most", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    spec = spec_from_file_location("bench", Path(__file__).with_name("__main__.py"))
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    most = min(options.most, max(1, torch.cuda.device_count()))
    print(f"{options.architecture}, {options.size} px, images a second (and as many times those of one device)\n")
    print(f"| devices | {' | '.join(PHASES)} |\n{'|---' * (1 + len(PHASES))}|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bench.make_network(work / "network", options.architecture)
        bench.make_images(work / "images", options.train, options.test)
        one: dict[str, float] = {}
        for n in sorted({1, *(2**i for i in range(1, 10) if 2**i <= most), most}):
            found = rates(work, n, options)
            one = one or found
            cells = (f"{rate:,.0f} ({rate / one[phase]:.2f})" for phase, rate in found.items())
            print(f"| {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

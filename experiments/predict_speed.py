"""`lightning predict` beside the bare extraction: python experiments/predict_speed.py CKPT FOLDER [COUNTS].

In turn, three times each: the images of FOLDER decoded by the same loader and passed through the same network, and the
whole of `lightning predict` as a process of its own would do it, with search, p-values, neighbours and table. Seconds
are those from the first batch to the end; peak memory is that of a process that does nothing else.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def bare(ckpt: str, listing: str) -> None:
    """Decode and extract."""
    from torch.utils.data import DataLoader

    from panda_lightning import PANDA
    from panda_lightning.pictures.images import as_is
    from panda_lightning.pictures.loose import LooseDataset, pointed_at
    from panda_lightning.pictures.view import View

    detector = PANDA.load_from_checkpoint(ckpt)
    dataset = LooseDataset(pointed_at(listing), View.of(detector.origin["view"]), threads=False)
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in DataLoader(dataset, batch_size=128, num_workers=2, collate_fn=as_is):
            detector.embed(batch)
    done(start)


def predicted(ckpt: str, listing: str) -> None:
    """The whole command."""
    from panda_lightning.cli import main

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        main(["predict", "--ckpt_path", ckpt, "--data.images", listing, "--data.num_workers", "2",
              "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
              "--trainer.default_root_dir", folder])  # fmt: skip
        done(start)


def done(start: float) -> None:
    """Say seconds and peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"RESULT {time.perf_counter() - start:.2f} {peak:.0f}", flush=True)


def main(ckpt: str, folder: str, counts: list[int]) -> None:
    """The table."""
    from panda_lightning.pictures.layout import images_below

    files = images_below(Path(folder))
    print("| images | bare: s, images/s, MiB | predict: s, images/s, MiB | share of the bare rate |\n|---|---|---|---|")
    for count in counts:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as listing:
            listing.write("\n".join(str(file.absolute()) for file in files[:count]))
            listing.flush()
            found: dict[str, list[list[float]]] = {"bare": [], "predict": []}
            for _ in range(3):
                for kind in found:
                    words = [sys.executable, __file__, kind, ckpt, listing.name]
                    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                    line = next(line for line in out.splitlines() if line.startswith("RESULT"))
                    found[kind].append([float(word) for word in line.split()[1:]])
            middle = {kind: sorted(several)[1] for kind, several in found.items()}
            cells = [f"{s:.1f}, {count / s:.0f}, {peak:.0f}" for s, peak in middle.values()]
            ratio = middle["bare"][0] / middle["predict"][0]
            print(f"| {count} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] in ("bare", "predict"):
        (bare if sys.argv[1] == "bare" else predicted)(sys.argv[2], sys.argv[3])
    else:
        main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]] or [2000, 20000])

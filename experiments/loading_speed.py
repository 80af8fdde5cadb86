"""Images per second from memory and from disk: python experiments/loading_speed.py ROOT (Cats-vs-Dogs).

Three passes over 2,000 photographs each, alternating; medians. The first pass from memory pays for decoding.
"""

import sys
import time
from statistics import median

from panda_lightning.datamodules import CatsVsDogs


def main(root: str) -> None:
    """Print seconds and images per second."""
    for size in (64, 224):
        start = time.perf_counter()
        ways = {}
        for name, memory_gb, workers in (("memory", 4.0, 0), ("disk, 0 workers", 0.0, 0), ("disk, 2 workers", 0.0, 2)):
            data = CatsVsDogs(
                root=root,
                normal_class="cat",
                image_size=size,
                memory_gb=memory_gb,
                num_workers=workers,
                train_limit=1999,
            )
            data.setup("fit")
            start = time.perf_counter()
            ways[name] = data.normal_dataloader()
            print(f"{size} px, {name}: {time.perf_counter() - start:.1f} s before the first pass")
        seconds = {name: [] for name in ways}
        for _ in range(3):
            for name, loader in ways.items():
                start = time.perf_counter()
                count = sum(len(batch["index"]) for batch in loader)
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            print(f"| {size} px | {name} | {median(times):.2f} s | {count / median(times):,.0f} images/s |")


if __name__ == "__main__":
    main(sys.argv[1])

"""What a table's runs share: `panda table` beside one `lightning` a class, whole commands, in turn.

python experiments/bench/table.py METHOD CONFIG ROUNDS [words of lightning] [--jobs=N of the table]

Prints a row: seconds of either (median over rounds), their ratio, and how many images passed the network's frozen
layers in either, by the log.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from panda_lightning.tables.plan import planned


def timed(words, folder):
    """Seconds of a command, and images that passed frozen layers, from what it says or its runs' logs."""
    env = {**os.environ, "WANDB_MODE": "disabled"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words], capture_output=True, text=True, check=True, env=env
    )
    seconds = time.perf_counter() - begin
    said = done.stdout + done.stderr + "".join(p.read_text() for p in Path(folder).glob("table/runs/*/log.txt"))
    counts = [
        sum(int(n) for n in re.findall(rf"(\d+) (?:test|normal training) images {verb}", said))
        for verb in ("passed", "decoded")
    ]
    return seconds, counts[0] or counts[1]  # without a cache each image that is decoded passes once


if __name__ == "__main__":
    method, config, rounds, *words = sys.argv[1:]
    jobs = [words.pop()] if words and words[-1].startswith("--jobs=") else []
    plan = planned([config], {method: method}, None, [0], words)
    found = {"separate": [], "table": []}
    for _ in range(int(rounds)):
        folder = tempfile.mkdtemp()
        logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}/runs"]
        quiet = [*logger, "--trainer.enable_progress_bar=false"]
        each = [timed(["panda_lightning", *row.words, *quiet], "none") for row in plan]
        found["separate"].append((sum(s for s, _ in each), sum(n for _, n in each)))
        own = [
            "panda_lightning.tools",
            "table",
            f"--config={config}",
            f"--methods={method}",
            f"--folder={folder}/table",
            *jobs,
        ]
        found["table"].append(timed([*own, f"--words={' '.join(words)}"], folder))
        shutil.rmtree(folder)
    apart, shared = (statistics.median(s for s, _ in found[how]) for how in ("separate", "table"))
    passed = [found[how][0][1] for how in ("separate", "table")]
    name = ", ".join([Path(config).stem, method, f"{len(plan)} classes", *jobs])
    print(f"| {name} | {apart:.1f} | {shared:.1f} | {apart / shared:.2f} | {passed[0]} | {passed[1]} |")

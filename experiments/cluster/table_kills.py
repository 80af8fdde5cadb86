"""Kill `panda table` with SIGKILL at random moments until it is done, and compare with an undisturbed table.

python experiments/cluster/table_kills.py OUT [--kills 20] [--seed 0]

The table is small (four digits, three methods, two seeds); a start takes some 4 s until its first run begins, and lives
for 4 to 8 s. Compared are the lines of table.csv, but for seconds and date, and the curves of all rows.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from panda_lightning.tables.rows import Rows

TABLE = ["--config=conf/digits.yaml", "--methods=dn2,early,ses", "--classes=6,7,8,9", "--seeds=0,1",
         "--words=--trainer.max_epochs=15 --data.image_size=32"]  # fmt: skip


def started(folder, log):
    """A table in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-m", "panda_lightning.tools", "table", *TABLE, f"--folder={folder}"]
    return subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def lines(folder):
    """Lines of table.csv, without what no two runs have in common."""
    with (folder / "table.csv").open() as file:
        return [{k: v for k, v in line.items() if k not in ("seconds", "made")} for line in csv.DictReader(file)]


def curves(folder):
    """Curve of every row."""
    return {one.row.name: one.curve for one in Rows(folder).read()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    whole, killed = chosen.out / "undisturbed", chosen.out / "killed"
    moments, kills, status = random.Random(chosen.seed), 0, None
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "log.txt").open("w") as log:
        begin = time.monotonic()
        assert started(whole, log).wait() == 0
        print(f"undisturbed: {len(curves(whole))} rows in {time.monotonic() - begin:.0f} s", flush=True)
        while status is None:
            process = started(killed, log)
            try:
                status = process.wait(moments.uniform(4, 8) if kills < chosen.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                print(f"kill {kills}: {len(list((killed / 'rows').glob('*.json')))} rows complete", flush=True)
    same = lines(whole) == lines(killed) and curves(whole) == curves(killed)
    print(f"status {status} after {kills} kills: table and curves {'are equal' if same else 'DIFFER'}")
    sys.exit(not same)

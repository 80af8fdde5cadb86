"""Kill runs with SIGKILL at random moments, start them again, and compare the last AUROC with an undisturbed run's.

python experiments/cluster/faults.py OUT [--seed 0] [--trials 1] > experiments/cluster/FAULTS.md

Nines of scikit-learn's digits, the bundled network, 4 epochs of 12 steps, a checkpoint each epoch and every 5 steps.
A run says in a file which phase it is in; the kill comes a random while after the start of a phase, within the time
that the phase took in the undisturbed run. Alone: two kills in each run. Two processes, started by Lightning or by
torchrun, which starts them again itself: one kill of one process; the other must be gone within a minute.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

HERE = Path(__file__).resolve().parent
FIT = """fit --config {root}/conf/digits.yaml --config {run}/run.yaml --data.image_size 32 --data.test_limit 200
--trainer.max_epochs 4 --trainer.accelerator cpu --trainer.devices {processes} --trainer.strategy {strategy}
--trainer.enable_progress_bar false --trainer.enable_model_summary false --model.grad_clip 0.3
--trainer.callbacks+=faults.Phases"""
MODULE = ["-m", "panda_lightning"]
LAUNCH = {
    "alone": MODULE,
    "Lightning": MODULE,
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", *MODULE],
}  # fmt: skip
PHASES = ("start", "decoding", "frozen layers", "extraction", "validation", "training", "checkpoint")


class Phases(pl.Callback):
    """Writes down when each phase begins."""

    def _begin(self, phase: str, trainer: Any) -> None:
        if trainer.is_global_zero:
            with open(os.environ["FAULTS_PHASES"], "a", encoding="utf-8") as file:
                file.write(f"{phase}\n")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: D102
        self._begin("decoding", trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self._begin("frozen layers", trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self._begin("extraction", trainer)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        if batch_idx == 0:
            self._begin("validation", trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self._begin("training", trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:  # noqa: D102
        self._begin("checkpoint", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self._begin("end", trainer)


class Attempt:
    """One start of a run."""

    def __init__(self, run: Path, how: str) -> None:
        subprocess.run(["sh", HERE / "run_folder.sh", run, "5"], check=True, capture_output=True)
        self.log, self.phases = run / "phases", []
        self.log.write_text("")
        words = FIT.format(
            root=HERE.parents[1], run=run, processes=1 + (how != "alone"), strategy="auto" if how == "alone" else "ddp"
        )
        environment = {
            **os.environ, "FAULTS_PHASES": str(self.log), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see torchrun.sh
            "PYTHONPATH": f"{HERE.parents[1] / 'src'}:{HERE}",
        }  # fmt: skip
        with (run / "output").open("a") as output:
            self.main = subprocess.Popen(
                [sys.executable, *LAUNCH[how], *words.split()],
                stdout=output, stderr=output, env=environment, start_new_session=True,
            )  # fmt: skip
        self.phases.append(("start", time.monotonic()))

    def poll(self) -> bool:
        """Note what phases have begun; False when the run has ended."""
        done = self.main.poll() is not None
        for phase in self.log.read_text().split("\n")[len(self.phases) - 1 : -1]:
            self.phases.append((phase, time.monotonic()))
        time.sleep(0.002)
        return not done

    def processes(self) -> list[int]:
        """The processes that compute, in the order of their birth: one a rank."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"FAULTS_PHASES={self.log}".encode() in path.joinpath("environ").read_bytes().split(b"\0")
                words = path.joinpath("cmdline").read_bytes()
            except OSError:
                continue
            if mine and b"panda_lightning" in words and b"torch.distributed.run" not in words:
                found.append(int(path.name))
        return sorted(found)

    def wait(self, phase: str, nth: int, delay: float) -> bool:
        """Wait until so long after the nth beginning of a phase; False if the run ended before."""
        while self.poll():
            begun = [when for name, when in self.phases if name == phase]
            if len(begun) >= nth and time.monotonic() - begun[nth - 1] >= delay:
                return True
        return False


def step(run: Path) -> str:
    """Where the newest checkpoint stands."""
    import torch

    path = run / "checkpoints" / "last.ckpt"
    return str(torch.load(path, weights_only=True, mmap=True)["global_step"]) if path.is_file() else "none"


def last_auroc(run: Path) -> float:
    """The last AUROC in the log of the newest attempt."""
    newest = max(run.glob("version_*"), key=lambda folder: int(folder.name.split("_")[1]))
    with (newest / "metrics.csv").open() as file:
        return [float(row["val/auroc"]) for row in csv.DictReader(file) if row.get("val/auroc")][-1]


def undisturbed(run: Path, how: str) -> tuple[float, dict[str, list[float]]]:
    """The AUROC, and how long each phase takes, at each of its beginnings."""
    attempt = Attempt(run, how)
    while attempt.poll():
        pass
    assert attempt.main.returncode == 0, f"see {run / 'output'}"
    durations = defaultdict(list)
    for (phase, begun), (_, ended) in zip(attempt.phases, attempt.phases[1:], strict=False):
        durations[phase].append(ended - begun)
    return last_auroc(run), durations


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", nargs="+", default=list(LAUNCH), choices=list(LAUNCH), help="how runs are started")
    parser.add_argument("--trials", type=int, default=1, help="runs alone for each phase")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    draw = random.Random(args.seed)
    rows, kills, recovered, slowest = [], 0, 0, 0.0
    for how in args.start:
        expected, durations = undisturbed(args.out.resolve() / how / "undisturbed", how)
        print(f"undisturbed, {how}: AUROC {expected!r}", file=sys.stderr)
        trials = [phase for phase in PHASES for _ in range(args.trials if how == "alone" else 1)]
        for number, first in enumerate(trials):
            run = args.out.resolve() / how / f"{number:02d}"
            attempt = Attempt(run, how)
            seen = []
            for phase in (first, draw.choice(PHASES)) if how == "alone" else (first,):
                nth = draw.randint(1, 2) if len(durations[phase]) > 1 else 1
                delay = draw.random() * durations[phase][nth - 1]
                if not attempt.wait(phase, nth, delay):
                    seen.append(f"{phase}: had ended before")
                    continue
                while not (ranks := attempt.processes()):  # torchrun has not started any yet
                    attempt.poll()
                victim = draw.randrange(len(ranks))
                when = time.monotonic()
                os.kill(ranks[victim], signal.SIGKILL)
                kills += 1
                while set(ranks) & set(attempt.processes()):
                    attempt.poll()
                gone = time.monotonic() - when
                slowest = max(slowest, gone)
                rank = f", process {victim} of {len(ranks)}, others gone in {gone:.1f} s" if len(ranks) > 1 else ""
                seen.append(f"{phase} {nth}, {delay:.2f} s{rank}; goes on from {step(run)}")
                if how != "torchrun":
                    attempt.main.wait()
                    attempt = Attempt(run, how)
            while attempt.poll():
                pass
            auroc = last_auroc(run) if attempt.main.returncode == 0 else float("nan")
            same = sum("goes on" in s for s in seen) if auroc == auroc else 0
            recovered += same
            rows.append((how, "<br>".join(seen), auroc, auroc - expected))
            print(rows[-1], file=sys.stderr, flush=True)
    command = f"python experiments/cluster/faults.py OUT --seed {args.seed} --trials {args.trials}"
    print(f"# Faults\n\n`{command} --start {' '.join(args.start)}`\n")
    print(__doc__.split("\n\n")[2] + "\n")
    print(f"Kills: {kills}. Recovered: {recovered}. Largest difference of the last AUROC from the undisturbed run's:")
    worst = max(abs(row[3]) if row[3] == row[3] else float("inf") for row in rows)
    print(f"{worst!r}. The other process was gone after {slowest:.1f} s at most.\n")
    print("| start | killed in (which one, how long after it began); newest checkpoint's step | AUROC | difference |")
    print("|---|---|---|---|")
    for how, seen, auroc, difference in rows:
        print(f"| {how} | {seen} | {auroc:.6f} | {difference!r} |")


if __name__ == "__main__":
    main()

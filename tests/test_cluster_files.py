"""What experiments/cluster starts, up to the command lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from panda_lightning.tables.plan import planned, spread
from panda_lightning.tools import main
from tests.windows import WINDOWS

pytestmark = pytest.mark.skipif(WINDOWS, reason="shell scripts")
HOME = Path(__file__).parents[1]
CLUSTER = HOME / "experiments/cluster"

# ---- table.sbatch ----------------------------------------------------------------------------------------------------

# Stand-ins: srun is what it starts, Python writes its words down and ends as STATUS says, the job is in state STATE.
STUBS = {
    "srun": 'exec "$@"',
    "python": 'printf "%s\\n" "${SLURM_NTASKS-none}" "$@" > "$OUT/words"; exit "${STATUS:-0}"',
    "scontrol": 'echo "$@" >> "$OUT/scontrol"; echo JobState=${STATE:-RUNNING}',
}


@pytest.fixture
def sbatch(workdir):
    """Run table.sbatch as task 2 of 4; returns its status, Python's words, and what scontrol was asked for."""
    (workdir / "bin").mkdir()
    for name, body in STUBS.items():
        (workdir / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (workdir / "bin" / name).chmod(0o755)

    def start(*words, **environment):
        slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}
        path = f"{workdir / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, **slurm, "PATH": path, "OUT": str(workdir), **environment}
        done = subprocess.run(["bash", CLUSTER / "table.sbatch", *words], env=environment, check=False)
        asked = workdir / "scontrol"
        return (
            done.returncode,
            (workdir / "words").read_text().splitlines(),
            asked.read_text() if asked.exists() else "",
        )

    return start


def test_a_task_runs_its_share_of_the_study(sbatch, workdir, capsys):
    for name in ("digits.yaml", "variants"):
        (workdir / name).symlink_to(HOME / "conf" / name)
    (workdir / "study.yaml").write_text("{config: digits.yaml, methods: 'dn2,early', classes: '1,2', folder: table}")
    status, (tasks, *words), _ = sbatch("study.yaml", "--loggers", "AutoWandbLogger")
    assert (status, tasks) == (0, "none")  # Lightning sees no Slurm
    assert words[:3] == ["-m", "panda_lightning.tools", "table"]
    assert words[words.index("--shard") + 1] == "2/4"
    plan = planned(["digits.yaml"], {"dn2": "dn2", "early": "early"}, ["1", "2"], [0])
    assert [row.place for row in spread(plan, "2/4")] == [("Digits", "1", "early", 0)]
    assert main([*words[2:], "--run=false"]) == 0
    assert "| dn2 | 0 of 2 | not run |" in capsys.readouterr().out


def test_one_of_the_shares_may_be_run_again(sbatch):
    _, words, _ = sbatch("study.yaml", SLURM_ARRAY_TASK_COUNT="1", SHARDS="10")
    assert words[words.index("--shard") + 1] == "2/10"


@pytest.mark.parametrize(
    ("status", "starts", "state", "again"),
    [(0, 0, "RUNNING", False), (1, 0, "RUNNING", False), (143, 99, "RUNNING", True), (75, 0, "RUNNING", True),
     (137, 0, "RUNNING", True), (137, 3, "RUNNING", False), (143, 0, "CANCELLED", False)],
)  # fmt: skip
def test_what_was_told_to_end_asks_for_another_go(sbatch, status, starts, state, again):
    found, _, asked = sbatch("study.yaml", STATUS=str(status), SLURM_RESTART_COUNT=str(starts), STATE=state)
    assert found == status
    assert ("requeue 7" in asked) == again


# ---- sweep.yaml ------------------------------------------------------------------------------------------------------


def test_lightning_accepts_what_wandb_agent_starts(monkeypatch, tmp_path):
    from wandb import wandb_agent

    sweep = yaml.safe_load((CLUSTER / "sweep.yaml").read_text())
    point = {"normal_class": "ship", "seed": 2, "variant": "ses"}
    assert set(sweep["parameters"]) == set(point)
    assert all(value in sweep["parameters"][name]["values"] for name, value in point.items())
    names = {path.stem for path in (HOME / "conf/variants").glob("*.yaml")}
    assert set(sweep["parameters"]["variant"]["values"]) <= names

    started = []
    monkeypatch.setattr(
        wandb_agent, "AgentProcess", lambda command, **_: started.append(command) or type("P", (), {})()
    )
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, str(tmp_path))
    agent = wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = sweep["command"]
    args = {name: {"value": value} for name, value in point.items()}
    agent._command_run({"run_id": "r", "program": None, "args": args})
    ((words),) = started

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [*words, "--print_config"],
        cwd=HOME,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    data = config["data"]["init_args"]
    assert (data["normal_class"], data["seed"], config["seed_everything"]) == ("ship", 2, 2)
    assert "SampleWiseEarlyStopping" in str(config["trainer"]["callbacks"])

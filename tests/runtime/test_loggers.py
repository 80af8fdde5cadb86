import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import pytest
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger

from panda_lightning import AutoWandbLogger
from panda_lightning.runtime import loggers
from panda_lightning.runtime.loggers import claim_folder


def test_without_credentials_it_is_offline(workdir):
    assert AutoWandbLogger()._wandb_init["mode"] == "offline"


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_with_credentials_in_the_environment_it_is_online(workdir, monkeypatch, variable):
    monkeypatch.setenv(variable, "x" * 40)
    assert "mode" not in AutoWandbLogger()._wandb_init


def test_with_credentials_in_netrc_it_is_online(workdir, monkeypatch):
    (workdir / "netrc").write_text("machine api.wandb.ai\n login user\n password " + "x" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(workdir / "netrc"))
    assert "mode" not in AutoWandbLogger()._wandb_init
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # credentials of another host are none
    assert AutoWandbLogger()._wandb_init["mode"] == "offline"


@pytest.mark.parametrize("way", ["no credentials", "mode", "offline", "WANDB_MODE"])
def test_an_offline_run_says_in_one_line_how_to_upload_it(workdir, monkeypatch, way, capfd, caplog):
    if way != "no credentials":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    if way == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"mode": {"mode": "offline"}, "offline": {"offline": True}}.get(way, {})
    with caplog.at_level("INFO"):
        AutoWandbLogger(**options).log_metrics({"a": 1.0})
    told = re.findall("W&B is offline. To upload this run later: wandb sync (.*)", caplog.text)
    assert len(told) == 1
    assert (workdir / told[0]).is_dir()
    assert "wandb:" not in "".join(capfd.readouterr())


def test_a_mode_that_the_user_set_stays(workdir, monkeypatch):
    assert AutoWandbLogger(mode="disabled")._wandb_init["mode"] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "mode" not in AutoWandbLogger()._wandb_init


def test_a_service_that_is_away_does_not_stop_the_run(workdir, monkeypatch):
    import wandb

    real, modes = wandb.init, []

    def init(**settings):
        modes.append(settings.get("mode"))
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("no route to host")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", init)
    logger = AutoWandbLogger(save_dir="runs/deep", mode="online")
    with pytest.warns(UserWarning, match="no route to host.*kept offline"):
        logger.log_metrics({"a": 1.0})
    assert modes == ["online", "offline"]
    assert list((workdir / "runs/deep/wandb").glob("offline-run-*"))


DEATH = """
import os, signal, subprocess
from panda_lightning import AutoWandbLogger

logger = AutoWandbLogger()
logger.log_metrics({"a": 1.0})
children = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout
rows = [line.split() for line in children.splitlines()]
mine = [row for row in rows if row[1] == str(os.getpid()) and "wandb" in row[2]]
os.kill(int(mine[0][0]), signal.SIGKILL)
os.waitpid(int(mine[0][0]), 0)  # a busy machine takes its time
for step in range(100):
    logger.log_metrics({"a": 2.0})
    logger.experiment.log({"b": 1.0})
logger.finalize("success")
print("the run has ended")
"""


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_process_of_wandb_that_dies_does_not_stop_the_run(workdir):
    own = {
        key: value for key, value in os.environ.items() if not key.startswith("WANDB_")
    }  # not this process's service
    done = subprocess.run([sys.executable, "-c", DEATH], capture_output=True, text=True, timeout=120, env=own)
    assert done.returncode == 0
    assert "the run has ended" in done.stdout
    assert done.stderr.count("W&B's process has died") == 1
    assert len(list((workdir / "runs/wandb").glob("offline-run-*/*.wandb"))) == 1


def test_without_the_package_it_stands_aside(workdir, monkeypatch, caplog):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert isinstance(AutoWandbLogger(), DummyLogger)
    assert "logged to CSV only" in caplog.text


def test_the_environment_is_left_alone(workdir):
    AutoWandbLogger()
    assert "WANDB_MODE" not in os.environ


def claimed(folder, number, answers):
    logger = CSVLogger(folder, "digits")
    claim_folder(logger)
    answers.put(logger.log_dir)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    context = multiprocessing.get_context()
    answers = context.Queue()
    workers = [context.Process(target=claimed, args=(tmp_path, number, answers)) for number in range(8)]
    for worker in workers:
        worker.start()
    found = sorted(answers.get() for _ in workers)
    for worker in workers:
        worker.join()
    assert found == [str(tmp_path / "digits" / f"version_{n}") for n in range(8)]


def test_a_version_that_the_user_gave_stays(tmp_path):
    logger = CSVLogger(tmp_path, "digits", version="mine")
    claim_folder(logger)
    claim_folder(DummyLogger())
    assert logger.log_dir == str(tmp_path / "digits" / "mine")
    assert not list(tmp_path.iterdir())


def test_places_are_said_from_the_current_folder_on(workdir):
    inside = workdir / "runs/version_0"
    assert [str(loggers.from_here(path)) for path in (inside, "runs/version_0")] == [
        os.path.join("runs", "version_0")
    ] * 2
    assert loggers.from_here(workdir.parent) == workdir.parent

"""What a user gets from the built wheel, in an environment that has our dependencies and nothing else of ours."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*words: object, **options: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_the_demo_from_another_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a copy, so that no build folder is left in the checkout
    names = call("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in names:
        if name.startswith(("src/", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 7 * 2**20
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin/python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path added by a .pth file does not have its own .pth files read: the editable install stays out
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(*pip, "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = call(python, "-c", "import panda_lightning as p; print(p.__file__)", cwd=elsewhere, env=clean)
    assert Path(where.strip()).is_relative_to(environment)
    packed = {name.removeprefix("src/") for name in names if name.startswith("src/panda_lightning/")}
    assert packed == {
        p.relative_to(site).as_posix() for p in (site / "panda_lightning").rglob("*.*") if p.suffix != ".pyc"
    }
    words = ["fit", "--config", ROOT / "conf/digits.yaml", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    said = call(environment / "bin/lightning", *words, cwd=elsewhere, env=clean)
    assert "AUROC" in said
    assert (elsewhere / "runs/digits/version_0/report.png").is_file()
    table = ["table", "--config", ROOT / "conf/digits.yaml", "--classes=9", "--words=--trainer.accelerator=cpu"]
    assert "| dn2 | 1 | 90.0" in call(environment / "bin/panda", *table, cwd=elsewhere, env=clean)
    assert (elsewhere / "tables/digits/table.html").is_file()

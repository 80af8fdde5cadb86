"""Build what a release holds, and try it as a new user would: python experiments/release_check.py [--reuse].

1. A copy of the tracked files gives the sdist; the unpacked sdist gives the wheel.
2. Metadata: one version, the licence file, a description that renders.
3. The wheel holds every tracked file of the package, and nothing else.
4. The wheel is installed in an empty environment outside the checkout.
5. Commands run in an empty folder, with an empty home folder, and with a configuration file that a user would write.

--reuse takes the dependencies of the running interpreter; without it pip fetches them (about 8 GB of disk). If every
check passes, the two files are copied to DIR (dist). Otherwise the exit status is 1, and the faults are listed.
"""

import argparse
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "panda_lightning"
NEEDED = ("py.typed", "tables/page.html", "tools/gallery.html", "weights/panda_tiny/model.safetensors")
TOOLS = ("bank", "check-data", "export", "fisher", "gallery", "suspects", "table")
MINE = """\
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: mine}}
model: {class_path: PANDA, init_args: {backbone: panda_tiny}}
data: {class_path: Digits, init_args: {normal_class: 9, image_size: 64, batch_size: 8}}
"""
DEMO = """
    --data Digits --data.normal_class 9 --data.image_size 64 --data.batch_size 8 --model PANDA
    --model.backbone panda_tiny --model.grad_clip 0.3 --model.ewc_weight 100 --trainer.max_epochs 2
    --trainer.accelerator cpu --trainer.logger CSVLogger --trainer.logger.save_dir runs --trainer.logger.name flags
"""  # `make demo` with fewer epochs, for a wheel has no conf/
faults: list[str] = []


def check(holds: object, what: str, otherwise: str = "") -> None:
    """Say whether something holds, and remember where it does not."""
    print(f"{'ok   ' if holds else 'FAULT'} {what}{f': {otherwise}' if otherwise and not holds else ''}", flush=True)
    if not holds:
        faults.append(what)


def call(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command, and keep what it prints."""
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=3600, **options)


def must(*words: object, **options: object) -> str:
    """Run a command without which nothing goes on; returns what it printed."""
    done = call(*words, **options)
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        sys.exit(f"{shlex.join(map(str, words))} ended with status {done.returncode}:\n{said}")
    return done.stdout


def tracked(root: Path) -> list[str]:
    """The files that git has, as far as they are still there."""
    names = must("git", "-C", root, "ls-files", "-z").split("\0")
    return [name for name in names if name and (root / name).is_file()]


def built(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """The sdist of a copy of these files, and the wheel of the unpacked sdist."""
    for name in names:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    hook = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    build = [sys.executable, "-c", hook]  # what pip and build call
    must(*build, "build_sdist", folder, cwd=folder / "copy")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)  # made here a moment ago; Python 3.11.2 knows no filter
    must(*build, "build_wheel", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def check_metadata(sdist: Path, wheel: Path, files: list[str]) -> str:
    """Compare what the wheel says of itself with the checkout; returns the version."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    version = config["metadata"]["version"]
    info = f"{NAME}-{version}.dist-info"
    check(f"{NAME}-{version}.tar.gz" == sdist.name, f"version {version} in the sdist's name", sdist.name)
    check(wheel.name.startswith(f"{NAME}-{version}-py3-none-any"), f"version {version} in the wheel's name", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        read = message_from_bytes(archive.read(f"{info}/METADATA"))
    check(read["Version"] == version, f"version {version} in METADATA", read["Version"])
    changes = ROOT / "CHANGELOG.md"
    told = changes.is_file() and re.search(rf"^## \[{re.escape(version)}\]", changes.read_text("utf-8"), re.MULTILINE)
    check(told, f"CHANGELOG.md has a section [{version}]")
    licence = read["License-Expression"] or read["License"]
    check(licence == "Apache-2.0", "licence Apache-2.0", str(licence))
    if not read["License-Expression"]:
        print("note  the licence is in the old field License: setup.cfg has license, not license_expression")
    check(f"{info}/licenses/LICENSE" in files, "the licence file is in the wheel")
    check(read["Summary"], "one-line summary")
    kind = str(read["Description-Content-Type"])
    check(kind.startswith("text/markdown"), "the description says that it is Markdown", kind)
    text = read.get_payload(decode=True).decode("utf-8")
    check(len(text) > 500, "a description that is not empty", f"{len(text)} characters")
    check_rendering(text, [sdist, wheel])
    return version


def check_rendering(text: str, files: list[Path]) -> None:
    """Render the description as a package index would, with what is installed."""
    if find_spec("twine"):
        done = call(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files)
        said = " ".join((done.stdout + done.stderr).split())
        check(not done.returncode, "twine check --strict", said)
    else:
        print("note  twine is not installed, so its check is left out: pip install twine")
    from markdown_it import MarkdownIt  # rich brings it

    shown = MarkdownIt("commonmark").enable("table").render(text)
    check("<h1>" in shown and "<p>" in shown, "the description renders as Markdown")
    targets = re.findall(r'(?:href|src)="([^"]+)"', shown)
    local = [target for target in targets if not target.startswith(("http:", "https:", "mailto:", "#"))]
    missing = [target for target in local if not (ROOT / target.partition("#")[0]).exists()]
    check(not missing, "every relative link of the description leads to a file", ", ".join(missing))
    if local:
        print(f"note  {len(local)} relative links of the description do not work on a package index, e.g. {local[0]}")


def check_content(wheel: Path, names: list[str]) -> list[str]:
    """Compare the files in the wheel with those that git has; returns their names."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    packed = {name for name in files if ".dist-info/" not in name}
    wanted = {name.removeprefix("src/") for name in names if name.startswith(f"src/{NAME}/")}
    check(not wanted - packed, "every tracked file of the package is in the wheel", ", ".join(sorted(wanted - packed)))
    check(not packed - wanted, "nothing else is in it, no tests either", ", ".join(sorted(packed - wanted)[:9]))
    lacking = [name for name in NEEDED if f"{NAME}/{name}" not in packed]
    check(not lacking, "types, pages and bundled weights are in it", ", ".join(lacking))
    print(f"note  {wheel.name}: {len(files)} files, {wheel.stat().st_size / 2**20:.1f} MiB")
    return files


def installed(folder: Path, wheel: Path, reuse: bool) -> Path:
    """The folder of the commands of a new environment with the wheel in it."""
    home = folder / "environment"
    venv.create(home, with_pip=not reuse)
    commands = home / ("Scripts" if os.name == "nt" else "bin")
    python = commands / ("python.exe" if os.name == "nt" else "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    if not reuse:
        must(*pip, wheel)
        check(not call(python, "-m", "pip", "check").returncode, "pip check: dependencies agree with each other")
        return commands
    site = Path(must(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path added by a .pth file does not have its own .pth files read: an editable install stays out
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    must(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel)
    return commands


def check_use(folder: Path, commands: Path, version: str) -> None:
    """Do what a new user does first, in an empty folder."""
    here, home = folder / "work", folder / "home"
    for place in (here, home):
        place.mkdir()
    own = {"HOME": str(home), "USERPROFILE": str(home), "PYTHONIOENCODING": "utf-8"}
    skip = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XDG_CACHE_HOME", "MAKEFLAGS")
    kept = {key: value for key, value in os.environ.items() if key not in skip and not key.startswith("WANDB_")}

    def tried(*words: object, says: str = "") -> str:
        done = call(commands / str(words[0]), *words[1:], cwd=here, env=kept | own)
        said = done.stdout + done.stderr
        what = " ".join(map(str, words))
        fits = not done.returncode and re.search(says, said)
        short = what if len(what) < 90 else f"{what[:87]}..."
        check(fits, short, f"status {done.returncode}, expected {says!r}\n{said[-2000:]}")
        return said

    where = tried("python", "-c", f"import {NAME}; print({NAME}.__file__)")
    check(str(commands.parent) in where, "the package is the installed one", where)
    for command in ("lightning", "panda"):
        tried(command, "--version", says=rf"\b{re.escape(version)} ")
        tried(command, "--help", says="usage: ")
    for tool in TOOLS:
        tried("panda", tool, "--help", says="usage: ")
    tried("lightning", "fit", *DEMO.split(), says=r"AUROC [\d.]+ after 2 epochs")
    (here / "mine.yaml").write_text(MINE, encoding="utf-8")
    tried("lightning", "fit", "--config", "mine.yaml", says=r"AUROC [\d.]+ after 1 epochs")
    last = "runs/mine/version_0/checkpoints"
    check((here / last).is_dir() and (here / "runs/mine/version_0/report.png").is_file(), "a run writes its pictures")
    found = sorted((here / last).glob("*.ckpt"))
    if found:
        name = found[-1].relative_to(here).as_posix()
        tried("lightning", "test", "--config", "mine.yaml", "--ckpt_path", name, says=r"AUROC [\d.]+ of \d+ images")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="take the dependencies of this interpreter")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the two files go if all is well")
    options = parser.parse_args()
    commit = must("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip()
    changed = must("git", "-C", ROOT, "status", "--porcelain").splitlines()
    print(f"note  commit {commit}" + (f", with {len(changed)} files changed or untracked" if changed else ""))
    names = tracked(ROOT)
    with tempfile.TemporaryDirectory(prefix="panda-release-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        sdist, wheel = built(folder, names)
        version = check_metadata(sdist, wheel, check_content(wheel, names))
        check_use(folder, installed(folder, wheel, options.reuse), version)
        if not faults:
            options.dist.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                shutil.copy(file, options.dist / file.name)
                print(f"note  {options.dist / file.name}")
    if faults:
        sys.exit(f"{len(faults)} checks failed: {'; '.join(faults)}.")
    print("All checks passed.")


if __name__ == "__main__":
    main()

"""Who may import whom: downwards only (README, architecture)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import panda_lightning

ROOT = Path(panda_lightning.__file__).parent
LAYERS = [
    {"types", "runtime.processes", "runtime.derived", "runtime.float32", "runtime.sizes", "runtime.systems"},
    {
        "arguments", "networks.adapting", "networks.checks", "networks.splitting", "runtime.gathering", "runtime.whole",
        "runtime.work", "search.candidates",
    },
    {
        "formulas.conformal", "formulas.feature_health", "formulas.losses", "formulas.metrics",
        "formulas.pixel_metrics", "formulas.uncertainty", "networks.augment", "networks.folding",
        "networks.scratch", "networks.tiles", "runtime.averages", "runtime.checkpoints", "runtime.features",
        "runtime.fingerprint", "runtime.loggers", "runtime.options", "search.with_faiss",
    },
    {"search.knn"},
    {
        "networks.loading", "pictures", "runtime.agreement", "runtime.results", "search.coreset", "search.sharded",
        "search.traced",
    },
    {"networks.backbones"},
    {"formulas.fisher", "networks.prefix_cache", "networks.pyramid"},
    {"callbacks"},
    {"datamodules"},
    {"detectors", "networks.pretraining"},
    {"command"},
    {"cli"},
    {"tables"},
    {"tools"},
]  # fmt: skip
ROOMS = ("formulas", "networks", "runtime", "search")  # whose files have layers of their own


def place(parts: tuple[str, ...]) -> str:
    """The name in LAYERS of a module below panda_lightning."""
    return ".".join(parts[:2]) if parts[0] in ROOMS else parts[0]


def imported(path: Path) -> set[str]:
    """Names in LAYERS that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("panda_lightning"):
            parts = tuple(node.module.split(".")[1:])
            names |= {place((*parts, alias.name)) for alias in node.names}
    return names


def test_imports_point_downwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    checked = 0
    for path in ROOT.rglob("*.py"):
        here = place(path.relative_to(ROOT).with_suffix("").parts)
        if here.split(".")[-1] in ("__init__", "__main__"):
            continue
        for name in imported(path):
            if name != here:
                assert level[name] < level[here], f"{path.relative_to(ROOT)} imports {name}"
                checked += 1
    assert checked > 20


def test_faiss_and_wandb_are_imported_only_inside_functions():
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("faiss", "wandb") for n in names), path


def test_importing_the_package_takes_no_time():
    """Its names are imported when they are used."""
    code = "import sys, panda_lightning as p; print(len(sys.modules), 'torch' in sys.modules, p.PandaError.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) < 250
    assert out[1:] == ["False", "PandaError"]


def test_every_public_name_can_be_imported_and_is_in_the_reference():
    page = (ROOT.parents[1] / "docs/pages/reference/python.md").read_text("utf-8")
    for name in panda_lightning.__all__:
        found = getattr(panda_lightning, name)
        assert f"::: {found.__module__}.{name}\n" in page + "\n", name
    with pytest.raises(AttributeError, match="Nothing"):
        panda_lightning.Nothing  # noqa: B018


@pytest.mark.parametrize("command", ["lightning", "panda"])
def test_commands_import_while_nothing_searches_for_garbage(command):
    code = (
        "import gc, sys; from panda_lightning.__main__ import lightning, panda; found = []\n"
        f"gc.callbacks.append(lambda phase, info: found.append(phase)); sys.argv = [{command!r}, '--version']\n"
        f"try: {command}()\n"
        "except SystemExit: print(len(found), gc.isenabled(), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[-3]) < 100, out  # there are a thousand otherwise
    assert out[-2:] == ["True", "True"]

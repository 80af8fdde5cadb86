"""Who may import whom: downwards only (README, architecture)."""

import ast
from pathlib import Path

import panda_lightning

ROOT = Path(panda_lightning.__file__).parent
LAYERS = [
    {"types", "runtime.processes", "runtime.derived"},
    {"arguments", "runtime.whole", "runtime.work"},
    {
        "formulas.conformal", "formulas.feature_health", "formulas.losses", "formulas.metrics",
        "formulas.pixel_metrics", "formulas.uncertainty", "networks.augment", "networks.folding",
        "networks.scratch", "runtime.checkpoints", "runtime.features",
        "runtime.fingerprint", "runtime.loggers", "runtime.options", "search.knn",
    },
    {
        "networks.loading", "pictures", "runtime.agreement", "runtime.results", "search.coreset", "search.sharded",
        "search.traced",
    },
    {"networks.backbones"},
    {"formulas.fisher", "networks.prefix_cache", "networks.pyramid"},
    {"callbacks"},
    {"datamodules"},
    {"detectors", "networks.pretraining"},
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
    for node in ast.walk(ast.parse(path.read_text())):
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
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("faiss", "wandb") for n in names), path

"""Who may import whom: downwards only (README, architecture)."""

import ast
from pathlib import Path

import panda_lightning

ROOT = Path(panda_lightning.__file__).parent
LAYERS = [
    {"types", "processes"},
    {"losses", "knn", "metrics", "folding", "fingerprint", "loggers", "checkpoints", "networks", "pixels"},
    {"backbones", "coreset"},
    {"features", "fisher"},
    {"prefix_cache"},
    {"callbacks", "datamodules"},
    {"detectors", "pretraining"},
    {"cli"},
    {"tools"},
]


def imported(path: Path) -> set[str]:
    """First names below panda_lightning that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("panda_lightning"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


def test_imports_point_downwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    checked = 0
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
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

"""Which of timm's networks serve as backbones, and how: ``python experiments/scan_networks.py [PATTERN]``.

Networks of at most 100 M parameters are built with random weights and tried at a small size (``numbers``); of larger
ones names and shapes are looked at (``shapes``). A row is written as it is made, and rows that are there are not made
again. ``--table`` writes the table by class of network.
"""

import argparse
import copy
import csv
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from panda_lightning import Backbone, PandaError
from panda_lightning.networks.adapting import stages
from panda_lightning.networks.loading import takes
from panda_lightning.networks.splitting import stride

ROWS = Path(__file__).parent / "results" / "networks.csv"
TABLE = ROWS.with_suffix(".md")
COLUMNS = (
    "architecture family million how outcome stages entry side features split gradient reloaded folds folded maps "
    "seconds reason"
)
LARGEST = 100  # million parameters


def examined(name: str) -> dict[str, Any]:
    """One network: what becomes of it, and the largest relative differences found."""
    with torch.device("meta"):
        model = timm.create_model(name)
    million = sum(p.numel() for p in model.parameters()) / 1e6
    row: dict[str, Any] = {"architecture": name, "family": type(model).__name__, "million": f"{million:.1f}"}
    row["how"] = "numbers" if million <= LARGEST else "shapes"
    try:
        found = _small(name, 2 * stride(model)) if million <= LARGEST else _shapes(model)
    except PandaError as error:
        found = {"outcome": "refused", "reason": str(error)}
    except Exception as error:  # a fault of ours, or of this network's: the table shows it
        found = {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {**row, **found}


def _shapes(model: Any) -> dict[str, Any]:
    """Stages and features of a network without numbers."""
    if "pre_logits" not in getattr(model, "forward_head", lambda: 0).__code__.co_varnames:
        return {"outcome": "refused", "reason": "no forward_head with pre_logits"}
    model.eval()
    size = model.pretrained_cfg["input_size"]
    try:
        features = model.forward_head(model.forward_features(torch.empty(1, *size, device="meta")), pre_logits=True)
    except NotImplementedError as error:
        return {"outcome": "refused", "reason": str(error).splitlines()[0]}
    return {"outcome": "pools" if features.ndim == 2 else "refused", "stages": len(stages(model)) - 1, "side": size[-1]}


def _small(name: str, side: int) -> dict[str, Any]:
    """A network for images of any size; one that is made for a size, for a small one if it can be."""
    if takes(name, "dynamic_img_size"):
        return _numbers(name, {"dynamic_img_size": True})
    if takes(name, "img_size") and side > 2:
        try:
            return _numbers(name, {"img_size": side})
        except (PandaError, RuntimeError, AssertionError, ValueError, IndexError, TypeError, ZeroDivisionError):
            pass
    return _numbers(name, {})


def _numbers(name: str, args: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **args).eval()
    _lively(model)
    count = len(stages(model)) - 1
    reference = copy.deepcopy(model)
    backbone = Backbone(model, min(2, count), args, "plain")
    way = backbone.flow
    side = way.side
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"stages": count, "side": side, "entry": way.entry or ""}
    found["outcome"] = "whole" if not backbone.splits or way.entry is None else "split"
    with torch.no_grad():
        whole = reference.forward_head(reference.forward_features(backbone.normalized(images)), pre_logits=True)
        found["features"] = _apart(backbone(images), whole)
        found["split"] = _apart(backbone.suffix(backbone.prefix(images)), whole)
    backbone(images).square().sum().backward()
    reached = {n for n, p in backbone.model.named_parameters() if p.grad is not None}
    found["gradient"] = reached == set(backbone.adapted())
    backbone.zero_grad(set_to_none=True)
    with torch.no_grad():
        again = Backbone.from_config(backbone.config, min(2, count), "plain")
        again.load_state_dict(backbone.state_dict())
        found["reloaded"] = _apart(again(images), whole)
        found["folds"] = len(way.feeds)
        backbone.compute("folded")
        found["folded"] = _apart(backbone(images), whole)
        if float(found["folded"]) > 1e-5:  # deep networks of random weights make more of rounding: in float64, then
            plain = backbone.double().model.forward_features(backbone.normalized(images))
            found["folded"] = _apart(backbone(images), backbone.pooled(plain))
    found["maps"] = hasattr(model, "forward_intermediates")
    return found


def _lively(model: nn.Module) -> None:
    """Statistics and scales unlike those of a fresh network, in which some layers have no effect."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.1, generator=generator)


def _apart(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def read() -> list[dict[str, str]]:
    """The rows that are there."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Families of networks, and how many of each are split, whole or refused; Markdown."""
    by: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by[row["family"]].append(row)
    tried = [row for row in rows if row["how"] == "numbers"]
    lines = [
        "# timm's networks as backbones",
        "",
        f"`python experiments/scan_networks.py`, timm {timm.__version__}: {len(rows)} architectures. {len(tried)} of "
        f"at most {LARGEST} M parameters were tried with random weights, most at a small size: "
        f"{_count(tried, 'split')} are computed in two parts, {_count(tried, 'whole')} whole, "
        f"{_count(tried, 'refused')} are refused. Of larger ones names and shapes were looked at. Largest error: of "
        "features against timm's `forward_features` and `forward_head`, in two parts against whole, after a "
        "checkpoint, and with BatchNorm folded; relative to the largest feature. Gradients reached exactly the "
        f"adapted parameters in {sum(row['gradient'] == 'True' for row in tried)} of {len(tried)}.",
        "",
        "| timm's class | networks | split | whole | refused | by shapes alone | largest error | why refused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, some in sorted(by.items()):
        counts = [sum(r["outcome"] == kind for r in some) for kind in ("split", "whole", "refused")]
        shapes = sum(r["how"] == "shapes" and r["outcome"] != "refused" for r in some)
        reasons = sorted({r["reason"] for r in some if r["reason"]})
        errors = [float(r[k]) for r in some if r["features"] for k in ("features", "split", "reloaded", "folded")]
        error = f"{max(errors):.0e}" if errors else ""
        cells = (family, len(some), *counts, shapes, error, "; ".join(reasons[:2]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _count(rows: list[dict[str, str]], outcome: str) -> int:
    return sum(row["outcome"] == outcome for row in rows)


def main() -> None:
    """Scan, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="of timm.list_models")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        TABLE.write_text(table(read()), encoding="utf-8")
        return
    warnings.filterwarnings("ignore")
    done = {row["architecture"] for row in read()}
    new = not ROWS.exists()
    with ROWS.open("a", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS.split(), lineterminator="\n")
        if new:
            rows.writeheader()
        for name in (n for n in timm.list_models(options.pattern) if n not in done):
            start = time.perf_counter()
            row = examined(name)
            rows.writerow({**row, "seconds": f"{time.perf_counter() - start:.1f}"})
            file.flush()
            print(name, row["outcome"], row.get("reason", ""), flush=True)


if __name__ == "__main__":
    main()

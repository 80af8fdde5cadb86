"""Print the runs below a folder as a table: python experiments/table.py runs/digits.

Reads each run's config.yaml and metrics.csv, as the CSV logger left them; a run that was resumed is several folders.
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import yaml

KEYS = ("val/auroc", "test/auroc", "test/auroc_oracle")


def main(runs: Path) -> None:
    """Print one row a run, in the order they were made, and the means."""
    print("| run | data, normal class | method | epochs | AUROC at 0 epochs (DN2) | AUROC at the end |")
    print("|---|---|---|---|---|---|")
    firsts, lasts = [], []
    for folder in sorted(runs.glob("version_*"), key=lambda path: int(path.name.split("_")[1])):
        if not (folder / "metrics.csv").is_file():
            continue
        config = yaml.safe_load((folder / "config.yaml").read_text())
        model, data = config["model"], config["data"]
        with (folder / "metrics.csv").open() as file:
            table = list(csv.DictReader(file))
        key = next((k for k in KEYS if any(row.get(k) for row in table)), None)
        if key is None:
            continue
        rows = [(float(row["epochs_trained"]), float(row[key])) for row in table if row.get(key)]
        first, last = rows[0], rows[-1]
        method = model["class_path"].split(".")[-1] + (" (oracle)" if key.endswith("oracle") else "")
        if method == "PANDA":
            method += " (EWC)" if model["init_args"]["ewc_weight"] else " (Early)"
        dataset = data["class_path"].split(".")[-1]
        start = f"{first[1]:.4f}" if first[0] == 0 else ""
        normal = data["init_args"].get("category") or data["init_args"]["normal_class"]
        print(f"| {folder.name} | {dataset}, {normal} | {method} | {last[0]:g} | {start} | {last[1]:.4f} |")
        firsts.append(first[1])
        lasts.append(last[1])
    if len(lasts) > 1:
        print(f"| | mean of {len(lasts)} | | | {mean(firsts):.4f} | {mean(lasts):.4f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

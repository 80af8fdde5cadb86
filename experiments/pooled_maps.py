"""Where a pooled distance comes from, beside masks: python experiments/pooled_maps.py ROOT NETWORK.

ROOT holds ../shared/data unpacked (mvtec, hyper_kvasir), NETWORK is a folder of weights. Pixel AUROC over all pixels of
the anomalous images: the map of DN2's pooled distance (``maps=True``) beside that of PatchCore and beside a map that
only says how near the middle a pixel is. leather: 4 normal images, 11 defects. polyps: none are normal, so the
50 with the smallest polyps stand for them and the others are scored: a distance to other polyps, not to healthy tissue.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from sklearn.metrics import roc_auc_score

from panda_lightning import DN2, ImageFolder, PatchCore
from panda_lightning.pictures.layout import images_below

SIDE = 224


def mask(path: Path) -> np.ndarray:
    """Anomalous pixels (SIDE, SIDE)."""
    return np.asarray(Image.open(path).convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST)) > 127


def main(root: Path, network: str) -> None:
    """The table."""
    leather = root / "mvtec/leather"
    defects = [p for p in images_below(leather / "test") if p.parent.name != "good"]
    masks = [next((leather / "ground_truth" / p.parent.name).glob(f"{p.stem}_mask.*"), None) for p in defects]
    sets = {"leather": (images_below(leather / "train"), [p for p, m in zip(defects, masks, strict=True) if m],
                        [mask(m) for m in masks if m])}  # fmt: skip
    polyps = images_below(root / "hyper_kvasir/segmented-images/images")
    drawn = [mask(root / "hyper_kvasir/segmented-images/masks" / p.name) for p in polyps]
    order = np.argsort([m.mean() for m in drawn])
    sets["polyps"] = ([polyps[i] for i in order[:50]], [polyps[i] for i in order[50:]], [drawn[i] for i in order[50:]])
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    print(
        "| data | normal, scored images | DN2's parts | DN2's parts, normalised | PatchCore | nearness to the middle |"
    )
    print("|---|---|---|---|---|---|")
    for name, (normal, scored, truth) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            for split, files in (("train", normal), ("test", scored)):
                (Path(folder) / split / "good").mkdir(parents=True)
                for i, file in enumerate(files):
                    (Path(folder) / split / "good" / f"{i}{file.suffix}").symlink_to(file.absolute())
            found = []
            for detector in (DN2(network, k=1), DN2(network, k=1, normalize=True), PatchCore(network, coreset=0.1)):
                trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                                     enable_model_summary=False, default_root_dir=folder)  # fmt: skip
                trainer.test(detector, ImageFolder(folder, image_size=SIDE), verbose=False)
                found.append(detector.score(scored, maps=True).maps)
            found.append(np.broadcast_to(-np.hypot(x, y), (len(scored), SIDE, SIDE)))
            labels = np.stack(truth).ravel()
            aurocs = [f"{roc_auc_score(labels, maps.ravel()):.3f}" for maps in found]
            print(f"| {name} | {len(normal)}, {len(scored)} | {' | '.join(aurocs)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2])

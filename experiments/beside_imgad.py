"""The same images, network and splits with imgad 0.6: python experiments/beside_imgad.py ROOT NETWORK.

Needs `pip install imgad transformers` beside this package. Features are those of its timm extractor, its knn (k = 2,
Euclidean, features of length 1) is fitted on the 599 images that we share between training and calibration, and its
threshold is its own: the .95 quantile of leave-one-out scores. False alarms are counted on the same 500 normal images
of 20 splits (experiments/decisions.py). Seconds: fitting on 599 photographs and scoring 750, each once, from files.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from decisions import ANOMALOUS, HELD, SIDES, TEST, TRAIN, pictures
from imgad import AnomalyDetectionPipeline, build_detector
from imgad.features.timm_models import TimmFeatureExtractor
from PIL import Image
from scipy.stats import betabinom

from panda_lightning import DN2, ImageFolder
from panda_lightning.pictures.layout import images_below


def pipeline(network: str, side: int) -> AnomalyDetectionPipeline:
    """Its nearest counterpart of DN2."""
    view = {"input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    extractor = TimmFeatureExtractor(network, data_config=view, device="cpu")
    return AnomalyDetectionPipeline(extractor, build_detector("knn", k=2, metric="euclidean"))


def false_alarms(root: Path, network: str) -> None:
    """The table of false alarms."""
    print("| data | false alarms at imgad's threshold: mean, least to most | splits in the 99 % band | power |")
    print("|---|---|---|---|")
    for name, side in SIDES.items():
        normal, anomalous = pictures(root, name)
        pipe = pipeline(network, side)
        features = [pipe.extract([Image.fromarray(i) for i in images], show_progress=False)
                    for images in (normal, anomalous)]  # fmt: skip
        false, found = [], []
        for split in range(20):
            rng = np.random.default_rng(split)
            order, others = rng.permutation(len(normal)), rng.permutation(len(anomalous))[:ANOMALOUS]
            own = pipeline(network, side).fit_features(features[0][order[: TRAIN + HELD]])
            false.append(own.predict_features(features[0][order[TRAIN + HELD : TRAIN + HELD + TEST]]).mean())
            found.append(own.predict_features(features[1][others]).mean())
        low, high = betabinom.ppf([0.005, 0.995], TEST, 10, HELD + 1 - 10) / TEST
        within = sum(low <= share <= high for share in false)
        cells = [name, f"{np.mean(false):.3f}, {min(false):.3f} to {max(false):.3f}", f"{within} of 20"]
        print(f"| {' | '.join([*cells, f'{np.mean(found):.3f}'])} |", flush=True)


def seconds(root: Path, network: str) -> None:
    """The table of seconds: medians of three, in turn."""
    files = [p for p in images_below(root / "cats_vs_dogs/PetImages/Cat") if p.stat().st_size]
    train, test = files[:599], files[599:1349]
    found: dict[str, list[tuple[float, float]]] = {"imgad": [], "panda-lightning": []}
    for _ in range(3):
        pipe = pipeline(network, SIDES["cats"])
        start = time.perf_counter()
        pipe.fit([str(p) for p in train], show_progress=False)
        middle = time.perf_counter()
        pipe.predict([str(p) for p in test], show_progress=False)
        found["imgad"].append((middle - start, time.perf_counter() - middle))
        with tempfile.TemporaryDirectory() as folder:
            for split, several in (("train", train), ("test", test[:1])):
                (Path(folder) / split / "good").mkdir(parents=True)
                for file in several:
                    (Path(folder) / split / "good" / file.name).symlink_to(file.absolute())
            start = time.perf_counter()
            detector = DN2(network, normalize=True)
            data = ImageFolder(folder, image_size=SIDES["cats"], calibration_fraction=HELD / (TRAIN + HELD))
            trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                                 enable_model_summary=False, default_root_dir=folder)  # fmt: skip
            trainer.test(detector, data, verbose=False)
            middle = time.perf_counter()
            detector.score(test)
            found["panda-lightning"].append((middle - start, time.perf_counter() - middle))
    print("| | fit on 599 files, s | score 750 files, s |\n|---|---|---|")
    for name, several in found.items():
        fit, score = np.median(several, axis=0)
        print(f"| {name} | {fit:.1f} | {score:.1f} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    false_alarms(Path(sys.argv[1]), sys.argv[2])
    seconds(Path(sys.argv[1]), sys.argv[2])

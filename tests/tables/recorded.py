"""Small rows of tables: words to run, and rows as they would have been recorded, without running anything."""

import json
from dataclasses import asdict

import numpy as np

from panda_lightning.tables.plan import Row
from panda_lightning.tables.rows import Found

WORDS = ["--trainer.max_epochs=2", "--data.image_size=32", "--data.train_limit=40", "--data.test_limit=120"]
METHODS = {"dn2": "dn2", "early": "early", "ses": "ses"}


def row(method="dn2", normal="8", seed=0, data="Digits", shots=None):
    words = ("fit", "--config=digits.yaml", f"--config={method}.yaml", f"--data.normal_class={normal}")
    return Row(data, normal, method, seed, shots, words, f"{abs(hash((data, normal, method, seed, shots))):x}"[:8])


def record(rows, one, score=None, label=None, kind=None, curve=((0, 0.5), (1, 0.6)), error=None, warnings=()):
    """Write a row; its AUROC is that of the curve's end, whatever the scores say."""
    points = [] if error else list(curve)
    kinds = np.array(kind if kind is not None else np.where(label, "other", "own"))
    found = Found(
        one, f"{len(kinds.ravel())} images", points, 1.5, [], "panda-lightning 0, here", error, warnings=list(warnings)
    )
    path = rows.path(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not error:
        np.savez(path.with_suffix(".npz"), index=np.arange(len(score)), score=score, label=label, kind=kinds)
    path.write_text(json.dumps(asdict(found)))
    return found


def drawn(seed=0, images=200, classes=4, gap=1.0):
    """Scores of one class against the rest: kinds (N,), labels (N,), scores (N,)."""
    rng = np.random.default_rng(seed)
    kind = np.array([f"c{i}" for i in range(classes)])[np.arange(images) % classes]
    label = (kind != "c0").astype(np.int64)
    return kind, label, (rng.normal(size=images) + gap * label).astype(np.float32)

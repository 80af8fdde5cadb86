"""One detector and one data module in any order of use give what new objects give, or say in a sentence why not.

PANDA_SEQUENCES=20 drives each detector through so many random sequences; the suite takes two of each.
"""

import os
import random

import pytest
import pytorch_lightning as pl
import torch

import panda_lightning as panda
from panda_lightning import Digits, PandaError
from tests.conftest import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPT = {"backbone": "panda_tiny", "lr": 0.1, "grad_clip": 1.0}
DETECTORS = {
    "DN2": lambda: panda.DN2("panda_tiny", normalize=True),
    "DN2, centroids": lambda: panda.DN2("panda_tiny", centroids=4),
    "PANDA": lambda: panda.PANDA(**ADAPT, fisher="ones", ewc_weight=1.0),
    "MSC": lambda: panda.MSC(**ADAPT),
    "PANDA-OE": lambda: panda.PANDAOE(**ADAPT),
    "Deep SVDD": lambda: panda.DeepSVDD(pretrain_epochs=1, pretrain_milestone=1, lr=1e-3),
    "RotNet": lambda: panda.MultiHeadRotNet(depth=10, width=1),
    "OC-SVM": lambda: panda.OCSVM(),
    "PatchCore": lambda: panda.PatchCore("panda_tiny", coreset=0.5),
    "SPADE": lambda: panda.SPADE("panda_tiny", k=3),
}
SEQUENCES, STEPS = int(os.environ.get("PANDA_SEQUENCES", "2")), 10
VERBS = {  # and how often each is drawn
    "fit": 3, "test": 2, "validate": 1, "predict": 1, "save": 2, "load": 1, "test a checkpoint": 1, "go on": 1,
    "other class": 1, "other size": 1,
}  # fmt: skip


def trainer(folder, epochs=1):
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip


def digits(normal, size, outliers):
    return Digits(
        normal_class=normal, image_size=size, crop="squash", batch_size=5, train_limit=12, test_limit=30,
        outliers=outliers,
    )  # fmt: skip


class Fresh:
    """What new objects give, each computed once: scores after a fit, after a test, after a run that went on."""

    def __init__(self, make, folder, outliers):
        self.make, self.folder, self.outliers, self.known = make, folder, outliers, {}

    def __call__(self, what, where):
        if (what, where) not in self.known:
            pl.seed_everything(0, verbose=False)
            detector, run, path = self.make(), trainer(self.folder), self.folder / f"fresh-{where}.ckpt"
            if what == "test":
                run.test(detector, digits(*where, self.outliers), verbose=False)
            elif what == "fit":
                run.fit(detector, digits(*where, self.outliers))
                run.save_checkpoint(path)
            else:
                self("fit", where)
                trainer(self.folder, 2).fit(detector, digits(*where, self.outliers), ckpt_path=path)
            self.known[what, where] = detector.scores.score
        return self.known[what, where]


class Used:
    """One detector and one data module, and what is known of them: what they hold, and where it came from."""

    def __init__(self, make, folder, fresh):
        pl.seed_everything(0, verbose=False)
        self.detector, self.folder, self.fresh = make(), folder, fresh
        self.data, self.learns = digits("3", 32, fresh.outliers), self.detector.learns
        self.holds = None  # (fit, test or go on; class and size of the data), once there is something
        self.given = False  # from a checkpoint
        self.saved = None  # the path of a checkpoint, what it holds, and whether a run of fit saved it

    @property
    def here(self):
        return self.data.normal_class, self.data.image_size

    def scored(self, verb, path=None):
        """Scores by a run, and what they should be: None where a sentence should come instead."""
        if path is not None:
            self.holds, self.given = self.saved[1], True
        if self.learns or self.given:
            right = self.fresh(*self.holds) if self.holds is not None and self.holds[1] == self.here else None
        else:
            self.holds = ("test", self.here)
            right = self.fresh(*self.holds)
        options = {} if verb == "predict" else {"verbose": False}
        self.run = trainer(self.folder)
        found = getattr(self.run, verb)(self.detector, self.data, ckpt_path=path, **options)
        scores = torch.cat([batch["score"] for batch in found]) if verb == "predict" else self.detector.scores.score
        return scores, right

    def trained(self, epochs, path=None):
        if path is not None:
            self.holds, self.given = self.saved[1], True
            fits = self.holds == ("fit", self.here) and self.saved[2]
            right = self.fresh("go on", self.here) if fits else None
        else:
            self.given, right = False, self.fresh("fit", self.here)
        pl.seed_everything(0, verbose=False)
        self.run = trainer(self.folder, epochs)
        self.run.fit(self.detector, self.data, ckpt_path=path)
        self.holds = ("go on" if path else "fit", self.here)
        return self.detector.scores.score, right

    def step(self, verb):
        """Do one thing; returns scores and what they should be, or nothing where nothing is scored."""
        if verb == "fit" and self.learns:
            return self.trained(1)
        if verb == "go on" and self.learns and self.saved and self.saved[1][0] == "fit":
            return self.trained(2, self.saved[0])
        if verb in ("test", "validate", "predict"):
            return self.scored(verb)
        if verb == "test a checkpoint" and self.saved:
            return self.scored("test", self.saved[0])
        if verb == "load" and self.saved:
            self.detector = type(self.detector).load_from_checkpoint(self.saved[0])
            self.holds, self.given = self.saved[1], True
        elif verb == "save" and self.holds is not None and self.run.lightning_module is self.detector:
            path = self.folder / f"{random.random()}.ckpt"
            self.run.save_checkpoint(path)
            self.saved = (path, self.holds, self.run.state.fn == "fit")
        elif verb == "other class":
            self.data.normal_class = "8" if self.data.normal_class == "3" else "3"
        elif verb == "other size":
            self.data.image_size = 96 - self.data.image_size
        return None


def attempted(used, verb):
    """What a step gave, and the sentence by which it was refused, one of the two at most."""
    holds, given = used.holds, used.given
    try:
        return used.step(verb), None
    except PandaError as error:
        if not used.given:
            used.holds, used.given = holds, given
        return None, str(error)


@pytest.mark.parametrize("name", DETECTORS)
def test_any_order_of_use_gives_what_new_objects_give(name, tmp_path):
    make_folder(tmp_path / "others", train=0, normal=0, anomalous=9)
    outliers = str(tmp_path / "others") if name == "PANDA-OE" else None
    fresh = Fresh(DETECTORS[name], tmp_path, outliers)
    compared = 0
    for sequence in range(SEQUENCES):
        draw = random.Random(f"{name} {sequence}")
        used, done = Used(DETECTORS[name], tmp_path, fresh), []
        while len(done) < STEPS:
            verbs = {verb: n for verb, n in VERBS.items() if used.learns or verb not in ("fit", "go on")}
            done += draw.choices(list(verbs), verbs.values())
            found, sentence = attempted(used, done[-1])
            if sentence is not None:
                no_run = done[-1] == "go on" and not used.saved[2]
                assert used.holds is None or used.holds[1] != used.here or no_run, (done, sentence)
                assert "\n" not in sentence
            elif found is not None:
                scores, right = found
                assert right is not None, (done, "should have been refused")
                scale = float(right.abs().max())
                torch.testing.assert_close(scores, right, rtol=1e-4, atol=1e-4 * scale, msg=f"{sequence}: {done}")
                compared += 1
    assert compared > SEQUENCES

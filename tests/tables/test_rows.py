"""Tables of runs: the numbers of separate runs, each once, whatever happens in between."""

import errno
import json
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from panda_lightning import Digits, PandaError
from panda_lightning.cli import run as command
from panda_lightning.tables.plan import planned
from panda_lightning.tables.rows import Rows
from panda_lightning.tables.scorings import OtherScorings
from panda_lightning.types import UnwritableError
from tests import copies
from tests.tables.recorded import METHODS, WORDS

pytestmark = pytest.mark.usefixtures("one_thread")


def curves(folder):
    return {found.row.name: (found.curve, found.error) for found in Rows(Path(folder)).read()}


def test_rows_are_those_of_separate_runs_in_any_order(study, workdir):
    made = [found for _, found in Rows(workdir / "one").make(study)]
    assert [found.error for found in made] == [None] * 6
    list(Rows(workdir / "other").make(study[::-1]))
    assert curves("one") == curves("other")
    for row, found in list(zip(study, made, strict=True))[3:]:
        logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir=alone/{row.name}"]
        cli = command([*row.words, *logger, "--trainer.enable_progress_bar=false"])
        kept = Rows(workdir / "one").scores(row)
        if row.method != "ses":
            np.testing.assert_array_equal(kept["score"], cli.model.scores.score.numpy())
        assert found.auroc == pytest.approx(roc_auc_score(kept["label"], kept["score"]), abs=1e-12)
        assert len(found.curve) == (1 if row.method == "dn2" else 3)


def test_what_is_there_is_not_run_again(study, workdir):
    rows = Rows(workdir / "table")
    first = next(iter(rows.make(study)))[1]
    found = {row.name: one for row, one in Rows(workdir / "table").make(study)}
    assert first is not None
    assert found[study[0].name] is None
    assert None not in [found[row.name] for row in study[1:]]


def make(folder):
    plan = planned(["digits.yaml"], METHODS, ["8", "9"], [0], WORDS)
    list(Rows(Path(folder)).make(plan))


def test_kills_at_any_moment_leave_the_table_of_an_undisturbed_run(study, workdir):
    make("table")
    for wait in (1.0, 3.0, 120.0):
        process = copies.started(make, "killed")
        process.join(timeout=wait)
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert curves("killed") == curves("table")
    for row in study:
        one, other = (Rows(workdir / folder).scores(row) for folder in ("killed", "table"))
        np.testing.assert_array_equal(one["score"], other["score"])


def test_a_row_of_a_later_class_goes_on_from_its_own_checkpoint(study, workdir):
    table, early = Rows(workdir / "table"), [row for row in study if row.method == "early"]
    first = [found for _, found in table.make(early)]
    table.path(early[1]).unlink()
    (again,) = (found for _, found in Rows(workdir / "table").make(early) if found)
    assert again.curve == first[1].curve
    runs = workdir / "table/runs" / early[1].name
    assert "Restor" in (runs / "log.txt").read_text()
    told = torch.load(next(runs.glob("version_0/checkpoints/*.ckpt")), weights_only=True)
    assert str(told["datamodule_hyper_parameters"]["normal_class"]) == "9"


@pytest.mark.parametrize("code", [143, 1, 75])
def test_a_signal_or_ctrl_c_is_no_failed_row(study, workdir, monkeypatch, code):
    def stopped(*_):
        raise SystemExit(code)

    with monkeypatch.context() as patch:
        patch.setattr("panda_lightning.tables.rows.run", stopped)
        with pytest.raises(SystemExit):
            list(Rows(workdir / "table").make(study[:1]))
    assert not list((workdir / "table/rows").glob("*.json"))
    (workdir / "table/runs" / study[0].name / "seconds.txt").write_text("100.0")
    found = next(iter(Rows(workdir / "table").make(study[:1])))[1]
    assert found.error is None
    assert found.seconds > 100


def test_two_processes_share_the_work_of_a_folder(study, workdir):
    first, second = Rows(workdir / "table").make(study), Rows(workdir / "table").make(study)
    iterator = iter(first)
    begin = time.monotonic()
    made = [next(iterator)]  # holds no lock between rows
    made += [*second, *iterator]
    assert sum(found is not None for _, found in made) == len(study)
    assert time.monotonic() - begin < 120
    assert len(list((workdir / "table/rows").glob("*.json"))) == len(study)


def test_rows_made_two_at_a_time_are_the_same(study, workdir):
    list(Rows(workdir / "one").make(study))
    made = dict(Rows(workdir / "two").make(study, jobs=2))
    assert set(made) == set(study)
    assert all(found.row == row for row, found in made.items())
    assert curves("one") == curves("two")
    assert [found for _, found in Rows(workdir / "two").make(study, jobs=2)] == [None] * 6


SCORINGS = {name: f"{name.split()[0]}{' --model.normalize=true' * name.endswith('n')}"
            for name in ("early", "early n", "ses", "ses n")}  # fmt: skip


def trained(folder):
    """The rows that had a run of their own."""
    return {path.name.rsplit("-", 2)[0] for path in Path(folder, "runs").iterdir()}


def test_rows_that_differ_in_scoring_alone_are_trained_once(study, workdir):
    words = [*WORDS, "--trainer.num_sanity_val_steps=1"]  # which is no validation of any curve
    plan = planned(["digits.yaml"], SCORINGS, ["8"], [0], words)
    made = dict(Rows(workdir / "table").make(plan))
    assert set(made) == set(plan)
    assert trained("table") == {"Digits-8-early", "Digits-8-ses"}
    for row in plan:
        list(Rows(workdir / "alone").make([row]))
        one, other = (Rows(workdir / folder).scores(row) for folder in ("table", "alone"))
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])
    assert trained("alone") == {"Digits-8-early", "Digits-8-early-n", "Digits-8-ses", "Digits-8-ses-n"}
    assert curves("table") == curves("alone")
    assert made[plan[0]].auroc != made[plan[1]].auroc
    assert all(found.seconds > 0 for found in made.values())


def test_a_value_that_is_none_is_refused_by_a_run_of_its_own(study, workdir):
    plan = planned(["digits.yaml"], {"early": "early", "no": "early --model.normalize=maybe"}, ["8"], [0], WORDS)
    early, wrong = (found for _, found in Rows(workdir / "table").make(plan))
    assert early.error is None
    assert "normalize" in wrong.error


def test_a_run_that_scores_for_others_goes_on(study, workdir, monkeypatch):
    plan = planned(["digits.yaml"], SCORINGS, ["8"], [0], WORDS)[2:]
    whole, asked = Rows(workdir / "whole"), []
    list(whole.make(plan))
    scored = OtherScorings.on_validation_epoch_end

    def stopped(self, trainer, detector):
        asked.append(detector.epochs_trained)
        if asked == [0, 1, 2]:
            raise SystemExit(143)
        scored(self, trainer, detector)

    monkeypatch.setattr(OtherScorings, "on_validation_epoch_end", stopped)
    with pytest.raises(SystemExit):
        list(Rows(workdir / "table").make(plan))
    made = dict(Rows(workdir / "table").make(plan))
    assert asked == [0, 1, 2, 2]
    assert [made[row].curve for row in plan] == [found.curve for found in whole.read()]


def test_a_run_that_never_scored_for_others_leaves_them_to_themselves(study, workdir, monkeypatch):
    plan = planned(["digits.yaml"], SCORINGS, ["8"], [0], WORDS)[:2]
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "_keep", lambda *_: sys.exit(143))
        with pytest.raises(SystemExit):
            list(Rows(workdir / "table").make(plan[:1]))  # its last checkpoint is there
    made = dict(Rows(workdir / "table").make(plan))
    list(Rows(workdir / "alone").make(plan[1:]))
    assert trained("table") == {"Digits-8-early", "Digits-8-early-n"}
    assert made[plan[1]].curve == Rows(workdir / "alone").read()[0].curve


@pytest.mark.parametrize("kind", ["stops", "own", "msc"])
def test_what_may_look_at_scores_is_trained_for_each_scoring(study, workdir, monkeypatch, kind):
    monkeypatch.syspath_prepend(str(workdir))
    (workdir / "own_norm.py").write_text(
        "from panda_lightning import PANDA\n\n\nclass OwnNorm(PANDA):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return super().training_step(batch, batch_idx) * (3 if self.normalize else 1)\n"
    )
    stopping = "{class_path: EarlyStopping, init_args: {monitor: val/auroc, mode: max, patience: 1}}"
    (workdir / "stops.yaml").write_text(
        f"model: {{class_path: PANDA, init_args: {{ewc_weight: 0}}}}\ntrainer: {{callbacks+: [{stopping}]}}\n"
    )
    (workdir / "own.yaml").write_text("model: {class_path: own_norm.OwnNorm, init_args: {ewc_weight: 0}}\n")
    variant = kind if kind == "msc" else f"{kind}.yaml"
    methods = {"plain": variant, "normalised": f"{variant} --model.normalize=true"}
    made = dict(Rows(workdir / "table").make(planned(["digits.yaml"], methods, ["8"], [0], WORDS)))
    assert trained("table") == {"Digits-8-plain", "Digits-8-normalised"}
    errors = [found.error for found in made.values()]
    assert errors[0] is None
    assert (errors[1] is None) == (kind != "msc")  # which has no such argument


def test_rows_say_what_made_them(study, workdir):
    list(Rows(workdir / "table").make(study[:1]))
    known = json.loads(next((workdir / "table/rows").glob("*.json")).read_text())
    assert known["row"]["words"][0] == "test"
    assert known["made"].startswith("panda-lightning")
    assert "torch" in known["made"]
    assert time.strftime("%Y-") in known["made"]


def test_each_row_keeps_its_warnings(study, workdir):
    plan = planned(["digits.yaml"], {"early": "early"}, ["8"], [0, 1], [*WORDS, "--model.grad_clip=1e-9"])
    list(Rows(workdir / "table").make(plan))
    for found in Rows(workdir / "table").read():
        assert [said.partition(":")[0] for said in found.warnings] == ["Training changed almost nothing"]


def test_images_are_decoded_and_pass_the_frozen_layers_once(study, workdir):
    plan = planned(["digits.yaml"], METHODS, ["8", "9"], [0, 1], WORDS)
    list(Rows(workdir / "table").make(plan))
    work = [work for one in Rows(workdir / "table").read() for work in one.work]
    counts = {(verb, what): [w.images for w in work if (w.verb, w.what) == (verb, what)] for verb, what, *_ in work}
    assert counts["decoded", "test"] == [120]
    assert counts["decoded", "normal training"] == [40, 40]
    passed = "passed through the frozen layers"
    assert counts[passed, "test"] == [120, 120]  # DN2's whole network, and the layers that PANDA does not adapt
    assert counts[passed, "normal training"] == [40] * 4


def test_kinds_and_pictures_are_those_of_the_images(study, workdir):
    rows = Rows(workdir / "table")
    list(rows.make(study[:1]))
    kept, hard = rows.scores(study[0]), rows.hardest(study[0])
    targets = Digits(normal_class=8, test_limit=120).test_images.targets
    assert kept["kind"].tolist() == [str(target) for target in targets]
    order = np.argsort(kept["score"], kind="stable")
    missed = [place for place in order if kept["label"][place] == 1][:6]
    alarms = [place for place in order[::-1] if kept["label"][place] == 0][:6]
    assert hard["place"].tolist() == missed + alarms
    assert all(Image.open(BytesIO(jpeg)).size == (32, 32) for jpeg in hard["jpeg"])


def test_two_devices_make_the_rows_of_one(study, workdir):
    one, two = Rows(workdir / "one"), Rows(workdir / "two")
    several = [
        replace(row, words=(*row.words, "--trainer.accelerator=cpu", "--trainer.devices=2")) for row in study[4:5]
    ]
    list(one.make(study[4:5]))
    made = [found for _, found in two.make(several)]
    assert [found.error for found in made] == [None]
    assert [found.row for found in made] == several
    for row in study[4:5]:
        np.testing.assert_allclose(two.scores(row)["score"], one.scores(row)["score"], rtol=1e-4)
    (early,) = made
    np.testing.assert_allclose(early.curve, {f.row.name: f for f in one.read()}[early.row.name].curve, atol=1e-3)
    assert [found for _, found in two.make(several)] == [None]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free disk space, and run the same command again"),
        (UnwritableError("the checkpoint x could not be written"), "the checkpoint x could not be written"),
    ],
)
def test_a_full_disk_ends_the_table_and_is_no_failed_row(study, workdir, monkeypatch, error, said):
    def full(*_):
        raise error

    monkeypatch.setattr("panda_lightning.tables.rows.run", full)
    with pytest.raises(PandaError, match=said):
        list(Rows(workdir / "table").make(study))
    assert not list((workdir / "table/rows").glob("*"))


def test_a_curve_whose_last_line_was_cut_off_goes_on(study, workdir):
    rows, early = Rows(workdir / "table"), study[4]
    ((_, found),) = rows.make([early])
    (log,) = (workdir / "table/runs" / early.name).glob("version_*/metrics.csv")
    log.write_bytes(log.read_bytes()[:-20])
    (log.parent.parent / "version_1000").mkdir()
    (log.parent.parent / "version_1000/metrics.csv").touch()
    rows.path(early).unlink()
    ((_, again),) = rows.make([early])
    assert (again.curve, again.error) == (found.curve, None)


def test_a_run_without_an_auroc_has_failed(study, workdir, monkeypatch):
    monkeypatch.setattr("panda_lightning.detectors.base.Detector.log", lambda *_, **__: None)  # a user's own, perhaps
    ((_, found),) = Rows(workdir / "table").make([study[3]])
    assert found.error == "the run has given no AUROC: let it validate, on normal and anomalous images."

"""Tables of runs: the numbers of separate runs, each once, whatever happens in between."""

import csv
import errno
import json
import os
import shlex
import signal
import subprocess
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
from panda_lightning.runtime.work import Work
from panda_lightning.tools import main
from panda_lightning.tools.plan import planned, spread
from panda_lightning.tools.rows import Found, Rows, made
from panda_lightning.tools.table import Expected

HOME = Path(__file__).parents[2]
WORDS = ["--trainer.max_epochs=2", "--data.image_size=32", "--data.train_limit=40", "--data.test_limit=120"]
METHODS = {"dn2": "dn2", "early": "early", "ses": "ses"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def study(workdir):
    """Digits with the bundled network; a variant that fails beside the real ones."""
    for name in ("digits.yaml", "variants"):
        (workdir / name).symlink_to(HOME / "conf" / name)
    (workdir / "wrong.yaml").write_text("model: {class_path: DN2, init_args: {k: 4000}}\n")
    return planned(["digits.yaml"], METHODS, ["8", "9"], [0], WORDS)


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


def test_a_run_that_fails_is_a_row_and_the_others_go_on(study, workdir, capsys):
    words = ["table", "--config=digits.yaml", "--methods=wrong.yaml,dn2", "--classes=9", f"--words={' '.join(WORDS)}",
             "--folder=table"]  # fmt: skip
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "Digits, 9, wrong, seed 0: failed (k=4000 neighbours, but there are" in out
    assert "| 9 | " in out
    rows = {row["method"]: row for row in csv.DictReader((workdir / "table/table.csv").read_text().splitlines())}
    assert rows["wrong"]["auroc"] == ""
    assert rows["wrong"]["error"].startswith("k=4000 neighbours")
    assert 0.5 < float(rows["dn2"]["low"]) < float(rows["dn2"]["auroc"]) < float(rows["dn2"]["high"]) < 1
    assert main(words) == 1  # neither is run again
    assert "seed 0: failed" not in capsys.readouterr().out.split("Failed:")[0]
    assert main([*words, "--again=true"]) == 1
    assert "wrong, seed 0: failed" in capsys.readouterr().out


def test_a_table_says_means_differences_and_what_is_missing(study, workdir, capsys):
    words = ["table", "--config=digits.yaml", "--methods=dn2,early", "--classes=8,9", f"--words={' '.join(WORDS)}"]
    assert main([*words, "--folder=a", "--shard=1/2"]) == 0
    half = capsys.readouterr().out
    assert "| dn2 | 1 of 2 |" in half
    assert "| 9 | not run | not run |" in half
    assert "- dn2; early: `panda table --config=digits.yaml --methods=dn2,early --classes=9 " in half
    assert main([*words, "--folder=b", "--shard=2/2"]) == 0
    capsys.readouterr()
    assert main(["table", "--merge=a,b", "--folder=both"]) == 0
    merged = capsys.readouterr().out
    assert main([*words, "--folder=whole"]) == 0
    tables = [sorted(csv.DictReader(Path(f, "table.csv").read_text().splitlines()), key=str) for f in ("both", "whole")]
    for one, other in zip(*tables, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    aurocs = [float(row["auroc"]) for row in tables[0] if row["method"] == "dn2"]
    assert f"| dn2 | 2 | {100 * np.mean(aurocs):.2f} [" in merged
    assert "| dn2 - early |" in merged


def test_kills_at_any_moment_leave_the_table_of_an_undisturbed_run(study, workdir):
    code = (
        "import sys; from pathlib import Path; from panda_lightning.tools.rows import Rows\n"
        "from panda_lightning.tools.plan import planned\n"
        f"plan = planned(['digits.yaml'], {METHODS!r}, ['8', '9'], [0], {WORDS!r})\n"
        "list(Rows(Path('killed')).make(plan)); print('DONE')\n"
    )
    list(Rows(workdir / "table").make(study))
    for wait in (5.0, 7.0, 120.0):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            out, _ = process.communicate()
        if b"DONE" in out:
            break
    assert b"DONE" in out
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
        patch.setattr("panda_lightning.tools.rows.run", stopped)
        with pytest.raises(SystemExit):
            list(Rows(workdir / "table").make(study[:1]))
    assert not list((workdir / "table/rows").glob("*.json"))
    assert next(iter(Rows(workdir / "table").make(study[:1])))[1].error is None


def test_two_processes_share_the_work_of_a_folder(study, workdir):
    first, second = Rows(workdir / "table").make(study), Rows(workdir / "table").make(study)
    iterator = iter(first)
    begin = time.monotonic()
    made = [next(iterator)]  # holds no lock between rows
    made += [*second, *iterator]
    assert sum(found is not None for _, found in made) == len(study)
    assert time.monotonic() - begin < 120
    assert len(list((workdir / "table/rows").glob("*.json"))) == len(study)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--config is missing"),
        (("--config=nothing.yaml",), "nothing.yaml cannot be read as a configuration"),
        (
            ("--config=digits.yaml", "--methods=other"),
            "there is no variants/other.yaml: choose a variant (deep_svdd, dn2",
        ),
        (("--config=digits.yaml", "--methods="), "--methods is empty"),
        (("--config=digits.yaml", "--words=--a='b"), "cannot be split into words"),
        (("--config=digits.yaml", '--methods={"": "dn2"}'), "has no name"),
        (("--config=digits.yaml", "--folder=digits.yaml"), "--folder=digits.yaml is a file"),
        (("--config=digits.yaml", "--methods=dn2,dn2"), "the method dn2 is named twice"),
        (("--config=digits.yaml", "--seeds=a"), "--seeds=a are not whole numbers"),
        (("--config=digits.yaml", "--shard=3/2"), "--shard=3/2 is no part"),
        (("--merge=x",), "--merge needs --folder"),
        (("--config=digits.yaml", "--loggers=Wandb"), "--loggers=Wandb is no logger: choose from"),
        (("--config=digits.yaml", "--loggers=CometLogger"), "CometLogger needs the package comet_ml"),
        (("--merge=x", "--folder=y"), "x has no rows"),
    ],
)
def test_what_is_not_possible_ends_in_a_sentence(study, words, said):
    with pytest.raises(SystemExit) as ended:
        main(["table", *words])
    assert said in str(ended.value.code)


def test_shards_are_a_partition(study):
    parts = [spread(study, f"{i}/4") for i in range(1, 5)]
    assert sorted(row.name for part in parts for row in part) == sorted(row.name for row in study)
    with pytest.raises(PandaError, match="is no part"):
        spread(study, "0/4")


def test_rows_say_what_made_them(study, workdir):
    list(Rows(workdir / "table").make(study[:1]))
    known = json.loads(next((workdir / "table/rows").glob("*.json")).read_text())
    assert known["row"]["words"][0] == "test"
    assert known["made"].startswith("panda-lightning")
    assert "torch" in known["made"]
    assert time.strftime("%Y-") in known["made"]


def table(folder, *words):
    """A table of small digits runs; its lines by method, class and seed."""
    status = main(["table", *words, f"--folder={folder}"])
    lines = list(csv.DictReader((Path(folder) / "table.csv").read_text().splitlines()))
    return status, {(line["method"], line["normal_class"], line["seed"], line["shots"]): line for line in lines}


def test_a_study_names_methods_and_what_follows_it_counts(study, workdir, capsys):
    (workdir / "study.yaml").write_text(
        f"config: digits.yaml\nclasses: [8, 9]\nwords: {' '.join(WORDS)}\nfolder: table\n"
        "methods: {raw: dn2, unit length: dn2 --model.normalize=true}\n"
    )
    status, lines = table("table", "--study=study.yaml", "--classes=9")
    assert status == 0
    assert {key[:2] for key in lines} == {("raw", "9"), ("unit length", "9")}
    assert lines["raw", "9", "0", ""]["auroc"] != lines["unit length", "9", "0", ""]["auroc"]
    capsys.readouterr()
    status, lines = table("table", "--study=study.yaml", "--run=false")
    said = capsys.readouterr().out
    assert len(lines) == 2
    assert "| 8 | not run | not run |" in said
    assert "- raw; unit length: `panda table --study=study.yaml --classes=8`" in said
    for name in ("table.md", "table.tex", "table.html"):
        assert "unit length" in (workdir / "table" / name).read_text()


def test_few_shots_are_drawn_by_seed_and_scored_on_all_test_images(study, workdir):
    words = [
        "--config=digits.yaml",
        "--classes=9",
        "--shots=1,4",
        "--seeds=0,1",
        f"--words={' '.join(WORDS[:2] + WORDS[3:])}",
    ]
    status, lines = table("table", *words)
    assert status == 0
    assert {key[3] for key in lines} == {"1", "4"}
    aurocs = [float(line["auroc"]) for line in lines.values()]
    assert len(set(aurocs)) == 4
    listed = Rows(workdir / "table").read()
    assert all(len(Rows(workdir / "table").scores(one.row)["score"]) == 120 for one in listed)
    digits = Digits(normal_class=9, shots=4, seed=1)
    fewer = Digits(normal_class=9, shots=1, seed=1)
    assert set(fewer.normal_images.rows) < set(digits.normal_images.rows)
    assert set(digits.normal_images.rows) != set(Digits(normal_class=9, shots=4).normal_images.rows)
    with pytest.raises(PandaError, match="shots=900"):
        _ = Digits(normal_class=9, shots=900).normal_images


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


def test_what_is_said_of_time_is_by_kind_of_work(study):
    def found(row, seconds, work=()):
        return Found(row, 0.9, [(0, 0.9)], seconds, list(work), made())

    plan = planned(["digits.yaml"], {"dn2": "dn2", "early": "early"}, ["7", "8", "9"], [0, 1], WORDS)
    first = found(plan[0], 30.0, [Work("passed", "test", 100, 20.0), Work("passed", "normal training", 50, 8.0)])
    expected = Expected([first])
    assert expected.seconds(plan[4]) == 10.0  # another class: its own images pass too, test images do not
    assert expected.seconds(plan[2]) == 2.0  # another seed: nothing passes
    assert expected.seconds(plan[1]) is None
    assert expected.left(plan[1:]) == (26.0, ["early"])  # 2 + 10 + 2 + 10 + 2
    expected.known.append(found(plan[1], 60.0))
    assert expected.left(plan[2:]) == (326.0, [])
    assert Expected([replace(first, made="elsewhere")]).seconds(plan[4]) is None


def test_the_command_that_is_printed_makes_the_table(study, workdir, capsys):
    """Of all that was given, with no more methods and classes than are lacking."""
    (workdir / "study.yaml").write_text(
        "config: digits.yaml\nclasses: [8, 9]\nfolder: table\nseeds: [0, 1]\n"
        "methods: {raw: dn2, 'unit, length': dn2 --model.normalize=true}\n"
    )
    words = ["table", "--study=study.yaml", "--seeds=3", "--shots=4,8", f"--words={' '.join(WORDS)}", "--run=false"]
    rows = Rows(workdir / "table")
    columns = {f"{name}, {shots}-shot" for name in ("raw", "unit, length") for shots in (4, 8)}
    for names in (columns, {name for name in columns if name.startswith("unit")}):
        for one in rows.read():
            if one.row.column in names:
                rows.path(one.row).unlink()
        assert main(words) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("- ") and "`panda" in line)
        assert all(name in line.partition("`")[0] for name in names)
        assert main(shlex.split(line.partition("`")[2].rstrip("`"))[1:]) == 0
        made = {(one.row.normal, one.row.column, one.row.seed) for one in rows.read()}
        assert made == {(normal, name, 3) for normal in "89" for name in columns}
        capsys.readouterr()


def test_a_mean_is_over_runs_of_one_setting(study, workdir):
    words = ["table", "--config=digits.yaml", "--methods=dn2"]
    assert main([*words, "--classes=8", "--folder=a", f"--words={' '.join(WORDS)}"]) == 0
    assert main([*words, "--classes=9", "--folder=b", f"--words={' '.join(WORDS)} --model.k=3"]) == 0
    with pytest.raises(SystemExit) as ended:
        main(["table", "--merge=a,b", "--folder=both"])
    assert "dn2 was run on Digits with two settings" in str(ended.value.code)
    assert not (workdir / "both").exists()


def test_failed_rows_are_merged_and_run_again_elsewhere(study, workdir, capsys):
    words = ["table", "--config=digits.yaml", "--methods=wrong.yaml,dn2", "--classes=9", f"--words={' '.join(WORDS)}"]
    assert main([*words, "--folder=a"]) == 1
    assert "| wrong | 0 of 1 | failed |" in capsys.readouterr().out
    assert main(["table", "--merge=a", "--folder=both"]) == 1
    assert "| wrong | 0 of 1 | failed |" in capsys.readouterr().out
    assert main(["table", "--merge=a", "--folder=both"]) == 1


def test_a_row_that_was_damaged_is_named(study, workdir):
    words = ["table", "--config=digits.yaml", "--classes=9", f"--words={' '.join(WORDS)}", "--folder=a"]
    assert main(words) == 0
    (path,) = (workdir / "a/rows").glob("*.json")
    whole = path.read_text()
    path.write_text(whole[:100])
    for part, said in ((path, "is no row of a table"), (path.with_suffix(".npz"), "has lost its scores")):
        path.write_text(whole[:100] if part == path else whole)
        part.unlink() if part != path else None
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert said in str(ended.value.code)
        assert path.name in str(ended.value.code)


def test_a_table_that_is_stopped_says_that_it_goes_on(study, workdir, monkeypatch, capsys):
    words = ["table", "--config=digits.yaml", "--classes=9", f"--words={' '.join(WORDS)}", "--folder=a"]
    for code, status in ((1, 130), (75, 75), (143, 143)):

        def stopped(*_, code=code):
            raise SystemExit(code)

        with monkeypatch.context() as patch:
            patch.setattr("panda_lightning.tools.rows.run", stopped)
            with pytest.raises(SystemExit) as ended:
                main(words)
        assert ended.value.code == status
        assert "Stopped with 0 of 1 rows: the same command goes on from here." in capsys.readouterr().out


def test_a_full_disk_ends_the_table_and_is_no_failed_row(study, workdir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("panda_lightning.tools.rows.run", full)
    with pytest.raises(PandaError, match="Make room, and run the same command again"):
        list(Rows(workdir / "table").make(study))
    assert not list((workdir / "table/rows").glob("*"))

"""The command that makes a table: what it accepts, prints and writes."""

import csv
import gc
import shlex
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from panda_lightning import Digits, PandaError
from panda_lightning.runtime.work import Work
from panda_lightning.tables.plan import planned
from panda_lightning.tables.rows import Found, Rows, made
from panda_lightning.tools import main
from panda_lightning.tools.table import Expected
from tests.tables.recorded import WORDS

pytestmark = pytest.mark.usefixtures("one_thread")


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
    tables = [
        sorted(csv.DictReader(Path(f, "table.csv").read_text("utf-8").splitlines()), key=str) for f in ("both", "whole")
    ]
    for one, other in zip(*tables, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    aurocs = [float(row["auroc"]) for row in tables[0] if row["method"] == "dn2"]
    assert f"| dn2 | 2 | {100 * np.mean(aurocs):.2f} [" in merged
    assert "| dn2 - early |" in merged


def test_the_processes_of_a_table_end_with_it(study, workdir, capsys):
    gc.disable()  # not when Python happens to find garbage
    try:
        words = ["--config=digits.yaml", "--methods=dn2", "--classes=8,9", "--jobs=2", "--folder=a"]
        assert main(["table", *words, f"--words={' '.join(WORDS)}"]) == 0
        assert not active_children()
    finally:
        gc.enable()
    assert capsys.readouterr().out.count("Digits, ") == 2


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
        (("--config=digits.yaml", "--shard=3/2"), "--shard=3/2 is not a part"),
        (
            ("--config=digits.yaml", "--methods={a: dn2, b: early --model.ewc_wieght=3}"),
            "b cannot run: Option 'ewc_wieght' is not accepted. Accepted are backbone",
        ),
        (("--config=digits.yaml", "--methods={a: dn2, b: dn2 --model.k=0}"), "b cannot run: k=0 is not allowed"),
        (
            ("--config=digits.yaml", "--words=--trainer.fast_dev_run=true"),
            "fast_dev_run and limit_val_batches=0 leave no",
        ),
        (("--config=digits.yaml", "--methods=early", "--words=--trainer.limit_val_batches=0"), "leave no AUROC"),
        (("--merge=x",), "--merge needs --folder"),
        (("--config=digits.yaml", "--loggers=Wandb"), "--loggers=Wandb is not a logger: choose from"),
        (("--config=digits.yaml", "--loggers=CSVLogger"), "CSVLogger is not needed: each run is logged to CSV"),
        (("--config=digits.yaml", "--loggers=CometLogger"), "CometLogger needs the package comet_ml"),
        (("--merge=x", "--folder=y"), "x has no rows"),
    ],
)
def test_what_is_not_possible_ends_in_a_sentence(study, words, said):
    with pytest.raises(SystemExit) as ended:
        main(["table", *words])
    assert said in str(ended.value.code)
    assert not list(Path().glob("**/rows"))  # before the first run


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


def test_what_is_said_of_time_is_by_kind_of_work(study):
    def found(row, seconds, work=()):
        return Found(row, "", [(0, 0.9)], seconds, list(work), made())

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


def test_a_row_that_was_made_with_another_file_is_refused(study, workdir):
    (workdir / "out.txt").write_text("")
    words = ["table", "--config=digits.yaml", "--methods=dn2", "--folder=a"]
    words += [f"--words={' '.join(WORDS)} --data.leave_out=out.txt"]
    assert main([*words, "--classes=9"]) == 0
    assert main([*words, "--classes=9"]) == 0
    (workdir / "out.txt").write_text("# none\n")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--classes=8,9"])
    assert "out.txt has changed since a/rows/Digits-9-dn2-0-" in str(ended.value.code)
    (workdir / "out.txt").unlink()
    assert main([*words, "--classes=9"]) == 0


def test_one_image_of_a_kind_is_enough_for_a_table(study, workdir, capsys):
    words = " ".join([*WORDS, "--data.test_limit=10"])
    status, lines = table("a", "--config=digits.yaml", "--methods=dn2,early", "--classes=9", f"--words={words}")
    assert status == 0
    for line in lines.values():
        assert (line["low"], line["high"], line["reliable"]) == ("0.0", "1.0", "False")
    assert "[-100.00, +100.00] (!) | 1 |" in capsys.readouterr().out


def test_a_row_that_was_damaged_is_named(study, workdir):
    words = ["table", "--config=digits.yaml", "--classes=9", f"--words={' '.join(WORDS)}", "--folder=a"]
    assert main(words) == 0
    (path,) = (workdir / "a/rows").glob("*.json")
    whole = path.read_text()
    path.write_text(whole[:100])
    for part, said in ((path, "is not a row of a table"), (path.with_suffix(".npz"), "has no scores any more")):
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
            patch.setattr("panda_lightning.tables.rows.run", stopped)
            with pytest.raises(SystemExit) as ended:
                main(words)
        assert ended.value.code == status
        assert "Stopped with 0 of 1 rows: run the same command to continue." in capsys.readouterr().out

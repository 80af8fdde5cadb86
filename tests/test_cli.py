"""The command line as a user calls it, in this process."""

import csv
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache

from panda_lightning import CIFAR10, PANDA, ImageFolder
from panda_lightning.arguments import subclasses
from panda_lightning.cli import main
from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.pictures.view import View
from panda_lightning.tools import main as panda
from panda_lightning.tools import table
from tests.conftest import fast, make_clouds, make_folder
from tests.datamodules import official
from tests.windows import WINDOWS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "conf").glob("*.yaml") if not p.stem.startswith("pretrain"))
VARIANTS = sorted((ROOT / "conf/variants").glob("*.yaml"))

# What makes a shipped config small enough for a test; everything else of it stays.
TINY = {
    "digits": ["--data.train_limit=9", "--data.test_limit=30"],
    "folder": ["--data.root=images", "--model.backbone=panda_tiny", "--data.image_size=32", "--data.normal_class=spot"],
}
SMALL = ["--data.root=official", "--model.backbone=panda_tiny", "--data.image_size=32"]  # the others
MORE = {
    "dior": ["--data.min_side=20", "--data.min_count=2"],
    "hyper_kvasir": ["--data.test_normals=4"],
}
FREE = ("dn2", "ocsvm", "spade", "patchcore")  # nothing to train
PIXELS = ("deep_svdd", "mhrot", "ocsvm")  # their image size is part of the method
QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve(folder: Path, key: str = "val/auroc") -> list[tuple[float, float]]:
    return [(float(r["epochs_trained"]), float(r[key])) for r in rows(folder / "metrics.csv") if r.get(key)]


# every configuration alone and with a quarter of the variants, every variant with a quarter of the configurations; what
# all pairs say is compared below
PAIRS = [(c, None) for c in CONFIGS] + [(c, v) for i, c in enumerate(CONFIGS) for j, v in enumerate(VARIANTS)
                                        if (i + j) % 4 == 0]  # fmt: skip


@pytest.mark.parametrize(("config", "variant"), PAIRS, ids=lambda path: path.stem if path else "plain")
def test_every_shipped_config_runs(config, variant, run, workdir):
    official.make_everything(workdir / "official")
    make_folder(workdir / "images")
    make_clouds(workdir / "clouds", 6)
    name = variant.stem if variant else "plain"
    trains = name not in FREE and (name, config.stem) != ("plain", "mvtec")
    words = ["fit" if trains else "test", f"--config={config}", *([f"--config={variant}"] if variant else [])]
    words += [
        *QUICK,
        *TINY.get(config.stem, SMALL),
        *MORE.get(config.stem, []),
        *(["--trainer.max_epochs=1"] if trains else []),
        *(["--data.outliers=clouds"] if name == "oe" else []),
        *(["--model.depth=10", "--model.width=1"] if name == "mhrot" else []),
        *(["--model.backbone=panda_tiny"] if name in ("spade", "patchcore") else []),
        *(["--model.k=2"] if name == "spade" or (name, config.stem) == ("plain", "mvtec") else []),
    ]
    words = [w for w in words if name not in PIXELS or not w.startswith(("--data.image_size", "--model.backbone"))]
    out = run(*words)
    folder = workdir / "runs" / config.stem / "version_0"
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert list((workdir / "runs/wandb").glob("offline-run-*/*.wandb"))
    if trains:
        start = [] if name in (*PIXELS, "oe") else [0.0]
        key = "val/auroc_autoencoder" if name == "deep_svdd" else "val/auroc"  # one epoch is the autoencoder's
        assert [x for x, _ in curve(folder, key)] == [*start, 1.0]
        assert "oracle" in out


SGD = {"momentum": 0.9, "weight_decay": 5e-5, "adapt_stages": 2}
PUBLISHED = {  # max_epochs, batch size, image size, arguments of the detector: ../shared/protocol.md, sections 1 and 4
    "dn2": (None, None, None, {"class": "DN2", "k": 2, "normalize": False}),
    "early": (15, None, None, {"class": "PANDA", "k": 2, "ewc_weight": 0, "lr": 1e-2, "grad_clip": 1e-3, **SGD}),
    "ses": (15, None, None, {"class": "PANDA", "k": 2, "ewc_weight": 0, "lr": 1e-2, "grad_clip": 1e-3, **SGD}),
    "ewc": (50, None, None, {"class": "PANDA", "k": 2, "ewc_weight": 1e4, "lr": 1e-2, "grad_clip": 1e-3, **SGD}),
    "oe": (50, None, None, {"class": "PANDAOE", "lr": 0.1, "grad_clip": 1e-3, **SGD, "weight_decay": 0}),
    "msc": (
        20, 64, None,
        {"class": "MSC", "k": 2, "lr": 1e-5, "grad_clip": None, "temperature": 0.25, "angular": False, **SGD,
         "momentum": 0},
    ),
    "deep_svdd": (
        500, 200, 32,
        {"class": "DeepSVDD", "boundary": "hard", "nu": 0.1, "warm_up": 10, "pretrain_epochs": 350,
         "pretrain_milestone": 250, "milestone": 50, "lr": 1e-4, "weight_decay": 5e-7},
    ),
    "mhrot": (
        200, 128, 32,
        {"class": "MultiHeadRotNet", "depth": 16, "width": 4, "dropout": 0.3, "lr": 0.1, "momentum": 0.9,
         "weight_decay": 5e-4},
    ),
    "spade": (
        None, None, None,
        {"class": "SPADE", "backbone": "wide_resnet50_2.tv_in1k", "k": 50, "levels": [1, 2, 3], "sigma": 4.0},
    ),
    "patchcore": (
        None, None, None,
        {"class": "PatchCore", "backbone": "wide_resnet50_2.tv_in1k", "coreset": 0.1, "levels": [2, 3], "sigma": 4.0},
    ),
    "ocsvm": (
        None, None, 32, {"class": "OCSVM", "inputs": "pixels_pca", "nu": 0.1, "gamma": "scale", "select": "none"},
    ),
}  # fmt: skip


def printed(run, capsys, *words):
    with pytest.raises(SystemExit):
        run("fit", *words, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_variants_give_the_published_values_and_nothing_leaks(config, run, workdir, capsys):
    """Effective values of every config with every variant; what the variant does not name is the config's own."""
    assert {path.stem for path in VARIANTS} == set(PUBLISHED)
    alone = printed(run, capsys, f"--config={config}")
    for variant in VARIANTS:
        epochs, batch, size, published = PUBLISHED[variant.stem]
        merged = printed(run, capsys, f"--config={config}", f"--config={variant}")
        model, data = merged["model"], merged["data"]["init_args"]
        arguments = {"class": model["class_path"].split(".")[-1], **model["init_args"]}
        assert {key: arguments[key] for key in published} == published, variant.stem
        own = "panda_tiny" if config.stem == "digits" else "resnet152.tv_in1k"
        own = published.get("backbone", own)
        assert arguments.get("backbone", own) == own
        expected = dict(alone["data"]["init_args"])
        expected |= {"batch_size": batch} if batch else {}
        expected |= {"image_size": size, "crop": "squash"} if size else {}
        assert data == expected, variant.stem
        trainer = alone["trainer"] | ({"max_epochs": epochs} if epochs else {})
        callbacks = [c["class_path"].split(".")[-1] for c in merged["trainer"]["callbacks"]]
        assert callbacks == ["ModelCheckpoint", *(["SampleWiseEarlyStopping"] if variant.stem == "ses" else [])]
        assert merged["trainer"] | {"callbacks": None} == trainer | {"callbacks": None}, variant.stem


STUDIES = {path.stem: path for path in (ROOT / "experiments/studies/published").glob("*.yaml")}


ASKED = [
    (name, text.split()[0]) for name, path in STUDIES.items()
    for text in yaml.safe_load(path.read_text())["methods"].values()
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), ASKED)
def test_the_published_studies_have_the_papers_settings(name, method, run, capsys, monkeypatch):
    """All classes of each study, and the effective values of the first."""
    assert set(STUDIES) == {path.stem for path in CONFIGS} - {"digits", "folder"}
    assert {method for _, method in ASKED} == set(PUBLISHED)
    monkeypatch.chdir(ROOT)
    parser = OneSentenceParser()
    table.arguments(parser)
    plan = table.plan_of(parser.parse_args([f"--study={STUDIES[name]}", "--words=--data.root=D"]))
    rows = [row for row in plan if row.variant == method]
    kind = {cls.__name__: cls for cls in subclasses(AnomalyDataModule)}[rows[0].data]
    assert [row.normal for row in rows] == list(kind.problems()[1])
    assert {row.words[0] for row in rows} == {"test" if method in FREE else "fit"}
    merged = printed(run, capsys, *rows[0].words[1:])
    epochs, batch, size, published = PUBLISHED[method]
    arguments = {"class": merged["model"]["class_path"].split(".")[-1], **merged["model"]["init_args"]}
    told = [word.split("=")[0].removeprefix("--model.") for word in rows[0].words]  # OC-SVM's oracle
    published = {key: value for key, value in published.items() if key not in told}
    assert {key: arguments[key] for key in published} == published
    assert arguments.get("backbone", "resnet152.tv_in1k") == published.get("backbone", "resnet152.tv_in1k")
    data = merged["data"]["init_args"]
    crop = "squash" if size else "center"
    assert (data["root"], data["batch_size"]) == ("D", batch or 32)
    view = kind(**{key: data[key] for key in ("image_size", "crop", "resize")}).view
    own = next((int(w.split("=")[1]) for w in rows[0].words if w.startswith("--data.image_size")), size or 224)
    assert (view.size, view.crop) == (own, crop)
    assert data[kind.problems()[0]] in (rows[0].normal, int(rows[0].normal) if rows[0].normal.isdecimal() else None)
    assert method in FREE or merged["trainer"]["max_epochs"] == epochs


def test_the_published_data_settings_are_the_defaults(run, workdir, capsys):
    data = printed(run, capsys, f"--config={ROOT}/conf/cifar10.yaml")["data"]["init_args"]
    assert data["batch_size"] == 32
    view = CIFAR10(**{key: data[key] for key in ("image_size", "crop", "resize", "interpolation")}).view
    assert view == View(224, "center", 256, "bilinear")  # and the network's own interpolation where it has another


def test_fit_then_test_without_training_images_then_resume(run, workdir):
    folder = make_folder(workdir / "images")
    run("fit", *fast(folder, epochs=4), "--model.grad_clip=10", "--ckpt_path=last")  # there is none: from the start
    run("fit", *fast(folder, epochs=2), "--model.grad_clip=10")
    last = workdir / "runs/t/version_1/checkpoints/last.ckpt"

    (folder / "train").rename(workdir / "hidden")
    run("test", *fast(folder), f"--ckpt_path={last}")
    assert curve(workdir / "runs/t/version_2", "test/auroc") == [curve(workdir / "runs/t/version_1")[-1]]

    (workdir / "hidden").rename(folder / "train")
    broken = workdir / "runs/t/version_2/checkpoints/last.ckpt"
    broken.parent.mkdir()
    broken.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="version_2.*is broken .* and is skipped"):
        out = run("fit", *fast(folder, epochs=4), "--model.grad_clip=10", "--ckpt_path=last")
    whole = curve(workdir / "runs/t/version_0")
    assert curve(workdir / "runs/t/version_3") == whole  # what the earlier run logged stands there too
    assert [x for x, _ in whole] == [0, 1, 2, 3, 4]
    for epoch in range(5):  # the table of the resumed run has the whole curve
        assert f"\n {epoch:7d} " in out
    one, two = (torch.load(workdir / f"runs/t/version_{v}/checkpoints/last.ckpt", weights_only=True) for v in (0, 3))
    for name in one["state_dict"].keys() - {"_extra_state"}:
        value = one["state_dict"][name]
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("logger", "place"),
    [
        (["--trainer.logger=false"], "checkpoints"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x", "--trainer.logger.version=mine"], "x/*/mine"),
        ([], "lightning_logs/version_0"),
    ],
)
def test_last_is_found_whatever_the_logger(run, workdir, caplog, logger, place):
    folder = make_folder(workdir / "images")
    caplog.set_level("INFO")
    for epochs in (1, 2):
        words = [word for word in fast(folder, epochs=epochs) if not word.startswith("--trainer.logger")]
        run("fit", *words, *logger, "--ckpt_path=last")
        if epochs == 1:
            assert "there is no checkpoint of this configuration yet" in caplog.text
            (path,) = workdir.glob(f"{place}/**/last.ckpt")
    assert f"ckpt_path=last: {path.relative_to(workdir)}" in caplog.text


def test_last_has_the_seed_that_is_asked_for(run, workdir, caplog):
    words = ["fit", *fast(make_folder(workdir / "images"), epochs=1), "--ckpt_path=last"]
    caplog.set_level("INFO")
    run(*words, "--seed_everything=1")
    for seed, said in (
        ("2", "last.ckpt has other settings: seed_everything 2, not 1"),
        ("1", "ckpt_path=last: runs/t/version_0/"),
        ("true", "ckpt_path=last: runs/t/version_"),
    ):
        caplog.clear()
        run(*words, f"--seed_everything={seed}")
        assert said in caplog.text


def test_spawned_processes_are_refused(run, workdir):
    folder = make_folder(workdir / "images")
    with pytest.raises(SystemExit, match="cannot hand its classes to spawned processes: set trainer.strategy=ddp"):
        run("fit", *fast(folder), "--trainer.strategy=ddp_spawn", "--trainer.devices=2")


def test_loose_images_may_be_named_before_the_checkpoint(run, workdir):
    folder = make_folder(workdir / "images")
    run("fit", *fast(folder, epochs=1))
    last = "runs/t/version_0/checkpoints/last.ckpt"
    for words in ([f"--ckpt_path={last}"], ["--ckpt_path", last]):
        run("predict", "--data.images", str(folder / "test"), *words)
    assert len(list(workdir.glob("**/predictions.csv"))) == 2


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_dn2_is_saved_and_tested_again_without_images(run, workdir, verb):
    folder = make_folder(workdir / "images")
    run(verb, *fast(folder, model="DN2"))
    shutil.rmtree(folder / "train")
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    run("test", *fast(folder, model="DN2"), f"--ckpt_path={last}")
    run("validate", *fast(folder, model="DN2"), f"--ckpt_path={last}")
    expected = curve(workdir / "runs/t/version_0", "test/auroc" if verb == "test" else "val/auroc")
    assert curve(workdir / "runs/t/version_1", "test/auroc") == expected
    assert curve(workdir / "runs/t/version_2") == expected


def test_a_second_run_into_the_same_folder_is_no_clash(run, workdir):
    folder = make_folder(workdir / "images")
    words = [w for w in fast(folder, epochs=1) if "trainer.logger" not in w]
    csv_logger = "{class_path: CSVLogger, init_args: {save_dir: runs, name: t, version: 0}}"
    logger = f"--trainer.logger=[{csv_logger}, AutoWandbLogger]"
    for _ in range(2):
        run("fit", *words, logger, "--model.ewc_weight=0")
    assert (workdir / "runs/t/version_0/config.yaml").is_file()


@pytest.mark.skipif(WINDOWS, reason="a shell script")
def test_a_run_in_its_folder_goes_on_under_the_same_id(run, workdir):
    import wandb

    folder = make_folder(workdir / "images")
    make = ["sh", str(ROOT / "experiments/cluster/run_folder.sh"), "runs/panda-7", "2"]
    own = [w for w in fast(folder, epochs=2) if "trainer.logger" not in w and "trainer.callbacks" not in w]
    for epochs in (1, 2):
        words = subprocess.run(make, check=True, capture_output=True, text=True).stdout.split()
        run("fit", *words, *own, "--model.ewc_weight=0", f"--trainer.max_epochs={epochs}")
        wandb.finish()
    assert curve(workdir / "runs/panda-7/version_0")[-1][0] == 1
    assert [epoch for epoch, _ in curve(workdir / "runs/panda-7/version_1")] == [0, 1, 2]
    # the file's name, not its folder's: that of a second run within a second ends in -1
    pieces = [piece.name for piece in (workdir / "runs/panda-7/wandb").glob("offline-run-*/run-*.wandb")]
    assert pieces == ["run-runs-panda-7.wandb"] * 2


def test_a_run_that_was_killed_when_all_was_done_has_the_whole_curve_again(run, folder, workdir):
    words = ["fit", *fast(folder, epochs=2), "--model.ewc_weight=0", "--ckpt_path=last"]
    run(*words)
    run(*words)
    first, second = (workdir / f"runs/t/version_{n}" for n in (0, 1))
    assert [epoch for epoch, _ in curve(first)] == [0, 1, 2]
    assert curve(second) == curve(first)


def test_a_run_that_ends_before_it_begins_leaves_no_log_folder(run, folder, workdir):
    for words in (["--model.backbone=nowhere"], ["--data.root=nowhere"], ["--data.train_limit=1"]):
        with pytest.raises(SystemExit):
            run("fit", *fast(folder), *words)
        assert not list((workdir / "runs").rglob("version_*"))
    run("fit", *fast(folder, epochs=1), "--model.ewc_weight=0")
    assert (workdir / "runs/t/version_0/metrics.csv").is_file()


# ---- a run's own config.yaml ----

VERBS = ("fit", "validate", "test", "predict")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run of each verb, fit's one that went on from an earlier checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = fast(make_folder(folder / "images"), epochs=1)
        words += ["--model.ewc_weight=0", f"--trainer.logger.save_dir={folder}"]
        main(["fit", *words, "--trainer.logger.name=before"])
        last = f"--ckpt_path={folder}/before/version_0/checkpoints/last.ckpt"
        for verb in VERBS:
            main([verb, *words, f"--trainer.logger.name={verb}", last])
    return folder


@pytest.mark.parametrize("writer", VERBS)
@pytest.mark.parametrize("reader", VERBS)
def test_the_config_of_a_run_serves_every_verb(runs, run, writer, reader):
    config = runs / writer / "version_0/config.yaml"
    last = runs / "before/version_0/checkpoints/last.ckpt"
    # the checkpoint that was scored stands in the file; the one that training went on from does not, see below
    words = [f"--ckpt_path={last}"] if writer == "fit" else []
    before = len(list((runs / writer).iterdir()))
    run(reader, f"--config={config}", *words)
    made = runs / writer / f"version_{before}"
    expected = curve(runs / "before/version_0")
    if reader == "predict":
        assert len(rows(made / "predictions.csv")) == 13
    else:
        assert curve(made, "test/auroc" if reader == "test" else "val/auroc")[-1] == expected[-1]
    written = yaml.safe_load((made / "config.yaml").read_text())
    assert written["ckpt_path"] == (None if reader == "fit" else str(last))


def test_the_config_of_a_fit_that_went_on_names_no_checkpoint(runs, run, capsys):
    """Else its test would score the checkpoint that the run went on from, as if it were what came out of the run."""
    assert yaml.safe_load((runs / "fit/version_0/config.yaml").read_text())["ckpt_path"] is None
    said = refusal(run, capsys, "test", f"--config={runs}/fit/version_0/config.yaml")
    assert "is untrained" in said
    assert "give ckpt_path" in said


@pytest.mark.parametrize(
    ("verb", "text", "flags", "sentence"),
    [
        ("fit", "verbos: true", [], "does not accept option 'verbos'"),
        ("predict", "trainerr: {max_epochs: 3}", [], "does not accept option 'trainerr"),
        ("fit", "trainer: {verbose: true}", [], "verbose"),
        ("fit", "verbose: true", ["--verbose=true"], "unrecognized arguments: --verbose"),
        ("test", "verbose: true", ["--return_predictions=true"], "unrecognized arguments: --return_predictions"),
        ("test", "verbose: maybe", [], "verbose"),  # its own key
    ],
)
def test_what_no_verb_knows_is_refused(folder, run, capsys, workdir, verb, text, flags, sentence):
    (workdir / "c.yaml").write_text(text)
    assert sentence in refusal(run, capsys, verb, "--config=c.yaml", *fast(folder, model="DN2"), *flags)


def test_a_configuration_before_the_verb_is_refused_not_ignored(runs, run, capsys):
    said = refusal(run, capsys, f"--config={runs}/test/version_0/config.yaml", "test")
    assert "is not accepted before subcommand 'test'" in said


def test_check_data_reads_the_config_of_a_run(runs, workdir):
    for verb in VERBS:
        assert panda(["check-data", f"--config={runs}/{verb}/version_0/config.yaml"]) == 0


# ---- the home folder ----


@pytest.fixture
def home(workdir, monkeypatch):
    """A home folder beside the current one."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(workdir / "home"))
    (workdir / "home").mkdir()
    return workdir / "home"


def test_a_tilde_is_the_home_folder_in_files_and_flags(home, run, capsys, workdir):
    make_folder(home / "images")
    shutil.copytree(ROOT / "src/panda_lightning/weights/panda_tiny", home / "weights")
    words = [w for w in fast(home / "images", epochs=1) if "logger" not in w and "root" not in w]
    (home / "c.yaml").write_text(
        "trainer:\n  logger:\n  - {class_path: CSVLogger, init_args: {save_dir: ~/runs, name: t}}\n"
        "data: {class_path: ImageFolder, init_args: {root: ~/images}}\n"
    )
    words += ["--model.backbone=local-dir:~/weights", "--model.prefix_cache_dir=~/cache"]
    run("fit", "--config=~/c.yaml", *words)
    last = "runs/t/version_0/checkpoints/last.ckpt"
    assert (home / last).is_file()
    assert list((home / "cache").iterdir())
    run("test", "-c", "~/c.yaml", *words, f"--ckpt_path=~/{last}", "--data.root=~/images")
    kept = yaml.safe_load((home / "runs/t/version_1/config.yaml").read_text())
    assert kept["ckpt_path"] == str(home / last)
    assert kept["data"]["init_args"]["root"] == str(home / "images")
    for words, sentence in (
        (["--model=PANDAOE", "--data.outliers=CIFAR100:~/nowhere"], f"{home}/nowhere"),
        (["--model.fisher=~/nowhere"], f"fisher={home}/nowhere"),
        (["--model.weights=~/nowhere"], f"{home}/nowhere"),
        (["--ckpt_path=~/nowhere"], f"ckpt_path={home}/nowhere"),
    ):
        assert sentence in refusal(run, capsys, "fit", "--config=~/c.yaml", *fast(home / "images", epochs=1), *words)
    assert not (workdir / "~").exists()


def test_a_tilde_is_the_home_folder_for_the_tools(home, capsys):
    make_folder(home / "images")
    (home / "c.yaml").write_text("data: {class_path: ImageFolder, init_args: {root: ~/images, normal_class: spot}}\n")
    assert panda(["check-data", "--config=~/c.yaml", "--output=~/sheet.png"]) == 0
    assert (home / "sheet.png").is_file()
    words = ["--backbone=panda_tiny", "--data=~/images", "--image_size=32", "--output=~/fisher.safetensors"]
    assert panda(["fisher", "--labels=sampled", *words]) == 0
    assert (home / "fisher.safetensors").is_file()


# ---- help, loggers ----


@pytest.mark.parametrize("verb", [None, *VERBS])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_names_detectors_and_data_sets_first(run, capsys, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        run(*([verb] if verb else []), "--help")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()[:18]
    assert max(map(len, lines)) <= columns
    text = " ".join(" ".join(lines).split())
    for name in ("DN2", "PANDA", "PatchCore", "CIFAR10", "ImageFolder"):
        assert re.search(rf"\b{name}[,.]", text), text
    assert "Detector," not in text  # nor what cannot be chosen
    assert lines.index("  lightning fit --data ImageFolder --data.root data/bottles \\") < 16
    if verb:
        assert text.startswith(f"usage: lightning [options] {verb} [--config FILE] [--KEY VALUE ...] ")


def test_the_example_of_the_help_runs(run, workdir, capsys):
    make_folder(workdir / "data/bottles")
    with pytest.raises(SystemExit):
        run("fit", "--help")
    told = re.search(r"^  lightning (fit.*\\\n.*)", capsys.readouterr().out, re.MULTILINE).group(1)
    words = shlex.split(told.replace("\\\n", "").replace("max_epochs 9", "max_epochs 1"))
    run(*words, "--data.image_size=32", "--data.normal_class=spot", *QUICK)


@pytest.mark.parametrize(
    ("logger", "flags", "package"),
    [
        ("TensorBoardLogger", {"lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE": "tensorboard",
                               "lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE": "tensorboardX"},
         "tensorboard"),
        ("MLFlowLogger", {"pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE": "mlflow"}, "mlflow"),
        ("CometLogger", {"pytorch_lightning.loggers.comet._COMET_AVAILABLE": "comet-ml"}, "comet-ml"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_a_logger_without_its_package_is_said_before_work(run, capsys, monkeypatch, logger, flags, package, alone):
    for flag, name in flags.items():
        monkeypatch.setattr(flag, RequirementCache(f"{name}>=999999"))
    words = [w for w in fast(Path("/nonexistent")) if "trainer.logger" not in w]
    args = "{save_dir: runs}" if logger == "TensorBoardLogger" else "{}"
    one = f"{{class_path: {logger}, init_args: {args}}}"
    both = f"[{{class_path: CSVLogger, init_args: {{save_dir: runs}}}}, {one}]"
    said = refusal(run, capsys, "fit", *words, f"--trainer.logger={one if alone else both}")
    assert said == (
        f"error: {logger} needs the package {package}, which is not installed: `pip install {package}`, or choose "
        "another logger, such as CSVLogger."
    )


def test_the_advice_about_several_loggers_can_be_followed(run, capsys, folder, workdir):
    one = "{class_path: CSVLogger, init_args: {save_dir: a}}"
    words = [w for w in fast(folder, model="DN2") if "trainer.logger" not in w] + [f"--trainer.logger=[{one}, {one}]"]
    said = refusal(run, capsys, "test", *words, "--trainer.logger.save_dir=runs")
    advice = re.search("as in (.*), or", said).group(1).split()
    run("test", *words, *advice)
    assert (workdir / "runs/lightning_logs/version_0/metrics.csv").is_file()


def test_an_unknown_logger_is_met_with_the_known_ones(run, capsys, folder):
    said = refusal(run, capsys, "fit", *fast(folder), "--trainer.logger=TensorBordLogger")
    assert re.search("Available are the loggers AutoWandbLogger, CSVLogger, .* and the callbacks .*EarlyStopping", said)
    assert "detectors" not in said


# ---- bad input: one clear sentence, exit status not 0, no traceback ----


def refusal(run, capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    text = capsys.readouterr()
    assert stop.value.code not in (0, None)
    said = stop.value.code if isinstance(stop.value.code, str) else text.err
    assert "Traceback" not in text.err + text.out
    assert "usage:" not in text.err
    return said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.normal_class=circle"], r"normal_class=circle is not a class of ImageFolder \(0-1: spot, stripe\)"),
        (["--data.normal_class=stripe"], "no training images of the normal class stripe"),
        (["--data.train_limit=1"], "a single training image of the normal class spot"),
        (["--data.root=/nonexistent"], "there are no images in /nonexistent: expected"),
        (["--data.image_size=16"], "image_size=16 is smaller than the stride of resnet10t: choose 32 or more"),
        (["--model.k=12"], "k=12 neighbours, but there are 11 normal training images: choose 1 to 11"),
        (["--model.lr=1e30", "--model.grad_clip=1e30"], "loss became NaN or infinite at batch|NaN or infinite"),
        (["--model.kk=3"], "Option 'kk' is not accepted"),
        (["--model.backbone=resnet20x"], "backbone=resnet20x cannot be loaded"),
        (["--model.fisher=/nonexistent"], "fisher=/nonexistent is neither a file"),
        (["--ckpt_path=/nonexistent.ckpt"], "ckpt_path=/nonexistent.ckpt is not a file"),
        (["--trainer.gradient_clip_val=1"], "set model.grad_clip"),
        (["--data.resize=3"], "resize=3 is smaller than image_size=32"),
        (["--model.adapt_stages=0"], "adapt_stages=0 is not allowed: choose a whole number, 1 or more"),
        (["--model.schedule=soon"], r"expected float, or one of \['published'\]. Got value: soon"),
        (["--data.crop=centre"], r"expected one of \['center', 'squash', 'none'\]. Got value: centre"),
        (["--model=PANDAA"], "PANDAA. Available are the detectors .*DN2, .*PANDA.* and the data sets .*CIFAR10"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_input_ends_in_a_sentence(run, capsys, folder, words, sentence):
    said = refusal(run, capsys, "fit", *fast(folder), *words)
    assert re.search(sentence, said), said


def test_a_typo_in_a_config_file_is_named(run, capsys, workdir):
    text = (ROOT / "conf/digits.yaml").read_text().replace("image_size", "image_sise")
    (workdir / "typo.yaml").write_text(text)
    assert "image_sise" in refusal(run, capsys, "fit", "--config=typo.yaml")


def test_unreadable_images_are_named_or_skipped(run, capsys, folder):
    (folder / "train/spot/999.png").write_bytes(b"")
    words = ["fit", *fast(folder, epochs=1), "--model.ewc_weight=0"]
    assert "999.png (empty file)" in refusal(run, capsys, *words)
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read and are left out"):
        run(*words, "--data.on_error=skip")


def test_fit_with_a_training_free_method_points_to_test(run, capsys, folder):
    assert "run `lightning test`" in refusal(run, capsys, "fit", *fast(folder, model="DN2"))


def test_a_flag_that_contradicts_the_checkpoint_is_an_error(run, capsys, folder, workdir):
    words = [*fast(folder, model="DN2")]
    run("test", *words)
    last = "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt"
    said = refusal(run, capsys, "test", *words, "--model.k=3", last)
    assert "was made with settings other than these (model.k 3, not 2): leave them out" in said
    run("test", *words, "--model.k=2", last)  # the same value is no contradiction
    run("test", *words, "--model.index_backend=torch", "--model.optimize=plain", last)  # nor is how to compute
    words = [word.replace("class=spot", "class=stripe") for word in words]
    said = refusal(run, capsys, "test", *words, last)
    assert "made with data or arguments other than these (normal_class=stripe, not spot): use the old ones" in said


def test_last_is_the_newest_of_this_very_configuration(run, workdir, caplog):
    folder = make_folder(workdir / "images")
    caplog.set_level("INFO")
    early, ewc = ([*fast(folder, epochs=1), f"--model.ewc_weight={weight}"] for weight in (0, 5))
    run("fit", *early)
    run("fit", *ewc, "--ckpt_path=last")  # starts anew, for the other is a PANDA-Early
    assert "no checkpoint of this configuration yet (runs/t/version_0" in caplog.text
    assert "model.ewc_weight 0.0, not 5.0" in caplog.text.replace("5.0, not 0.0", "0.0, not 5.0")
    run("fit", *[word.replace("epochs=1", "epochs=2") for word in early], "--ckpt_path=last")
    assert [x for x, _ in curve(workdir / "runs/t/version_2")] == [0, 1, 2]
    kept = torch.load(workdir / "runs/t/version_2/checkpoints/last.ckpt", weights_only=True)
    assert kept["state_dict"]["_extra_state"]["derived"]["fisher"] is None
    other = [word.replace("class=spot", "class=stripe") for word in fast(make_folder(workdir / "images"), epochs=1)]
    make_stripes = workdir / "images/train/stripe"
    shutil.copytree(workdir / "images/test/stripe", make_stripes)
    caplog.clear()
    run("fit", *other, "--model.ewc_weight=0", "--ckpt_path=last")
    assert "data.normal_class stripe, not spot" in caplog.text


def test_last_of_a_method_is_no_other_methods(run, workdir, caplog):
    folder = make_folder(workdir / "images")
    caplog.set_level("INFO")
    run("test", *fast(folder, model="DN2"))
    run("test", *fast(folder, model="PatchCore"))
    run("test", *fast(folder, model="DN2"), "--ckpt_path=last")
    assert "ckpt_path=last: runs/t/version_0/checkpoints/last.ckpt" in caplog.text
    scores = [curve(workdir / f"runs/t/version_{n}", "test/auroc") for n in (0, 2)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model=PatchCore"], "model PatchCore, not PANDA"),
        (["--config=mine.yaml"], "model.k 7, not 2"),  # a file is asked for as much as a flag
        (["--data.image_size=64"], "image_size=64, not 32"),
        (["--data.crop=center"], "crop=center, not squash"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_contradicts_the_checkpoint_is_refused_by_every_verb(run, capsys, workdir, words, sentence):
    folder = make_folder(workdir / "images")
    (workdir / "mine.yaml").write_text("model:\n  class_path: PANDA\n  init_args: {k: 7}\n")
    run("fit", *fast(folder, epochs=1))
    last = "--ckpt_path=runs/t/version_0/checkpoints/last.ckpt"
    for verb in ("test", "predict", "fit"):
        assert sentence in refusal(run, capsys, verb, *fast(folder, epochs=2), *words, last)


def test_an_option_before_its_class_is_refused_with_what_to_do(run, capsys):
    said = refusal(run, capsys, "fit", "--data.root=images", f"--config={ROOT / 'conf/folder.yaml'}")
    assert "Option 'root' is not accepted. Put --config FILE, or --data CLASS" in said


def test_a_checkpoint_made_in_python_serves_the_command_line(run, workdir):
    folder = make_folder(workdir / "images")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    detector = PANDA("panda_tiny", ewc_weight=0, k=3, grad_clip=10.0)
    trainer.fit(detector, ImageFolder(root=str(folder), normal_class="spot", image_size=32, crop="squash"))
    trainer.save_checkpoint("python.ckpt")
    run("predict", *fast(folder), "--ckpt_path=python.ckpt")  # k is the checkpoint's, since nobody asks for another
    found = [float(row["score"]) for row in rows(workdir / "runs/t/version_0/predictions.csv")]
    assert found == pytest.approx(detector.scores.score.tolist(), rel=1e-5)

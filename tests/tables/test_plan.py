"""Rows of a table: which there are, in what order, and by what words."""

import shlex
from pathlib import Path

import pytest
import yaml

from panda_lightning import CIFAR10, CIFAR100, DIOR, CatsVsDogs, Digits, FashionMNIST, HyperKvasir, MVTecAD, PandaError
from panda_lightning.tables.plan import Row, planned, spread

HOME = Path(__file__).parents[2]
DIGITS = [str(HOME / "conf/digits.yaml")]


def rows(methods, classes=("8", "9"), seeds=(0,), words=(), shots=(None,), configs=DIGITS):
    return planned(configs, methods, classes, seeds, words, shots)


def test_published_means_are_over_these_classes():
    kinds = {
        CIFAR10: 10,
        CIFAR100: 20,
        FashionMNIST: 10,
        CatsVsDogs: 2,
        DIOR: 19,
        HyperKvasir: 1,
        MVTecAD: 15,
        Digits: 10,
    }
    assert {kind: len(kind.problems()[1]) for kind in kinds} == kinds
    assert {kind.problems()[0] for kind in kinds} == {"normal_class", "category"}
    plan = planned([str(HOME / "conf/mvtec.yaml")], {"spade": "spade"}, None, [0])
    assert [row.normal for row in plan] == list(MVTecAD.problems()[1])
    assert "--data.category=cable" in plan[1].words


def test_methods_that_see_the_same_come_together_class_by_class():
    other = "dn2 --data.image_size=32"
    plan = rows({"a": "dn2", "small": other, "b": "early", "svdd": "deep_svdd"}, seeds=(0, 1))
    order = [(row.normal, row.method, row.seed) for row in plan]
    assert order[:4] == [("8", "a", 0), ("8", "b", 0), ("8", "a", 1), ("8", "b", 1)]
    assert order[4:8] == [("9", "a", 0), ("9", "b", 0), ("9", "a", 1), ("9", "b", 1)]
    assert {method for _, method, _ in order[8:12]} == {"small"}


def test_a_methods_own_words_override_those_of_all():
    (row,) = rows({"x": "dn2 --model.k 3"}, classes=("9",), seeds=(4,), words=("--data.root", "D", "--model.k=5"))
    assert row.words[0] == "test"
    assert row.words[-6:] == (
        "--data.root=D", "--model.k=5", "--model.k=3", "--data.normal_class=9", "--seed_everything=4", "--data.seed=4",
    )  # fmt: skip
    assert row.variant == "dn2"
    assert shlex.split(row.command)[:2] == ["lightning", "test"]
    assert shlex.split(row.command)[2].startswith("--config=")  # whose path may hold spaces
    assert Row.of(row.as_json()) == row


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--data.seed=1"], "--data.seed is set by the table \\(--seeds\\)"),
     (["--data.normal_class", "3"], "--data.normal_class is set by the table \\(--classes\\)"),
     (["--data.class_path=CIFAR10"], "set by the table"), (["--trainer.logger=x"], "set by the table \\(--loggers\\)"),
     (["--ckpt_path=last"], "rows go on by themselves"), (["x"], "'x' is not an option"),
     (["--model.k"], "is not an option")],
)  # fmt: skip
def test_words_that_the_table_sets_are_refused(words, said):
    with pytest.raises(PandaError, match=said):
        rows({"dn2": "dn2"}, words=words)
    with pytest.raises(PandaError, match=said):
        rows({"dn2": " ".join(["dn2", *words])})


def test_classes_are_known_by_name_and_number():
    config = [str(HOME / "conf/cifar10.yaml")]
    assert [row.normal for row in rows({"dn2": "dn2"}, ("0", "truck"), configs=config)] == ["airplane", "truck"]
    assert [row.normal for row in rows({"dn2": "dn2"}, ("7", "0"))] == ["7", "0"]
    with pytest.raises(PandaError, match="names airplane twice"):
        rows({"dn2": "dn2"}, ("0", "airplane"), configs=config)
    with pytest.raises(PandaError, match="names 11, zebra, but CIFAR10 has airplane, .*: choose from these"):
        rows({"dn2": "dn2"}, ("0", "11", "zebra"), configs=config)


@pytest.mark.parametrize("words", [("--model.normalize=yes",), ("--model.init_args.normalize=true",),
                                   ("--model", "{class_path: PANDA, init_args: {normalize: true}}")])  # fmt: skip
def test_rows_that_say_otherwise_how_they_score_are_trained_alone(words):
    scorings = {"a": "early", "b": "early --model.normalize=true", "c": "early --model.normalize_loss=true"}
    a, b, c = rows(scorings, classes=("9",))
    assert a.training == b.training != c.training
    a, b, c = rows(scorings, classes=("9",), words=words)
    assert len({a.training, b.training, c.training}) == 3


def test_where_files_are_does_not_make_another_row():
    one, other = (rows({"dn2": "dn2"}, words=(f"--data.root={root}",))[0] for root in "AB")
    assert one.name == other.name
    assert one.words != other.words


def test_few_shots_have_no_more_neighbours_than_images(tmp_path):
    base = yaml.safe_load(Path(DIGITS[0]).read_text(encoding="utf-8"))
    base["model"]["init_args"]["k"] = 5
    (tmp_path / "five.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "variants").symlink_to(HOME / "conf/variants")
    for configs, least in ((DIGITS, 2), ([str(tmp_path / "five.yaml")], 5)):
        one, four, many = rows({"dn2": "dn2"}, classes=("9",), shots=(1, 4, 16), configs=configs)
        assert "--model.k=1" in one.words
        assert ("--model.k=4" in four.words) == (least == 5)
        assert not any(word.startswith("--model.k") for word in many.words)
        assert [row.column for row in (one, four)] == ["dn2, 1-shot", "dn2, 4-shot"]
    (svm,) = rows({"svm": "ocsvm"}, classes=("9",), shots=(1,))
    assert not any(word.startswith("--model.k") for word in svm.words)


def test_a_row_has_another_name_when_what_files_say_changes(tmp_path):
    text = Path(DIGITS[0]).read_text(encoding="utf-8")
    (tmp_path / "variants").symlink_to(HOME / "conf/variants")
    path = tmp_path / "digits.yaml"
    names = []
    for change in (text, text + "\n# a remark\n", text.replace("max_epochs: 20", "max_epochs: 21")):
        path.write_text(change)
        names.append(rows({"early": "early"}, classes=("9",), configs=[str(path)])[0].name)
    assert names[0] == names[1] != names[2]


def test_every_row_has_its_own_name():
    plan = rows({"dn2": "dn2", "DN2": "dn2 --model.k=3"}, seeds=(0, 1, 10), shots=(None, 1, 10))
    assert len({row.name for row in plan}) == len(plan) == 36
    assert len({row.place for row in plan}) == len(plan)


def test_long_names_fit_into_a_file_system_and_stay_apart():
    long = "x" * 200
    own = [str(HOME / "conf/folder.yaml")]
    plan = rows({long + "a": "dn2", long + "b": "dn2"}, classes=(long + "8", long + "9"), seeds=(0, 1), configs=own)
    assert len({row.name for row in plan}) == 8
    assert max(len(row.name) for row in plan) < 130


def test_parts_are_neighbours_and_all_of_them():
    plan = rows({"dn2": "dn2", "early": "early"}, classes=tuple("0123456789"))
    for n in (1, 3, 7, 25):
        parts = [spread(plan, f"{i}/{n}") for i in range(1, n + 1)]
        assert [row for part in parts for row in part] == plan
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(PandaError, match="is not a part"):
        spread(plan, "0/4")


def test_what_is_no_detector_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("model: {class_path: torch.nn.Linear}\n")
    with pytest.raises(PandaError, match="Linear is not a detector"):
        rows({"x": str(tmp_path / "x.yaml")})
    for text, said in (
        ("model: {class_path: nowhere.Mine}", r"nowhere.Mine cannot be imported \(No module named 'nowhere'\)"),
        ("- a", "x.yaml is no configuration: it must hold keys"),
        ("a: [", r"x.yaml cannot be read as a configuration \([^\n]*\)\.$"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(PandaError, match=said):
            rows({"x": str(tmp_path / "x.yaml")})
    with pytest.raises(PandaError, match="not known beforehand"):
        planned([str(HOME / "conf/folder.yaml")], {"dn2": "dn2"}, None, [0])


def test_a_variant_may_name_a_class_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_method.py").write_text("from panda_lightning import DN2\n\n\nclass Mine(DN2):\n    pass\n")
    (tmp_path / "mine.yaml").write_text("model: {class_path: my_method.Mine}\n")
    (row,) = rows({"mine": str(tmp_path / "mine.yaml")}, classes=("9",))
    assert row.words[0] == "test"  # it trains nothing, so the class has been seen

"""What rows say together, against scikit-learn, SciPy and plain loops."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from panda_lightning import MVTecAD
from panda_lightning.formulas import uncertainty
from panda_lightning.tables.rows import Rows
from panda_lightning.tables.summary import PUBLISHED, summary
from tests.tables.recorded import drawn, record, row

NORMAL = ("c0", "c1", "c2")


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path)


def one_against_the_rest(rows, methods=("dn2", "early"), seeds=(0, 1)):
    """All methods score the same images; scores by (method, normal, seed)."""
    kind = drawn()[0]
    scores = {}
    for m, method in enumerate(methods):
        for n, normal in enumerate(NORMAL):
            for seed in seeds:
                label = (kind != normal).astype(np.int64)
                rng = np.random.default_rng([m, n, seed])
                score = (rng.normal(size=len(kind)) + (1 + 0.3 * m) * label).astype(np.float32)
                auroc = roc_auc_score(label, score)
                curve = [(0, auroc - 0.2), (1, auroc + 0.01), (2, auroc)] if method == "early" else [(0, auroc)]
                record(rows, row(method, normal, seed), score, label, kind, curve)
                scores[method, normal, seed] = (score, label)
    return kind, scores


def test_means_over_classes_and_seeds(rows):
    _, scores = one_against_the_rest(rows)
    (told,) = summary(rows, rows.read(), None)["sets"]
    assert told["problems"] == list(NORMAL)
    dn2, early = told["methods"]
    aurocs = {key: roc_auc_score(label, score) for key, (score, label) in scores.items()}
    for method in (dn2, early):
        own = [value for (name, _, _), value in aurocs.items() if name == method["name"]]
        assert method["mean"]["value"] == pytest.approx(np.mean(own))
        assert method["mean"]["low"] < np.mean(own) < method["mean"]["high"]
        by_seed = [np.mean([aurocs[method["name"], normal, seed] for normal in NORMAL]) for seed in (0, 1)]
        assert (method["seeds"], method["sd"]) == (2, pytest.approx(np.std(by_seed, ddof=1)))
        assert method["seconds"] == 6 * 1.5
    assert dn2["start"] is dn2["oracle"] is None  # it has no curve
    own = [value for (name, _, _), value in aurocs.items() if name == "early"]
    assert early["start"] == pytest.approx(np.mean(own) - 0.2)
    assert early["oracle"] == pytest.approx(np.mean(own) + 0.01)
    for (name, normal, _), _ in aurocs.items():
        pair = [aurocs[name, normal, seed] for seed in (0, 1)]
        assert told["cells"][name][normal]["value"] == pytest.approx(np.mean(pair))


@pytest.mark.parametrize("towards", [0, 1])
def test_a_mean_on_the_edge_of_rounding_is_the_same_however_it_was_added(rows, tmp_path, towards):
    kind = drawn()[0]
    label, score = (kind != "c0").astype(np.int64), np.arange(len(kind), dtype=np.float32)
    other = Rows(tmp_path / "other machine")
    for place, start in ((rows, 0.92225), (other, float(np.nextafter(0.92225, towards)))):
        record(place, row("early", "c0", 0), score, label, kind, [(0, start), (1, 0.5)])
    here, there = (summary(place, place.read(), None)["sets"][0]["methods"][0] for place in (rows, other))
    assert here["start"] == there["start"] == 0.92225


def test_kinds_are_each_class_against_the_normal_images(rows):
    kind, scores = one_against_the_rest(rows, methods=("dn2",))
    (told,) = summary(rows, rows.read(), None)["sets"]
    for one in np.unique(kind):
        own = []
        for (_, normal, _), (score, label) in scores.items():
            if one != normal:
                chosen = (kind == normal) | (kind == one)
                own.append(roc_auc_score(label[chosen], score[chosen]))
        assert told["kinds"]["dn2"][one] == pytest.approx(np.mean(own))


def test_pairs_are_delongs_on_the_same_images(rows):
    kind, label, score = drawn()
    other = score + np.random.default_rng(1).normal(size=len(score)).astype(np.float32)
    for method, values in (("a", score), ("b", other), ("c", -other)):
        record(rows, row(method), values, label, kind)
    (told,) = summary(rows, rows.read(), None)["sets"]
    pairs = {(pair["one"], pair["other"]): pair for pair in told["pairs"]}
    tests = [uncertainty.delong(x.astype(float), y.astype(float), label) for x, y in
             ((score, other), (score, -other), (other, -other))]  # fmt: skip
    adjusted = uncertainty.holm(np.array([test.p for test in tests]))
    for (names, pair), test, p in zip(pairs.items(), tests, adjusted, strict=True):
        assert names in (("a", "b"), ("a", "c"), ("b", "c"))
        assert pair["value"] == pytest.approx(test.difference)
        assert pair["p"] == pytest.approx(p)


def test_only_what_both_have_run_is_compared(rows):
    kind, label, score = drawn()
    record(rows, row("a", "c0"), score, label, kind)
    record(rows, row("a", "c1"), -score, label, kind)
    record(rows, row("b", "c0"), score + 0.1 * label, label, kind)
    (told,) = summary(rows, rows.read(), None)["sets"]
    expected = roc_auc_score(label, score) - roc_auc_score(label, score + 0.1 * label)
    assert told["pairs"][0]["value"] == pytest.approx(expected)
    assert told["ranks"] is None


def test_categories_with_images_of_their_own_are_independent(rows):
    estimates = []
    for seed, normal in enumerate(("bottle", "cable")):
        kind, label, score = drawn(seed, images=100 + 40 * seed)
        record(rows, row("dn2", normal, data="MVTecAD"), score, label, kind)
        estimates.append(uncertainty.interval(score.astype(float), label))
    (told,) = summary(rows, rows.read(), None)["sets"]
    mean = told["methods"][0]["mean"]
    assert mean["value"] == pytest.approx(np.mean([e.value for e in estimates]))
    error = np.hypot(*(e.error for e in estimates)) / 2
    width = np.diff(np.log([mean["low"] / (1 - mean["low"]), mean["high"] / (1 - mean["high"])]))[0]
    assert width == pytest.approx(2 * 1.959964 * error / (mean["value"] * (1 - mean["value"])))
    assert set(told["kinds"]["dn2"]) == {f"{n}, c{i}" for n in ("bottle", "cable") for i in (1, 2, 3)}


def test_ranks_are_friedmans(rows):
    _, scores = one_against_the_rest(rows, methods=("a", "b", "d"), seeds=(0,))
    (told,) = summary(rows, rows.read(), None)["sets"]
    table = np.array([[roc_auc_score(*scores[m, n, 0][::-1]) for m in ("a", "b", "d")] for n in NORMAL])
    assert told["ranks"]["average"] == pytest.approx(stats.rankdata(-table, axis=1).mean(axis=0))
    assert told["ranks"]["problems"] == 3


def test_data_sets_are_compared_by_their_means(rows):
    kind, label, score = drawn()
    for data, sign in (("Digits", 1), ("CIFAR10", -1), ("FashionMNIST", 1)):
        record(rows, row("a", data=data), sign * score, label, kind)
        record(rows, row("b", data=data), -sign * score, label, kind)
    ranks = summary(rows, rows.read(), None)["ranks"]
    assert dict(zip(ranks["methods"], ranks["average"], strict=True)) == pytest.approx({"a": 4 / 3, "b": 5 / 3})


def test_curves_have_the_range_of_seeds(rows):
    kind, label, score = drawn()
    for seed, ends in enumerate((0.7, 0.9)):
        for normal, more in (("c0", 0), ("c1", 0.05)):
            curve = [(0, 0.5), (1, ends + more)] + ([(2, 1.0)] if seed else [])
            record(rows, row("early", normal, seed), score, label, kind, curve)
    (told,) = summary(rows, rows.read(), None)["sets"]
    band = told["curves"]["early"][""]
    assert band["epochs"] == [0, 1]  # those that all seeds have
    np.testing.assert_allclose(band["mean"], [0.5, 0.825])
    np.testing.assert_allclose([band["low"][1], band["high"][1]], [0.725, 0.925])
    np.testing.assert_allclose(told["curves"]["early"]["c1"]["mean"], [0.5, 0.85])


def test_few_shots_have_students_interval_over_seeds(rows):
    kind, label, score = drawn()
    for seed, auroc in enumerate((0.7, 0.75, 0.8)):
        record(rows, row("dn2", "c0", seed, shots=4), score, label, kind, [(0, auroc)])
    (told,) = summary(rows, rows.read(), None)["sets"]
    (point,) = told["shots"]["dn2"]
    half = stats.t.ppf(0.975, 2) * 0.05 / np.sqrt(3)
    assert (point["shots"], point["seeds"]) == (4, 3)
    np.testing.assert_allclose([point["value"], point["low"], point["high"]], [0.75, 0.75 - half, 0.75 + half])
    assert [m["name"] for m in told["methods"]] == ["dn2, 4-shot"]
    assert told["methods"][0]["published"] == []


def test_what_is_lacking_has_its_command_and_what_failed_its_sentence(rows):
    kind, label, score = drawn()
    plan = [row(m, n) for m in ("dn2", "ewc") for n in ("c0", "c1")]
    record(rows, plan[0], score, label, kind)
    record(rows, plan[1], error="no memory")
    told = summary(rows, rows.read(), plan, lambda lacking: " ".join(one.name for one in lacking))
    dn2, ewc = told["sets"][0]["methods"]
    assert (dn2["runs"], dn2["planned"], ewc["runs"], ewc["mean"]) == (1, 2, 0, None)
    assert dn2["command"] == ewc["command"] == " ".join(one.name for one in plan[1:])
    assert told["failed"] == [{"data": "Digits", "normal": "c1", "method": "dn2", "seed": 0, "error": "no memory"}]


def test_warnings_that_begin_alike_but_for_numbers_are_told_once_for_a_method(rows):
    kind, label, score = drawn()
    some, more, rises = "AUROC covers 10 of 20: a.", "AUROC covers 9 of 20: b.", "It rises: it is 1."
    said = {("dn2", "c0"): [rises], ("dn2", "c1"): [], ("ewc", "c0"): [some, rises], ("ewc", "c1"): [more, some]}
    for (method, normal), warned in said.items():
        record(rows, row(method, normal), score, label, kind, warnings=warned)
    assert [tuple(one.values()) for one in summary(rows, rows.read(), None)["warnings"]] == [
        ("Digits", "dn2", 1, rises),
        ("Digits", "ewc", 2, some),
        ("Digits", "ewc", 1, rises),
    ]


def test_published_figures_stand_by_the_variant_whatever_its_name(rows):
    kind, label, score = drawn()
    named = replace(row("dn2", data="CIFAR10"), method="DN2, small network")
    record(rows, named, score, label, kind)
    (told,) = summary(rows, rows.read(), None)["sets"]
    assert [one["value"] for one in told["methods"][0]["published"]] == [92.5]
    assert "dn2" not in [one["name"] for one in told["others"]]


def test_published_figures_are_of_one_class_against_all(rows):
    kind, label, score = drawn()
    one = row("dn2", data="CIFAR10")
    record(rows, replace(one, words=(*one.words, "--data.protocol=leave_one_out")), score, label, kind)
    (told,) = summary(rows, rows.read(), None)["sets"]
    assert (told["methods"][0]["published"], told["others"]) == ([], [])


def test_published_figures_are_compared_over_the_same_classes(rows):
    for seed, normal in enumerate(("bottle", "grid")):
        kind, label, score = drawn(seed)
        record(rows, row("dn2", normal, data="MVTecAD"), score, label, kind)
        record(rows, row("patchcore", normal, data="MVTecAD"), score, label, kind)
    dn2, patchcore = summary(rows, rows.read(), None)["sets"][0]["methods"]
    assert dn2["published"][0]["comparable"] == pytest.approx((97.9 + 54.0) / 2)
    assert patchcore["published"][0]["comparable"] is None  # known over all categories alone
    for normal in MVTecAD.problems()[1]:
        record(rows, row("spade", normal, data="MVTecAD"), score, label, kind)
    methods = {m["name"]: m for m in summary(rows, rows.read(), None)["sets"][0]["methods"]}
    assert methods["spade"]["published"][0]["comparable"] == 85.4


def test_few_shots_are_not_compared_with_more(rows):
    kind, label, score = drawn()
    for shots in (1, 4, None):
        for method in ("dn2", "early"):
            record(rows, row(method, shots=shots), score, label, kind)
    pairs = summary(rows, rows.read(), None)["sets"][0]["pairs"]
    assert sorted((p["one"], p["other"]) for p in pairs) == [
        ("dn2", "early"), ("dn2, 1-shot", "early, 1-shot"), ("dn2, 4-shot", "early, 4-shot"),
    ]  # fmt: skip


def test_published_figures_have_sources():
    values = {data: {name: [one["value"] for one in own] for name, own in methods.items()}
              for data, methods in PUBLISHED.items()}  # fmt: skip
    assert values["CIFAR10"]["msc"] == [97.2, 97.5, 98.6]
    assert [values[d]["Transformaly"] for d in ("CIFAR10", "CIFAR100", "FashionMNIST")] == [[98.3], [97.3], [94.4]]
    assert [values[d]["patchcore"] for d in ("CIFAR10", "CIFAR100", "FashionMNIST")] == [[67.2], [64.1], [77.4]]
    for methods in PUBLISHED.values():
        assert all(50 < one["value"] <= 100 and len(one["source"]) > 10 for own in methods.values() for one in own)


def test_the_page_of_data_sets_has_the_same_figures():
    text = (Path(__file__).parents[2] / "docs/pages/data/index.md").read_text("utf-8")
    said = re.findall(r"^\|[^|]+\| `(\w+)` \|.*\| (?:DN2 )?([\d.]+)[^|]*\|$", text, re.MULTILINE)
    assert len(said) >= 6
    for data, figure in said:
        known = [one["value"] for own in PUBLISHED[data].values() for one in own]
        assert float(figure) in known, (data, figure)


def test_histograms_count_every_image_and_pictures_say_what_they_passed_for(rows):
    kind, label, score = drawn()
    record(rows, one := row(), score, label, kind)
    order = np.argsort(score)
    missed, alarm = order[label[order] == 1][0], order[label[order] == 0][-1]
    (rows.folder / "hardest").mkdir()
    np.savez(
        rows.folder / "hardest" / f"{one.name}.npz", place=[missed, alarm], jpeg=np.array([b"\xff1\xd9", b"\xff2\xd9"])
    )
    (told,) = summary(rows, rows.read(), None)["sets"]
    counts = told["histograms"]["dn2"]["8"]
    assert (sum(counts["normal"]), sum(counts["anomalous"])) == ((label == 0).sum(), label.sum())
    assert counts["edges"][0] == pytest.approx(score.min())
    hard = told["hardest"]["dn2"]["8"]
    assert hard["missed"][0]["beaten"] == pytest.approx((score[label == 0] > score[missed]).mean())
    assert hard["false_alarms"][0]["beaten"] == pytest.approx((score[label == 1] < score[alarm]).mean())
    assert hard["missed"][0]["kind"] == kind[missed]
    assert base64.b64decode(hard["missed"][0]["picture"].split(",")[1]) == b"\xff1\xd9"

"""A summary as text, LaTeX, CSV and a page."""

import csv
import json
import re

import numpy as np
import pytest

from panda_lightning.tables import formats
from panda_lightning.tables.rows import Rows
from panda_lightning.tables.summary import summary
from tests.tables.recorded import drawn, record, row

NASTY = 'a|b & <c>_"1"%</script>'


@pytest.fixture
def told(tmp_path):
    rows = Rows(tmp_path)
    kind, label, score = drawn()
    plan = [row(m, n, data="CIFAR10") for m in ("dn2", "ewc") for n in (NASTY, "cat", "dog")]
    for place, one in enumerate(plan[:-2]):
        warned = [f"Training raises its loss: it is {place}."] if one.method == "dn2" else []
        record(rows, one, score + 0.2 * place * label, label, kind, warnings=warned)
    record(rows, plan[-2], error="out of | memory")
    return rows, summary(rows, rows.read(), plan, lambda lacking: f"panda table {len(lacking)}")


def table(text, head):
    """Cells of the Markdown table whose first heading this is."""
    block = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block]


def test_markdown_has_means_beside_published_figures_and_what_was_not_run(told):
    text = formats.markdown(told[1])
    heads, _, *body = table(text, "method")
    assert {len(line) for line in body} == {len(heads)}
    dn2, ewc = (dict(zip(heads, line, strict=True)) for line in body[:2])
    mean = told[1]["sets"][0]["methods"][0]["mean"]
    assert dn2["mean"] == f"{100 * mean['value']:.2f} [{100 * mean['low']:.2f}, {100 * mean['high']:.2f}]"
    assert (dn2["published"], dn2["difference"]) == ("92.5 (all classes)", "")
    assert ewc["runs"] == "1 of 3"
    assert "best epoch (oracle)" in heads
    heads, _, *body = table(text, "normal class")
    assert body[0][0] == NASTY
    assert [line[heads.index("ewc, published")] for line in body] == ["", "90.55", "94.42"]
    assert [line[2] for line in body][1:] == ["failed", "not run"]
    assert "- ewc: `panda table 2`" in text  # one failed, and one is not there
    assert "- CIFAR10, cat, ewc, seed 0: out of | memory" in text
    assert "- CIFAR10, dn2, 3 runs, such as: Training raises its loss: it is 0." in text
    assert "| Transformaly, published |  |  |  | 98.3 (all classes) |" in text
    assert "panda-lightning 0, here" in text


def test_latex_has_as_many_cells_in_every_row_and_nothing_that_breaks_it(told):
    text = formats.latex(told[1])
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {2}
    assert r"a|b \& <c>\_" in text
    assert r"''1''\%</script>" in text
    assert text.count(r"\textbf{") == 1  # the one class that both have run
    assert "published & -- & --" in text  # theirs are over other classes
    assert formats._tex('--a "b"') == "-{}-a ''b''"


def test_the_csv_has_a_line_a_run(told):
    rows, _ = told
    lines = list(csv.DictReader(formats.as_csv(formats.lines(rows, rows.read())).splitlines()))
    assert len(lines) == 5
    failed = [line for line in lines if line["error"]]
    assert {line["warnings"] for line in lines if line["normal_class"] == "dog"} == {
        "Training raises its loss: it is 2."
    }
    assert [(line["auroc"], line["error"]) for line in failed] == [("", "out of | memory")]
    assert {line["normal_class"] for line in lines} == {NASTY, "cat", "dog"}
    assert all(line["command"].startswith("lightning fit") for line in lines)


def test_the_page_holds_the_summary_and_asks_nothing_of_a_network(told):
    text = formats.page(told[1])
    found = re.search(r'id="content">(.*?)</script>', text)
    assert json.loads(found[1]) == json.loads(json.dumps(told[1]))
    assert NASTY not in text  # a name must not end the script
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert np.isfinite(told[1]["sets"][0]["methods"][0]["mean"]["low"])


def test_many_methods_are_compared_with_the_first_alone(tmp_path):
    rows = Rows(tmp_path)
    kind, label, score = drawn()
    for i in range(formats.MANY + 1):
        record(rows, row(f"m{i}"), score + np.random.default_rng(i).normal(size=len(score)), label, kind)
    text = formats.markdown(summary(rows, sorted(rows.read(), key=lambda one: one.row.method), None))
    assert [line[0] for line in table(text, "pair")[2:]] == [f"m0 - m{i}" for i in range(1, formats.MANY + 1)]
    assert "The other pairs" in text

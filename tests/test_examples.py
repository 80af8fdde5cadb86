"""The examples as a newcomer starts them, in this process: they do what their headers say."""

import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_folder, picture

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))
NOTEBOOK = FOLDER / "quickstart.ipynb"
NUMBER = r"\d+(?:\.\d+)?"


@pytest.fixture
def alone(workdir, one_thread, monkeypatch):
    """An empty folder; modules that a test imports from there, and log levels that it sets, do not outlive it."""
    for name in ("my_data", "my_detector"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    plt.switch_backend("Agg")
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    yield
    logger.setLevel(level)
    plt.close("all")


@pytest.fixture
def start(alone, monkeypatch, capsys):
    """Start an example with some words; returns what it printed."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def header(name):
    """The first docstring of an example, as it is written."""
    return (FOLDER / name).read_text(encoding="utf-8").split('"""')[1]


def promised(name):
    """The lines that an example prints at the end, as its header has them."""
    shown = header(name).split("prints at the end")[1].split(":\n", 1)[1]
    lines = (line.split("...")[0].strip() for line in shown.splitlines() if line.startswith("    "))
    return [line for line in lines if line]


def assert_prints(out, lines):
    """Each line was printed, with numbers that another machine may round in another way."""
    for line in lines:
        words = f"({NUMBER})".join(re.escape(part) for part in re.split(NUMBER, line))
        words = re.sub(r"(\\ )+", lambda spaces: r"\s+", words)
        numbers = pytest.approx(list(map(float, re.findall(NUMBER, line))), rel=0.05, abs=0.002)
        found = [list(map(float, match.groups())) for match in re.finditer(words, out)]
        assert numbers in found, f"{line!r} is not in\n{out}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_header_says_what_to_type_and_what_comes_out(path):
    text = header(path.name)
    assert f"\n    python examples/{path.name}  " in text
    assert re.search(r"It takes about \d+ s on two CPU cores, and prints at the end", text)
    assert promised(path.name)
    assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.pictures
@pytest.mark.parametrize("number", range(3, 8))
def test_an_example_prints_what_its_header_says(number, start):
    name = EXAMPLES[number - 1].name
    assert_prints(start(name), promised(name))


def test_own_folder(start):
    out = start("01_own_folder.py", "--image-size", 32, "--epochs", 1)
    assert re.search(r"AUROC [\d.]+ after 1 epochs", out)
    assert Path("runs/own_folder/version_0/checkpoints/last.ckpt").is_file()
    lines = [line.split() for line in out.split("The most anomalous test pictures:\n")[1].splitlines()]
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    assert [Path(name).is_file() for _, name in lines] == [True] * 5


def test_the_checkpoint_of_a_folder_of_ones_own_serves_the_others(start):
    make_folder(Path("spots"), train=40)
    out = start("01_own_folder.py", "spots", "--image-size", 32, "--epochs", 1)
    worst = out.split("The most anomalous test pictures:\n")[1].splitlines()
    assert [Path(line.split()[1]).parent.name for line in worst] == ["stripe"] * 5
    last = re.search(r"Checkpoint: (\S+)", out).group(1)

    out = start("04_score_and_decide.py", last, "spots/test", "--alpha", 0.1)
    assert "Calibrated with 10 normal images held out" in out
    rows = re.findall(r"^(spots/test/\S+) .* (anomalous|normal) +spots/train/spot/\S+$", out, re.MULTILINE)
    assert len(rows) == 8
    flagged = int(re.search(r"(\d+) of 13 pictures are flagged at alpha = 0.1\n", out).group(1))
    assert 6 <= flagged < 13  # the stripes, and few of the spots

    out = start("05_export.py", last, *sorted(Path("spots/test/stripe").iterdir())[:3])
    pairs = [line.split() for line in out.split("detector       file\n")[1].splitlines()]
    assert len(pairs) == 3
    for detector, file in pairs:
        assert float(file) == pytest.approx(float(detector), rel=1e-4)


def test_published_data(start):
    out = start("02_published_data.py", "--classes", 0, 9, "--image-size", 32, "--epochs", 1)
    names, *values = zip(*(line.split() for line in out.splitlines()[-3:]), strict=True)
    assert names == ("0", "9", "mean")
    for zero, nine, mean in (map(float, column) for column in values):
        assert mean == pytest.approx((zero + nine) / 2, abs=1e-4)
        assert nine < zero  # nines look like other digits, zeros do not
        assert 0.7 < nine < 1
    assert re.search(r"AUROC [\d.]+ after 1 epochs", out)


def test_defects_are_where_the_masks_say(start):
    out = start("03_find_defects.py")
    found = re.findall(r"runs/plates/test/(\S+): score \S+, most anomalous at x=(\d+), y=(\d+)", out)
    assert len(found) == 4
    for name, x, y in found:
        rows, columns = np.nonzero(np.asarray(Image.open(f"runs/plates/ground_truth/{name}")))
        assert np.hypot(rows - int(y), columns - int(x)).min() < 8
    assert Image.open("runs/find_defects/version_0/defects.png").size == (1000, 500)


@pytest.mark.parametrize("name", ["06_own_data_set.py", "07_own_detector.py"])
def test_a_header_names_the_class_for_the_command_line(name, start, run, workdir):
    if name == "06_own_data_set.py":
        start(name, "--image-size", 32)  # writes the pictures
    copy, command = re.search(r"\n    cp (.*)\n    lightning (.*\\\n.*)", header(name)).groups()
    source, target = copy.split()
    shutil.copy(FOLDER.parent / source, target)
    out = run(*shlex.split(command.replace("\\\n", "")), "--trainer.accelerator=cpu")
    found = float(re.search(r"AUROC ([\d.]+) of 898 images", out).group(1))
    last = [float(number) for number in re.findall(r"AUROC ([\d.]+)", header(name))][-1]
    assert found == pytest.approx(last, abs=0.005)
    picture("stripe", 0).save("photo.png")
    run("predict", "--ckpt_path=lightning_logs/version_0/checkpoints/last.ckpt", "--data.images=photo.png")
    assert "photo.png" in Path("lightning_logs/version_1/predictions.csv").read_text(encoding="utf-8")


def test_the_notebook_runs(alone, monkeypatch, capsys):
    shown, space = [], {"__name__": "__main__"}
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
    for cell in cells("code"):
        source = "".join(cell["source"])
        exec(compile(source.replace("epochs = 10", "epochs = 1"), "quickstart.ipynb", "exec"), space)
    out = capsys.readouterr().out
    assert len(shown) == len([output for output in outputs() if "image/png" in output.get("data", {})]) == 4
    assert_prints(out, [re.search(r"AUROC [\d.]+ of \d+ images by DN2", recorded()).group()])
    assert re.search(r"AUROC [\d.]+ after 1 epochs", out)
    assert re.search(r"Calibrated with 22 normal images held out\n\npicture +score +p-value +decision\n", out)
    assert len(re.findall(r"^(?:good|other)/\S+ +[\d.]+ +[\d.]+  (?:anomalous|normal)$", out, re.MULTILINE)) == 8


def test_the_notebook_opens_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 400_000
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    assert not [output for output in outputs() if output["output_type"] == "error"]
    assert re.search(r"AUROC [\d.]+ after 10 epochs", recorded())
    assert not re.search(r"/(home|tmp|root|work)/", NOTEBOOK.read_text(encoding="utf-8"))


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def outputs():
    return [output for cell in cells("code") for output in cell["outputs"]]


def recorded():
    """The text that the notebook's outputs show, without colours."""
    texts = (output.get("text") or output["data"]["text/plain"] for output in outputs())
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join("".join(text) for text in texts))

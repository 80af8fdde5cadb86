import base64
import json
import re
from io import BytesIO

import pytest
from PIL import Image

from panda_lightning.tools import main
from panda_lightning.tools.gallery import gallery
from tests.conftest import picture


def row(path, score, **more):
    kept = {"path": str(path), "score": score, "p_value": 0.5, "anomalous": False, "neighbours": [], "unreadable": None}
    return kept | more


@pytest.fixture
def table(workdir):
    for i in range(4):
        picture("spot", i, 300).save(workdir / f"{i}.png")
    (workdir / "maps").mkdir()
    picture("cloud", 1, 32).save(workdir / "maps/1.npy.png.png")
    near = [{"path": str(workdir / "3.png"), "distance": 1.25}, {"path": "gone.png", "distance": 2.0}]
    rows = [
        row(workdir / "0.png", 1.0),
        row(workdir / "1.png", 3.0, anomalous=True, neighbours=near, map="maps/1.npy.png.npy"),
        row(workdir / "2.png", None, p_value=None, anomalous=None, unreadable="</script><b>not an image"),
        row(workdir / "gone.png", 2.0),
    ]
    (workdir / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return workdir / "predictions.jsonl"


def content(page):
    text = page.read_text()
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(found)


def test_a_page_holds_all_it_shows_and_asks_for_nothing(table):
    assert main(["gallery", str(table)]) == 0
    text, shown = content(table.with_name("gallery.html"))
    assert [r["score"] for r in shown["rows"]] == [3.0, 2.0, 1.0, None]
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", text)
    assert "http" not in re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text)
    assert text.count("</script>") == 2  # what rows say does not end the script
    image = Image.open(BytesIO(base64.b64decode(shown["pictures"][shown["rows"][0]["path"]].split(",")[1])))
    assert image.size == (128, 128)
    assert shown["rows"][0]["map"].endswith("maps/1.npy.png.png")
    assert shown["rows"][0]["map"] in shown["pictures"]
    assert shown["rows"][0]["neighbours"][0]["path"] in shown["pictures"]
    assert not any("gone" in path for path in shown["pictures"])


def test_the_highest_scores_are_shown_where_there_are_more(table, workdir):
    assert gallery(table, workdir / "page.html", limit=2, size=32, neighbours=0) == 2
    _, shown = content(workdir / "page.html")
    assert [r["score"] for r in shown["rows"]] == [3.0, 2.0]
    assert shown["total"] == 4
    assert shown["rows"][0]["neighbours"] == []


def test_numbers_that_json_has_not_are_none(table, workdir):
    table.write_text(json.dumps(row(workdir / "0.png", float("nan"))) + "\n")
    gallery(table, workdir / "page.html")
    assert content(workdir / "page.html")[1]["rows"][0]["score"] is None


def test_pictures_that_are_elsewhere_are_said(table, workdir):
    table.write_text(json.dumps(row("elsewhere/0.png", 1.0)) + "\n")
    with pytest.raises(SystemExit, match="none of the pictures can be read, such as elsewhere/0.png"):
        main(["gallery", str(table)])
    with pytest.raises(SystemExit, match="is the table itself"):
        main(["gallery", str(table), "-o", str(table)])
    with pytest.raises(SystemExit, match="intensity=foo is not allowed"):
        main(["gallery", str(table), "--intensity=foo"])


@pytest.mark.parametrize("text", ["no json", '{"a": 1}\n', '{"score": 1}\n', "[1]\n", None])
def test_another_file_is_refused(workdir, text):
    if text is not None:
        (workdir / "t.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=r"t.jsonl is not a predictions.jsonl"):
        main(["gallery", "t.jsonl"])

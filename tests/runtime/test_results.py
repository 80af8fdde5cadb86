import csv
import json

import numpy as np
import pytest

from panda_lightning.runtime.results import Calibration, Results, joined, level_of
from panda_lightning.types import PandaError


def made(names, unreadable=None, **more):
    n = len(names)
    kept = {
        "names": names, "score": np.arange(n, dtype=float), "p_value": np.full(n, 0.25),
        "anomalous": np.zeros(n, dtype=bool), "neighbours": np.array([["a.png", "b.png"]] * n),
        "distances": np.array([[1.0, 2.0]] * n), "maps": None, "unreadable": unreadable or [""] * n,
    }  # fmt: skip
    return Results(**kept | more)


def test_rows_say_what_applies():
    one, other = made(["x.png", "y.png"], ["", "empty file"], others={"ses_score": np.array([7.0, 8.0])}).rows()
    assert one == {
        "path": "x.png", "score": 0.0, "ses_score": 7.0, "p_value": 0.25, "anomalous": False,
        "neighbours": [{"path": "a.png", "distance": 1.0}, {"path": "b.png", "distance": 2.0}], "unreadable": None,
    }  # fmt: skip
    assert other["unreadable"] == "empty file"
    assert [other[key] for key in ("score", "ses_score", "p_value", "anomalous")] == [None] * 4


def test_parts_are_joined_in_order():
    whole = joined([made(["x"]), made(["y", "z"])], [0, 1, 2])
    assert whole.names == ["x", "y", "z"]
    assert whole.score.tolist() == [0, 0, 1]
    assert whole.neighbours.shape == (3, 2)
    assert whole.maps is None


def test_parts_of_several_sizes_are_joined_in_order_of_their_rows():
    maps = [np.full((2, 3), 1.0), np.full((2, 3), 5.0)], [np.full((4, 2), 2.0)]
    parts = [made(["b", "f"], maps=np.stack(maps[0])), made(["c"], maps=np.stack(maps[1]), score=np.array([9.0]))]
    whole = joined(parts, [1, 5, 2])
    assert whole.names == ["b", "c", "f"]
    assert whole.score.tolist() == [0, 9, 1]
    assert [m.shape for m in whole.maps] == [(2, 3), (4, 2), (2, 3)]
    assert [m[0, 0] for m in whole.maps] == [1, 2, 5]
    assert joined([parts[0]], [1, 0]).maps[:, 0, 0].tolist() == [5, 1]


def test_tables_hold_every_row(tmp_path):
    results = made(["x,1.png", 'y".png'], ["not an image", ""])
    results.save(tmp_path / "t.csv")
    results.save(tmp_path / "t.jsonl")
    first, second = csv.DictReader((tmp_path / "t.csv").open())
    assert (first["path"], first["score"], first["unreadable"]) == ("x,1.png", "", "not an image")
    assert (second["path"], second["neighbour_2"], second["distance_2"]) == ('y".png', "b.png", "2.0")
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").open()] == list(results.rows())
    with pytest.raises(PandaError, match=r"t.xlsx is neither .csv nor .jsonl"):
        results.save(tmp_path / "t.xlsx")


def test_the_level_is_what_is_asked_for_or_possible():
    many, few = Calibration(np.arange(19.0), "held out"), Calibration(np.arange(18.0), "leave one out")
    assert level_of(many, None) == 0.05
    assert level_of(many, 0.2) == 0.2
    assert level_of(few, None) is None
    assert level_of(None, None) is None
    with pytest.raises(PandaError, match="alpha=0.05 needs 19 calibration images or more, and there are 18"):
        level_of(few, 0.05)
    for asked in ({"alpha": 0.1}, {"alpha": None, "fdr": 0.1}):
        with pytest.raises(PandaError, match=r"alpha(_fdr)?=0.1 needs a calibration"):
            level_of(None, **asked)
    assert few.words == "18 normal images leave one out, approximate"


def test_discoveries_need_p_values():
    assert made(["x"]).discoveries(0.5).tolist() == [True]
    with pytest.raises(PandaError, match="no p-values"):
        made(["x"], p_value=None).discoveries(0.5)

"""Two networks of each of timm's classes against the recorded scan of all of them: experiments/scan_networks.py."""

from collections import defaultdict

import pytest

from tests.conftest import script

scan = script("experiments/scan_networks.py")


def smallest() -> list[dict[str, str]]:
    """The two smallest networks of each class, of at most 15 M parameters."""
    by = defaultdict(list)
    for row in scan.read():
        if row["how"] == "numbers" and float(row["million"]) <= 15:
            by[row["family"]].append(row)
    return [row for rows in by.values() for row in sorted(rows, key=lambda row: float(row["million"]))[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("recorded", smallest(), ids=lambda row: row["architecture"])
def test_features_gradients_and_checkpoints_are_right(recorded):
    found = scan.examined(recorded["architecture"])
    same = ("outcome", "stages", "entry", "side", "gradient", "folds")
    assert {key: str(found.get(key, "")) for key in same} == {key: recorded[key] for key in same}
    for key in ("features", "split", "reloaded", "folded"):
        assert float(found.get(key, 0)) < 1e-5, key


def test_all_but_some_are_split():
    outcomes = [row["outcome"] for row in scan.read() if row["how"] == "numbers"]
    assert outcomes.count("split") > 0.9 * len(outcomes)
    assert all(row["gradient"] == "True" for row in scan.read() if row["outcome"] in ("split", "whole") and row["side"])

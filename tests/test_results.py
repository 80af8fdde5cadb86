"""The recorded results, as they are written."""

import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parents[1]


def test_the_tables_of_the_results_are_what_the_recorded_rows_say():
    words = [sys.executable, "-W", "ignore", "experiments/results.py", "--check"]
    done = subprocess.run(words, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (HOME / "experiments/RESULTS.md").read_text().count("<!-- panda table") >= 10

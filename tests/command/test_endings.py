"""What commands print, and what they leave out."""

import io
import logging
import sys
import warnings

import pytest
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from panda_lightning.callbacks import health
from panda_lightning.command.endings import Stderr, silence


@pytest.fixture
def silent(monkeypatch):
    """Lightning's loggers as a command sets them up, and as they were afterwards."""
    log = logging.getLogger("pytorch_lightning")
    before = log.handlers, warnings.formatwarning
    log.handlers = [logging.StreamHandler()]
    with warnings.catch_warnings():
        silence()
        yield log
    log.handlers, warnings.formatwarning = before


def test_lines_go_where_a_progress_bar_wants_them(silent, monkeypatch):
    """The bar replaces sys.stderr while it is drawn; a line that goes elsewhere tears it."""
    assert Stderr in map(type, silent.handlers)
    for _ in range(2):
        bar = io.StringIO()
        monkeypatch.setattr(sys, "stderr", bar)
        rank_zero_info("between two steps")
        assert bar.getvalue() == "between two steps\n"


def test_what_users_cannot_act_on_is_left_out(silent, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    rank_zero_info("TPU available: False, using: 0 TPU cores")
    rank_zero_info("`Trainer.fit` stopped: `max_epochs=3` reached.")
    rank_zero_info("Tip: install something")
    rank_zero_warn("The dirpath has changed from 'a' to 'b'")
    assert sys.stderr.getvalue() == ""
    rank_zero_info("`Trainer.fit` stopped: `max_steps=3` reached.")
    assert "max_steps" in sys.stderr.getvalue()


def test_a_warning_of_ours_is_a_line_without_a_place_in_the_code(silent):
    ours = warnings.formatwarning("Training moved nothing.", UserWarning, health.__file__, 125)
    assert ours == "warning: Training moved nothing.\n"
    place = "/x/panda_lightning/env/timm/models.py"  # in an environment inside a checkout
    theirs = warnings.formatwarning("Old.", DeprecationWarning, place, 3)
    assert theirs == f"DeprecationWarning: Old. ({place}:3)\n"

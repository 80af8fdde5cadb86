import pytest

from panda_lightning import Digits, PandaError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normal_class": 12}, r"normal_class=12 is not a class of Digits \(0-9: 0, 1, 2"),
        ({"normal_class": "zero"}, "normal_class=zero is not a class of Digits"),
        ({"normal_class": None}, "normal_class=None is not a class of Digits"),
        ({"normal_class": 0, "train_limit": 1}, "a single training image of the normal class 0: give 2 or more"),
        ({"normal_class": 0, "test_limit": 1}, "are all anomalous with normal class 0: AUROC needs both kinds"),
    ],
)
def test_what_cannot_work_is_said_in_setup(options, words):
    with pytest.raises(PandaError, match=words):
        Digits(**options).setup("fit")


def test_a_batch_is_shared_by_the_processes_of_a_fit_alone(monkeypatch):
    monkeypatch.setattr(Digits, "_world", 3)
    data = Digits(normal_class=0, batch_size=32)
    data.setup("test")
    with pytest.raises(PandaError, match="batch_size=32 is shared by 3 processes: choose a multiple of 3"):
        data.setup("fit")

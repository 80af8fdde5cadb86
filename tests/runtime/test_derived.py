import torch

from panda_lightning.runtime.derived import Derived, mapped


class Thing:
    bank = Derived[torch.Tensor | None](None)
    steps = Derived[int](0)

    def __init__(self):
        self.derived = {}


def test_derived_attributes_live_in_one_dictionary_of_their_object():
    one, other = Thing(), Thing()
    one.steps, one.bank = 3, torch.ones(2)
    assert one.derived == {"steps": 3, "bank": one.bank}
    assert (one.steps, one.bank.tolist()) == (3, [1, 1])
    assert (other.steps, other.bank) == (0, None)
    one.derived.clear()
    assert (one.steps, one.bank) == (0, None)
    assert isinstance(Thing.steps, Derived)


def test_every_tensor_of_a_nested_value_is_changed():
    value = {"a": torch.ones(1), "b": [torch.ones(1), (2, torch.ones(1))], "c": "text", "d": None}
    assert mapped(value, lambda t: t * 5) == {"a": torch.tensor(5.0), "b": [5, (2, 5)], "c": "text", "d": None}
    assert mapped(torch.ones(1), lambda t: t * 5) == 5
    assert value["a"] == value["b"][1][1] == 1  # what was given stays as it is

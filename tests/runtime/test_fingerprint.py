import struct

import pytest
import torch

from panda_lightning.runtime.fingerprint import checksum, fingerprint


class Pictures:
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def pictures(self, rows):
        return self.pixels[rows]


def test_a_fingerprint_is_the_same_for_the_same_and_another_for_anything_else():
    weights = {"a": torch.arange(6.0), "b": torch.zeros(300)}
    pixels = torch.arange(600, dtype=torch.uint8).view(300, 1, 1, 2)
    base = fingerprint(weights, Pictures(pixels), "words", 3)
    copies = {name: t.clone() for name, t in weights.items()}
    assert fingerprint(copies, Pictures(pixels.clone()), "words", 3) == base
    assert len(base) == 16
    others = [
        (weights | {"a": torch.arange(6.0).flip(0)}, Pictures(pixels), "words", 3),
        (weights | {"a": torch.arange(6.0).view(2, 3)}, Pictures(pixels), "words", 3),
        (weights | {"a": torch.arange(6.0).to(torch.int32)}, Pictures(pixels), "words", 3),
        ({"a": weights["a"], "c": weights["b"]}, Pictures(pixels), "words", 3),
        (weights, Pictures(pixels[:-1]), "words", 3),
        (weights, Pictures(pixels.flip(0)), "words", 3),
        (weights, Pictures(pixels), "word", 3),
        (weights, Pictures(pixels), "words", "3"),
        (weights, Pictures(pixels), "words"),
        (Pictures(pixels), weights, "words", 3),
    ]
    assert len({fingerprint(*parts) for parts in others} | {base}) == len(others) + 1


def test_equal_values_have_one_fingerprint_wherever_they_lie():
    pixels, rows = torch.arange(600, dtype=torch.uint8).view(300, 1, 1, 2), torch.arange(6.0).view(2, 3)
    assert fingerprint(one := Pictures(pixels)) == fingerprint(other := Pictures(pixels.clone()))
    assert one is not other  # both live: nothing was named by its address
    assert fingerprint(Pictures(pixels[:256]), Pictures(pixels[256:])) != fingerprint(one)
    assert fingerprint(rows.t().contiguous().t().requires_grad_()) == fingerprint(rows)
    assert fingerprint(rows.numpy()) == fingerprint(rows.numpy().T.copy().T) == fingerprint(rows)
    assert fingerprint(("a", [1])) == fingerprint(["a", (1,)])
    assert fingerprint(rows, {"a": 1}) != fingerprint(rows, {"a": 2})


def test_parts_do_not_run_into_one_another():
    assert fingerprint(["a", "b"], ["c"]) != fingerprint(["a"], ["b", "c"])
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint([[1], 2]) != fingerprint([1, [2]])
    assert fingerprint({"a": 1}, {}) != fingerprint({}, {"a": 1})


def test_pictures_are_read_once_and_not_all_at_a_time():
    class OnDisk(Pictures):
        def pictures(self, rows):
            read.append(rows.tolist())
            return super().pictures(rows)

    read = []
    fingerprint(OnDisk(torch.zeros(600, 3, 1, 1, dtype=torch.uint8)))
    assert [row for rows in read for row in rows] == list(range(600))
    assert max(map(len, read)) < 600


@pytest.mark.parametrize("size", range(10))
def test_a_checksum_is_two_sums_over_the_bits_of_each_tensor(size):
    """Worked out by hand, for checkpoints keep it: another number would be taken for other weights."""
    values = torch.arange(200, 200 + size, dtype=torch.uint8)
    rows, sums = torch.tensor([[1.5, -2.0], [0.0, 3.0]]), []
    for raw in (bytes(values.tolist()), struct.pack("<4f", 1.5, -2.0, 0.0, 3.0)):
        words = struct.unpack(f"<{len(raw) // 4}i", raw) if len(raw) % 4 == 0 else raw
        sums += [sum(words), sum(place * word for place, word in enumerate(words, 1))]
    assert checksum([values, rows.t().contiguous().t()]) == fingerprint(torch.tensor(sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_a_checksum_tells_any_change_of_value_or_place(dtype):
    values = torch.arange(1, 8).to(dtype)
    base = checksum([values, values[:3]])
    assert checksum([values.clone(), values[:3].clone()]) == base
    others = []
    for i in range(7):
        changed = values.clone()
        changed[i] += 1
        others.append(checksum([changed, values[:3]]))
    others += [checksum([values.flip(0), values[:3]]), checksum([values[:3], values]), checksum([values])]
    assert len({*others, base}) == len(others) + 1
    assert checksum([]) == ""
    assert checksum([torch.tensor(5, dtype=dtype)]) != checksum([torch.tensor(6, dtype=dtype)])

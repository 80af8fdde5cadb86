"""The search that can be traced, against a plain one in float64."""

import numpy as np
import pytest
import torch

from panda_lightning import PandaError
from panda_lightning.search.knn import KNNIndex
from panda_lightning.search.traced import TracedIndex


def plain(queries, bank, k):
    squared = ((queries.double().numpy()[:, None] - bank.double().numpy()[None]) ** 2).sum(axis=2)
    rows = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, rows, axis=1), rows


@pytest.mark.parametrize(("rows", "k"), [(8192, 1), (8192, 31), (7, 5), (3, 5), (2, 17), (1, 1)])
def test_it_finds_what_a_plain_search_finds(monkeypatch, rows, k):
    monkeypatch.setattr(TracedIndex, "ROWS", rows)
    draw = torch.manual_seed(0)
    queries, bank = torch.randn(9, 20, generator=draw), torch.randn(31, 20, generator=draw)
    distance, row = TracedIndex().fit(bank).search(queries, k)
    expected, places = plain(queries, bank, k)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    np.testing.assert_array_equal(row, places)


def test_close_rows_far_from_the_origin_are_told_apart():
    draw = torch.manual_seed(1)
    bank = 1e4 + 1e-2 * torch.randn(200, 64, generator=draw)  # |b|^2 = 6e9, squared distances of 1e-2
    queries = bank[:20] + 1e-3 * torch.randn(20, 64, generator=draw)
    distance, row = TracedIndex().fit(bank).search(queries, 3)
    expected, places = plain(queries, bank, 3)
    np.testing.assert_array_equal(row, places)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    assert torch.equal(distance, KNNIndex("torch").fit(bank).search(queries, 3)[0])


def test_each_query_has_pieces_of_the_bank_of_its_own(monkeypatch):
    monkeypatch.setattr(TracedIndex, "ROWS", 10)
    draw = torch.manual_seed(2)
    queries, bank = torch.randn(3, 6, 8, generator=draw), torch.randn(7, 9, 8, generator=draw)
    pieces = torch.tensor([[6, 0, 3], [1, 1, 2], [5, 4, 3]])
    expected = np.stack([plain(q, bank[own].flatten(0, 1), 1)[0][:, 0] for q, own in zip(queries, pieces, strict=True)])
    for index in (TracedIndex(), KNNIndex("torch")):
        np.testing.assert_allclose(index.fit(bank).nearest_in_each(queries, pieces), expected, rtol=1e-5)


def test_a_bank_of_half_precision_is_searched_as_it_is():
    draw = torch.manual_seed(3)
    queries, bank = torch.randn(4, 16, generator=draw), torch.randn(40, 16, generator=draw).half()
    distance, row = TracedIndex().fit(bank).search(queries, 2)
    expected, places = plain(queries, bank, 2)
    np.testing.assert_array_equal(row, places)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_more_neighbours_than_rows_are_refused():
    with pytest.raises(PandaError, match="k=4 neighbours cannot be found in a bank of 3"):
        TracedIndex().fit(torch.zeros(3, 2)).search(torch.zeros(1, 2), 4)

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from panda_lightning import KNNIndex, PandaError
from panda_lightning.search import with_faiss
from tests.played import machine


@pytest.mark.parametrize(("backend", "used"), [("auto", False), ("torch", False), ("faiss", True)])
def test_faiss_serves_where_it_is_chosen(monkeypatch, backend, used):
    monkeypatch.setattr(with_faiss, "find_spec", lambda name: name == "faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)  # which fails at its import
    index = KNNIndex(backend).fit(torch.randn(50, 200))
    with pytest.raises(ImportError) if used else nullcontext():
        index.search(torch.randn(2, 200), 1)


def test_a_process_takes_256_mib_of_a_gpu_for_faiss_once(monkeypatch):
    class Resources:
        def setTempMemory(self, size):  # noqa: N802
            taken.append(size)

    taken: list[int] = []
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(StandardGpuResources=Resources))
    with_faiss._gpu_resources.cache_clear()
    assert isinstance(with_faiss._gpu_resources(), Resources)
    assert with_faiss._gpu_resources() is with_faiss._gpu_resources()
    assert taken == [256 * 2**20]
    with_faiss._gpu_resources.cache_clear()


def test_without_faiss_it_is_refused(monkeypatch):
    monkeypatch.setattr(with_faiss, "find_spec", lambda name: None)
    with pytest.raises(PandaError, match="faiss is not installed: install it"):
        KNNIndex("faiss").fit(torch.eye(3))


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
def test_on_a_gpu_faiss_works_behind_what_torch_has_been_given(monkeypatch):
    """Its own stream would read queries that are not computed yet; and what it takes by itself are arrays."""
    import faiss

    if not hasattr(faiss, "GpuDistanceParams"):
        pytest.skip("needs the package faiss-gpu")

    class Resources:
        stream = "own"

        def getDefaultStream(self, device):  # noqa: N802
            return self.stream

        def setDefaultStream(self, device, stream):  # noqa: N802
            self.stream = stream

    def found(resources, args):
        seen.append((resources.stream, args.numQueries, args.numVectors, args.k))

    seen, resources = [], Resources()
    monkeypatch.setattr(with_faiss, "_gpu_resources", lambda: resources)
    monkeypatch.setattr(faiss, "bfKnn", found)
    monkeypatch.setattr(faiss, "cast_integer_to_cudastream_t", lambda number: f"torch's {number}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    with machine("cuda:0"):
        distance, near = with_faiss.nearest(torch.ones(4, 3).to("cuda:0"), torch.ones(9, 3).to("cuda:0"), 2)
        assert (distance.is_cuda, tuple(distance.shape), near.is_cuda, near.dtype) == (True, (4, 2), True, torch.long)
    assert seen == [("torch's 7", 4, 9, 2)]
    assert resources.stream == "own"

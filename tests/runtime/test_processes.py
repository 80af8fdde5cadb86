import ast
from pathlib import Path

import pytest
import torch

import panda_lightning
from panda_lightning.runtime.processes import objects_of_each, of_each, sum_of_all, world_size
from tests.played import OnGPU

ROOT = Path(panda_lightning.__file__).parent
# what asks nothing of the other processes
HARMLESS = {"get_rank", "get_world_size", "get_backend", "is_available", "is_initialized"}


def test_one_process_sends_nothing():
    values = torch.ones(2)
    assert world_size() == 1
    assert sum_of_all(values) is values
    assert objects_of_each((1, 2)) == [(1, 2)]


@pytest.mark.parametrize("backend", ["gloo", "nccl", "cpu:gloo,cuda:nccl"])
def test_tensors_go_as_the_backend_takes_them_and_come_back_where_they_lay(as_processes, backend):
    def exchange(rank):
        mine = torch.tensor([rank, 10.0 * rank])
        found = [of_each(mine), sum_of_all(mine)]
        if backend == "nccl":
            there = mine.to("cuda:0")
            found += [of_each(there), sum_of_all(there)]
        assert mine.tolist() == [rank, 10.0 * rank]
        return found, [isinstance(one, OnGPU) for one in found], [one.tolist() for one in found]

    for _, places, values in as_processes(3, exchange, backend):
        assert places == [False, False, True, True][: len(places)]
        assert values == [[[0, 0], [1, 10], [2, 20]], [3, 30]] * (len(values) // 2)


def test_a_process_that_sends_a_tensor_of_the_cpu_by_nccl_fails_here_too(as_processes):
    with pytest.raises(RuntimeError, match="device type cpu"):
        as_processes(1, lambda rank: torch.distributed.all_reduce(torch.ones(2)), "nccl")


def test_tensors_are_sent_in_one_place():
    """All others go through it, or through Lightning's strategy; BatchNorm's sums have a gradient and a GPU's input."""
    found, imported = [], set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed"):
                found += [(path.relative_to(ROOT).as_posix(), node.attr)]
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch.distributed"):
                imported.add(path.relative_to(ROOT).as_posix())
    assert {path for path, name in found if name not in HARMLESS} == {"runtime/processes.py"}
    assert imported == {"networks/scratch.py"}

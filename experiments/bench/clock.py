"""Seconds of a piece of work, on a GPU too."""

import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock(work):
    """Seconds of one call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

"""A short name for weights and images, so that what was computed from them is found again and only then."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor], dataset: Any = None, words: str = "") -> str:
    """Sixteen hexadecimal digits made of weights, the very pixels of a data set, and words.

    Args:
        state: Tensors by name.
        dataset: Gives images, see ``ImageDataset.pictures``.
        words: What else makes a difference.
    """
    digest = hashlib.sha256(words.encode())
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for rows in torch.split(torch.arange(len(dataset)), 256) if dataset is not None else ():
        digest.update(dataset.pictures(rows).numpy().tobytes())
    return digest.hexdigest()[:16]

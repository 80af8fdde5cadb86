"""Products in float32, whatever a user or a run has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

SPLIT_SUMS = "allow_bf16_reduced_precision_reduction"


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No products or convolutions in TF32 or bfloat16, whatever was set, nor autocast.

    Products would name wrong candidates; convolutions, which torch computes in TF32 by default, would round what a map
    is smoothed of.
    """
    with ExitStack() as undo:
        undo.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":  # products of bfloat16 that are asked for are summed in float32 to their end
            products = torch.backends.cuda.matmul
            undo.callback(setattr, products, SPLIT_SUMS, getattr(products, SPLIT_SUMS))
            setattr(products, SPLIT_SUMS, False)
        if not hasattr(torch._C, "_get_fp32_precision_getter"):  # torch < 2.9
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        else:
            # A setting without a value of its own reads as the one above it. So, from the top, one that is still low
            # has its own, which can be put back. Not by torch.backends: mkldnn's there sets the one above. Where all
            # have none, cuDNN's convolutions are of TF32, so the one above them gets a value in any case.
            backend = "cuda" if device.type == "cuda" else "mkldnn"
            for setting in (("generic", "all"), *((backend, kind) for kind in ("all", "matmul", "conv"))):
                before = torch._C._get_fp32_precision_getter(*setting)
                if before not in ("none", "ieee") or (setting == ("cuda", "all") and before == "none"):
                    undo.callback(torch._C._set_fp32_precision_setter, *setting, before)
                    torch._C._set_fp32_precision_setter(*setting, "ieee")
        yield

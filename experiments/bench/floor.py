"""The same tensor work as the package's cached run in a bare loop: no Trainer, callbacks, loggers or checkpoints.

python experiments/bench/floor.py NETWORK IMAGES EPOCHS [ORDERS]   prints one line of JSON.
"""

import json
import resource
import sys
import time

import torch

from panda_lightning import Backbone, ImageFolder, KNNIndex, auroc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
def train(network, folder, epochs, orders):
    """Return the AUROC after 0, 1, ... epochs, and seconds by phase."""
    clock, phases = time.perf_counter(), {}

    def lap(name):
        nonlocal clock
        before, clock = clock, time.perf_counter()
        phases.setdefault(name, []).append(clock - before)

    backbone = Backbone.pretrained(f"local-dir:{network}").to(DEVICE)
    data = ImageFolder(root=folder, image_size=224, crop="squash", interpolation=backbone.interpolation)
    data.setup("fit")
    lap("load")
    train_set, test_set = (loader.dataset for loader in (data.normal_dataloader(), data.val_dataloader()))
    lap("decode")
    bank_hidden, test_hidden = (
        torch.cat([backbone.prefix(part.to(DEVICE)) for part in d.pixels.split(128)]) for d in (train_set, test_set)
    )
    lap("prefix")
    params = list(backbone.adapted().values())
    optimizer = torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=5e-5)
    centre, aurocs = None, []
    for epoch in range(-1, epochs):
        for rows in torch.tensor(orders[epoch]).split(32) if epoch >= 0 else ():
            loss = (backbone.suffix(bank_hidden[rows]).float() - centre).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
        lap("train")
        with torch.no_grad():
            bank, queries = (
                torch.cat([backbone.suffix(h).float() for h in hidden.split(128)])
                for hidden in (bank_hidden, test_hidden)
            )
        lap("extract")
        index = KNNIndex().fit(bank)
        lap("index")
        scores = index.search(queries, 2)[0].sum(dim=1).cpu()
        lap("search")
        aurocs.append(auroc(scores, test_set.label))
        lap("metrics")
        centre = bank.mean(dim=0) if centre is None else centre
    return aurocs, {name: sum(times) for name, times in phases.items()}


if __name__ == "__main__":
    start = time.perf_counter()
    found, seconds = train(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gib": peak, "aurocs": found, "phases": seconds}))

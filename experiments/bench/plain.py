"""PANDA-Early written plainly, as a typical research script: the yardstick of `make bench`.

No cache, no layout tricks: float32, DataLoader + PIL, every image decoded and every layer computed each time. It shares
no code with the package but reads the same network and images.

    python experiments/bench/plain.py NETWORK IMAGES EPOCHS

NETWORK is a timm local-dir with a ResNet, IMAGES a folder train/<class>, test/<class>. Prints one line of JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Images(Dataset):
    """Files below a folder, label 1 where their class is not the normal one."""

    def __init__(self, folder, normal, size, mean, std):
        self.files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        self.normal = normal
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.files[i]
        return self.transform(Image.open(path).convert("RGB")), int(path.parent.name != self.normal), i


@torch.no_grad()
def features(model, dataset):
    """(N, D) features and (N,) labels."""
    found, labels = [], []
    for images, label, _ in DataLoader(dataset, batch_size=32, num_workers=2):
        found.append(model.forward_head(model.forward_features(images.to(DEVICE)), pre_logits=True))
        labels.append(label)
    return torch.cat(found), torch.cat(labels).numpy()


def scores(bank, queries, k=2):
    """Sum of the k smallest squared distances."""
    return torch.cdist(queries, bank).square().topk(k, largest=False).values.sum(dim=1).cpu().numpy()


def train(network, folder, epochs, size=224, orders=None):
    """Return the AUROC after 0, 1, ... epochs.

    Args:
        network: timm local-dir.
        folder: Of images.
        epochs: How many.
        size: Of the images in pixels.
        orders: The order of the training images in each epoch, so that another implementation can be compared.
    """
    model = timm.create_model(f"local-dir:{network}", pretrained=True).eval().to(DEVICE)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    normal = next(Path(folder, "train").iterdir()).name
    train_set = Images(Path(folder, "train"), normal, size, mean, std)
    test_set = Images(Path(folder, "test"), normal, size, mean, std)
    params = [*model.layer3.parameters(), *model.layer4.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=5e-5)

    def evaluate():
        bank, _ = features(model, train_set)
        queries, labels = features(model, test_set)
        return roc_auc_score(labels, scores(bank, queries)), bank

    auroc, bank = evaluate()
    aurocs, centre = [auroc], bank.mean(dim=0)
    for epoch in range(epochs):
        order = orders[epoch] if orders else torch.randperm(len(train_set)).tolist()
        for images, _, _ in DataLoader(train_set, batch_size=32, sampler=order, num_workers=2):
            out = model.forward_head(model.forward_features(images.to(DEVICE)), pre_logits=True)
            loss = ((out - centre) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
        aurocs.append(evaluate()[0])
    return aurocs


if __name__ == "__main__":
    start = time.perf_counter()
    found = train(sys.argv[1], sys.argv[2], int(sys.argv[3]), orders=json.loads(sys.argv[4]) if sys.argv[4:] else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gib": peak, "aurocs": found}))

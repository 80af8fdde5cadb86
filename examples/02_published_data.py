"""Compare DN2 and PANDA on a published data set: each class in turn is normal, all others are anomalous.

    python examples/02_published_data.py                                    # scikit-learn's digits
    python examples/02_published_data.py CIFAR10 --root data --backbone resnet152.tv_in1k --image-size 224 \
        --batch-size 32 --grad-clip 0.001 --epochs 15

The second command fetches CIFAR-10, has the published settings of PANDA-Early, and needs a GPU. `panda table` makes
such tables with several seeds, intervals and plots.

It takes about 45 s on two CPU cores, and prints at the end:

    normal class             DN2   PANDA
    0                     0.9981  0.9983
    1                     0.9951  0.9948
    ...
    9                     0.9391  0.9454
    mean                  0.9700  0.9720
"""

import argparse
from statistics import mean

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import DN2, PANDA, AnomalyDataModule


def make_trainer(epochs: int) -> pl.Trainer:
    """A Trainer serves one fit, so each run gets a new one."""
    return pl.Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=CSVLogger("runs", "published_data"),
        enable_checkpointing=False,  # only the table is wanted
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Run both methods on every class and print a table of their AUROC."""
    parser = argparse.ArgumentParser()
    names = ("Digits", "CIFAR10", "CIFAR100", "FashionMNIST", "CatsVsDogs")
    parser.add_argument("data", nargs="?", default="Digits", choices=names)
    parser.add_argument("--root", default="data", help="folder of the data set's files")
    parser.add_argument("--classes", nargs="+", help="normal classes; by default all")
    parser.add_argument("--backbone", default="panda_tiny", help="a timm network, such as resnet50")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--grad-clip", type=float, default=0.3, help="size of PANDA's steps; published: 0.001")
    args = parser.parse_args()

    data_set = AnomalyDataModule.data_sets()[args.data]
    data = data_set(root=args.root, image_size=args.image_size, batch_size=args.batch_size)
    rows = []
    for name in args.classes or data.classes:
        pl.seed_everything(0)
        data.normal_class = name

        trainer = make_trainer(0)
        trainer.test(DN2(args.backbone), data, verbose=False)
        dn2 = float(trainer.callback_metrics["test/auroc"])

        trainer = make_trainer(args.epochs)
        trainer.fit(PANDA(args.backbone, ewc_weight=0, grad_clip=args.grad_clip), data)
        panda = float(trainer.callback_metrics["val/auroc"])
        rows.append((name, dn2, panda))

    rows.append(("mean", mean(row[1] for row in rows), mean(row[2] for row in rows)))
    print(f"\n{'normal class':20} {'DN2':>7} {'PANDA':>7}")
    for name, dn2, panda in rows:
        print(f"{name:20} {dn2:7.4f} {panda:7.4f}")


if __name__ == "__main__":
    main()

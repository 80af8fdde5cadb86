"""Score new pictures, and decide with p-values which of them are anomalous.

    python examples/04_score_and_decide.py                                  # handwritten nines are normal
    python examples/04_score_and_decide.py runs/own_folder/version_0/checkpoints/last.ckpt photos/

The checkpoint is of PANDA, trained with calibration_fraction, as 01_own_folder.py does: p-values compare a score with
those of normal pictures that were held back from training.

It takes about 10 s on two CPU cores, and prints at the end (neighbours are row numbers of the training pictures):

    picture                         score  p-value  decision   nearest normal picture
    0: a 1                          8.212    0.027  anomalous  790
    1: a 3                          4.859    0.324  normal     304
    ...
    468 of 898 pictures are flagged at alpha = 0.05
        among them 4 of the 91 nines
    660 of 898 pictures are flagged at a false discovery rate of 0.1
        among them 11 of the 91 nines
"""

import argparse

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import PANDA, Digits


def train_on_nines() -> PANDA:
    """Train PANDA-Early on nines, and hold 40 % of them back for p-values."""
    pl.seed_everything(0)
    data = Digits(normal_class="9", image_size=64, batch_size=8, calibration_fraction=0.4)
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=0.3)
    trainer = pl.Trainer(max_epochs=3, num_sanity_val_steps=0, logger=CSVLogger("runs", "score_and_decide"))
    trainer.fit(detector, data)
    return detector


def main() -> None:
    """Score pictures, print some of them with their neighbours, and count the decisions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", help="of PANDA; by default the example trains one on digits")
    parser.add_argument("pictures", nargs="?", help="a folder of new pictures; needed with a checkpoint")
    parser.add_argument("--alpha", type=float, default=0.05, help="share of normal pictures that may be flagged")
    args = parser.parse_args()

    if args.checkpoint:
        detector, pictures = PANDA.load_from_checkpoint(args.checkpoint), args.pictures
    else:
        test = Digits().read("test")
        detector, pictures = train_on_nines(), list(test.sources)

    result = detector.score(pictures, alpha=args.alpha)
    names = result.names if args.checkpoint else [f"{i}: a {digit}" for i, digit in enumerate(test.targets)]
    print(f"\nCalibrated with {result.calibration}\n")
    print(f"{'picture':28} {'score':>8} {'p-value':>8}  decision   nearest normal picture")
    for i in range(min(8, len(result))):
        decision = "anomalous" if result.anomalous[i] else "normal"
        print(f"{names[i]:28} {result.score[i]:8.3f} {result.p_value[i]:8.3f}  {decision:9}  {result.neighbours[i, 0]}")

    print()
    rules = {f"alpha = {args.alpha}": result.anomalous, "a false discovery rate of 0.1": result.discoveries(0.1)}
    for rule, flagged in rules.items():
        print(f"{flagged.sum()} of {len(result)} pictures are flagged at {rule}")
        if not args.checkpoint:
            nines = flagged[test.targets == 9]
            print(f"    among them {nines.sum()} of the {len(nines)} nines")


if __name__ == "__main__":
    main()

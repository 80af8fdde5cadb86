"""Pack CIFAR-10 or -100 as images in folders into the official pickles: python experiments/pack_cifar.py FOLDER DATA.

FOLDER holds {train,test}/<class>/, as `../shared/data/unpack` leaves them: cifar10 (JPEG, so a little below the
official pixels), or cifar100 with folders of the fine classes. DATA then serves as --data.root DATA.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.datamodules.official import pack_cifar

if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    pack_cifar(source, target, coarse=len(list((source / "test").iterdir())) == 100)

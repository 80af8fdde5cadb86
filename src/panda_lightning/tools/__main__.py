"""``python -m panda_lightning.tools``: the same as ``panda``."""

import sys

from panda_lightning.__main__ import panda

if __name__ == "__main__":
    sys.exit(panda())

"""``python -m panda_lightning.tools``: the same as ``panda``."""

import sys

from panda_lightning.tools import main

if __name__ == "__main__":
    sys.exit(main())

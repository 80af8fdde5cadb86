"""``python -m panda_lightning``: the same as ``lightning``."""

from panda_lightning.cli import main

if __name__ == "__main__":
    main()

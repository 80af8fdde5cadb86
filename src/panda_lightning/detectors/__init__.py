"""One detection method a file."""

from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.dn2 import DN2
from panda_lightning.detectors.panda import PANDA

__all__ = ["DN2", "PANDA", "Detector"]

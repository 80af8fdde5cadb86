"""One detection method a file."""

from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.deep_svdd import DeepSVDD
from panda_lightning.detectors.dn2 import DN2
from panda_lightning.detectors.msc import MSC
from panda_lightning.detectors.ocsvm import OCSVM
from panda_lightning.detectors.panda import PANDA
from panda_lightning.detectors.panda_oe import PANDAOE
from panda_lightning.detectors.patchcore import PatchCore
from panda_lightning.detectors.rotnet import MultiHeadRotNet
from panda_lightning.detectors.spade import SPADE

__all__ = ["DN2", "MSC", "OCSVM", "PANDA", "PANDAOE", "SPADE", "DeepSVDD", "Detector", "MultiHeadRotNet", "PatchCore"]

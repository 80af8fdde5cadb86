"""PANDA and its family: image anomaly detection with adapted pretrained features, on PyTorch Lightning.

Importing the package makes the short class names (``PANDA``, ``CIFAR10``, ...) known to the command line.
"""

from panda_lightning.callbacks import Predictions, SampleWiseEarlyStopping, SaveOnSignal
from panda_lightning.datamodules import (
    CIFAR10,
    CIFAR100,
    DIOR,
    AnomalyDataModule,
    CatsVsDogs,
    Digits,
    FashionMNIST,
    HyperKvasir,
    ImageFolder,
    MVTecAD,
    UnlabelledImages,
)
from panda_lightning.detectors import (
    DN2,
    MSC,
    OCSVM,
    PANDA,
    PANDAOE,
    SPADE,
    DeepSVDD,
    Detector,
    MultiHeadRotNet,
    PatchCore,
)
from panda_lightning.formulas.metrics import auroc
from panda_lightning.networks.backbones import Backbone
from panda_lightning.networks.pretraining import LabelledFolder, Pretraining
from panda_lightning.runtime.loggers import AutoWandbLogger
from panda_lightning.runtime.results import Results
from panda_lightning.search.knn import KNNIndex
from panda_lightning.types import Batch, PandaError

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DIOR",
    "DN2",
    "MSC",
    "OCSVM",
    "PANDA",
    "PANDAOE",
    "SPADE",
    "AnomalyDataModule",
    "AutoWandbLogger",
    "Backbone",
    "Batch",
    "CatsVsDogs",
    "DeepSVDD",
    "Detector",
    "Digits",
    "FashionMNIST",
    "HyperKvasir",
    "ImageFolder",
    "KNNIndex",
    "LabelledFolder",
    "MVTecAD",
    "MultiHeadRotNet",
    "PandaError",
    "PatchCore",
    "Predictions",
    "Pretraining",
    "Results",
    "SampleWiseEarlyStopping",
    "SaveOnSignal",
    "UnlabelledImages",
    "auroc",
]

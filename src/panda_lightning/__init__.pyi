"""What can be imported from panda_lightning; lazy_loader reads it, see __init__.py."""

from .callbacks import Predictions, SampleWiseEarlyStopping, SaveOnSignal
from .datamodules import (
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
from .detectors import (
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
from .formulas.metrics import auroc
from .networks.backbones import Backbone
from .networks.pretraining import LabelledFolder, Pretraining
from .runtime.loggers import AutoWandbLogger
from .runtime.results import Results
from .search.knn import KNNIndex
from .types import Batch, PandaError

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

"""One data set a file."""

from panda_lightning.datamodules.base import AnomalyDataModule
from panda_lightning.datamodules.cats_vs_dogs import CatsVsDogs
from panda_lightning.datamodules.cifar import CIFAR10, CIFAR100
from panda_lightning.datamodules.digits import Digits
from panda_lightning.datamodules.dior import DIOR
from panda_lightning.datamodules.fashion_mnist import FashionMNIST
from panda_lightning.datamodules.folder import ImageFolder
from panda_lightning.datamodules.hyper_kvasir import HyperKvasir
from panda_lightning.datamodules.mvtec import MVTecAD
from panda_lightning.datamodules.unlabelled import UnlabelledImages

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DIOR",
    "AnomalyDataModule",
    "CatsVsDogs",
    "Digits",
    "FashionMNIST",
    "HyperKvasir",
    "ImageFolder",
    "MVTecAD",
    "UnlabelledImages",
]

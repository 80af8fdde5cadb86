"""One data set a file."""

from panda_lightning.datamodules.base import AnomalyDataModule
from panda_lightning.datamodules.cifar import CIFAR10
from panda_lightning.datamodules.digits import Digits
from panda_lightning.datamodules.folder import ImageFolder

__all__ = ["CIFAR10", "AnomalyDataModule", "Digits", "ImageFolder"]

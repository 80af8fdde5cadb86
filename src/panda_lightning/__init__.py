"""PANDA and its family: image anomaly detection with adapted pretrained features, on PyTorch Lightning.

The names in ``__init__.pyi`` are imported when they are first used, so that importing the package takes no time.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""One job a file."""

from panda_lightning.callbacks.anomaly_maps import AnomalyMaps
from panda_lightning.callbacks.feature_health import FeatureHealth
from panda_lightning.callbacks.health import Health
from panda_lightning.callbacks.media import Media
from panda_lightning.callbacks.predictions import Predictions
from panda_lightning.callbacks.rebuild_index import RebuildIndex
from panda_lightning.callbacks.report import Report
from panda_lightning.callbacks.sample_wise_early_stopping import SampleWiseEarlyStopping
from panda_lightning.callbacks.save_on_signal import SaveOnSignal

__all__ = [
    "AnomalyMaps",
    "FeatureHealth",
    "Health",
    "Media",
    "Predictions",
    "RebuildIndex",
    "Report",
    "SampleWiseEarlyStopping",
    "SaveOnSignal",
]

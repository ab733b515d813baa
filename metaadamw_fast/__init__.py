"""Optimizers with fused kernels that tune themselves: MetaAdamW, whose learning rate and weight decay a tiny encoder scales."""

from .avgrad import AVGrad
from .encoder import EncoderConfig, GroupEncoder
from .features import FeatureConfig
from .mada import MADA
from .meta import MetaLearner, MetaReport, MicroBatches
from .online import OnlineLearner
from .ops import backend_report
from .optimizer import MetaAdamW
from .presets import presets

__version__ = "0.1.0"
__all__ = [
    "MADA",
    "AVGrad",
    "EncoderConfig",
    "FeatureConfig",
    "GroupEncoder",
    "MetaAdamW",
    "MetaLearner",
    "MetaReport",
    "MicroBatches",
    "OnlineLearner",
    "backend_report",
    "presets",
]

"""MetaAdamW with fused kernels: AdamW whose learning rate and weight decay are scaled per parameter group by a tiny encoder."""

from .encoder import EncoderConfig, GroupEncoder
from .features import FeatureConfig
from .meta import MetaLearner, MetaReport, MicroBatches
from .ops import backend_report
from .optimizer import MetaAdamW
from .presets import presets

__version__ = "0.1.0"
__all__ = [
    "EncoderConfig",
    "FeatureConfig",
    "GroupEncoder",
    "MetaAdamW",
    "MetaLearner",
    "MetaReport",
    "MicroBatches",
    "backend_report",
    "presets",
]

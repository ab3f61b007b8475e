"""Smart Bird attention (arXiv 2108.09193) as modules, and what a training does with them."""

from smartbird.nn.attention import LEARNING_ROUTES, SmartBirdAttention
from smartbird.nn.encoder import SmartBirdEncoderLayer
from smartbird.nn.rotary import RotaryEmbedding
from smartbird.nn.sampled import SampledAttention
from smartbird.nn.training import (
    DenseWarmup,
    SampleAnneal,
    SketchStats,
    seed_evaluation,
    sketch_loss,
    sketch_stats,
)

__all__ = [
    "LEARNING_ROUTES",
    "DenseWarmup",
    "RotaryEmbedding",
    "SampleAnneal",
    "SampledAttention",
    "SketchStats",
    "SmartBirdAttention",
    "SmartBirdEncoderLayer",
    "seed_evaluation",
    "sketch_loss",
    "sketch_stats",
]

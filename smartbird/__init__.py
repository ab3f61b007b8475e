"""Content-based sparse attention for PyTorch: a re-implementation of Smart Bird (arXiv 2108.09193).

Low-dimensional sketches score all pairs of tokens, every head samples its own keys from their
probabilities, and attends to those keys only. See ``nn`` for the modules, ``functional`` for the
composed attention, ``ops`` for the operators, ``reference`` for their definition in plain PyTorch,
``inspection`` for what the layers of a model chose, and ``patterns`` and ``plot`` for fixed sets of
keys and for pictures of drawn ones.
"""

from smartbird import functional, inspection, nn, ops, patterns, reference
from smartbird._library import __version__, build_info
from smartbird.nn import (
    DenseWarmup,
    SampleAnneal,
    SampledAttention,
    SketchStats,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    seed_evaluation,
    sketch_loss,
    sketch_stats,
)

__all__ = [
    "DenseWarmup",
    "SampleAnneal",
    "SampledAttention",
    "SketchStats",
    "SmartBirdAttention",
    "SmartBirdEncoderLayer",
    "__version__",
    "build_info",
    "functional",
    "inspection",
    "nn",
    "ops",
    "patterns",
    "reference",
    "seed_evaluation",
    "sketch_loss",
    "sketch_stats",
]

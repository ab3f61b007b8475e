"""Content-based sparse attention for PyTorch: a re-implementation of Smart Bird (arXiv 2108.09193).

A one-head, low-dimensional sketch scores all pairs of tokens, every head samples its own keys from
the sketch's probabilities, and attends to those keys only. See ``ops`` for the operators,
``functional`` for the composed attention, ``reference`` for their definition in plain PyTorch,
``inspection`` for what the layers of a model chose, and ``patterns`` and ``plot`` for fixed sets of
keys and for pictures of drawn ones.
"""

from smartbird import functional, inspection, ops, patterns, reference
from smartbird._library import __version__, build_info
from smartbird.modules import (
    DenseWarmup,
    SampleAnneal,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    seed_evaluation,
    sketch_loss,
)

__all__ = [
    "DenseWarmup",
    "SampleAnneal",
    "SmartBirdAttention",
    "SmartBirdEncoderLayer",
    "__version__",
    "build_info",
    "functional",
    "inspection",
    "ops",
    "patterns",
    "reference",
    "seed_evaluation",
    "sketch_loss",
]

"""Long sequences on several processes, by torch.distributed. See docs/distributed.md.

Its import tells DTensor how to spread ``smartbird.ops.gather_attention`` and ``gather_scores``.
"""

from smartbird.distributed import _sharding as _sharding
from smartbird.distributed.context import ContextParallel

__all__ = ["ContextParallel"]

"""Long sequences on several processes, by torch.distributed. See docs/distributed.md."""

from smartbird.distributed.context import ContextParallel

__all__ = ["ContextParallel"]

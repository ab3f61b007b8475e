"""The processes of one training run: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.learning.tasks.config import RunError
from benchmarks.learning.tasks.data import Batch


class LostRank(RunError):
    """Another process of the run is gone."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Alone, all of it does nothing.

    Every rank has the same weights, takes its share of the sequences of each batch, and adds its
    gradients to those of the others.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and says everything."""
        return self.rank == 0

    def threads(self, otherwise: int) -> int:
        """As many as there are cores for each process of this machine."""
        if self.size == 1:
            return otherwise
        # Not every system says which cores are ours.
        has_own = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_own else os.cpu_count() or 1
        return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)

    def share(self, batch: Batch) -> Batch:
        """This rank's sequences of a batch.

        Raises:
            RunError: there are fewer sequences than ranks.
        """
        if self.size == 1:
            return batch
        sequences = batch.tokens.shape[0]
        if sequences < self.size:
            raise RunError(f"{sequences} sequences a batch are too few for {self.size} processes")
        begin, end = (sequences * rank // self.size for rank in (self.rank, self.rank + 1))
        return Batch(
            batch.tokens[begin:end],
            batch.targets[begin:end],
            None if batch.key_mask is None else batch.key_mask[begin:end],
            None if batch.start is None else batch.start[begin:end],
        )

    def seed(self, *key: int) -> None:
        """Random numbers of this rank that depend on ``key`` alone, and on the number of ranks.

        So a run of several ranks needs no state of random numbers to go on from.
        """
        if self.size > 1:
            state = 0
            for number in (*key, self.size, self.rank):
                state = (state * 1_000_003 + number) % 2**63
            torch.manual_seed(state)

    def sums(self, *numbers: float) -> list[float]:
        """Each number, added up over ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        self._all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank; so all of them do the same."""
        return self.sums(flag)[0] > 0

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every rank the sum of their gradients."""
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:  # not used on this rank, but perhaps on another
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.cat([grad.flatten() for grad in grads])
        self._all_reduce(total)
        parts = torch.split(total, [grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    def _all_reduce(self, x: Tensor) -> None:
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            raise LostRank(
                f"rank {self.rank} lost another process of the run; --resume goes on from its last "
                "checkpoint, with any number of processes"
            ) from error


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun started with this one, by what its environment says."""
    if not dist.is_available():
        yield ALONE
    elif dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield ALONE

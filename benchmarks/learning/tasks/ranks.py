"""The processes of one training run: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.learning.tasks.config import Config, RunError
from benchmarks.learning.tasks.data import IGNORED, Batch
from benchmarks.learning.tasks.model import Encoder
from smartbird.nn import SampledAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from smartbird.distributed import ContextParallel


class LostRank(RunError):
    """Another process of the run is gone."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Alone, all of it does nothing.

    Ranks form groups of neighbours, of one rank or of those that share sequences. Every group takes
    its share of the sequences of each batch, and gradients are added up over all ranks.

    Attributes:
        rank, size: this one, and how many there are.
        fsdp: whether each has a part of the weights only.
        context: how the ranks of a group share sequences. None: each is a group.
        mesh: of the ranks of this group, with `context`.
    """

    rank: int = 0
    size: int = 1
    fsdp: bool = False
    context: ContextParallel | None = None
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and says everything."""
        return self.rank == 0

    @property
    def sharers(self) -> int:
        """Ranks of a group."""
        return 1 if self.context is None else self.context.group.size()

    @property
    def groups(self) -> int:
        return self.size // self.sharers

    @property
    def group(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.sharers

    def threads(self, otherwise: int) -> int:
        """As many as there are cores for each process of this machine."""
        if self.size == 1:
            return otherwise
        # Not every system says which cores are ours.
        has_own = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_own else os.cpu_count() or 1
        return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)

    def spread(self, model: Encoder) -> None:
        """Lets the layers of a model have a part of the tokens, and ranks a part of its weights.

        Raises:
            RunError: its layers need whole sequences.
        """
        # To import what shards takes long.
        if self.context is not None:
            from torch.distributed.tensor.parallel import parallelize_module

            needs = "context_parallel must be 1 with"
            if not model.per_position:
                raise RunError(f"{needs} task {model.config.task}, whose answers are of sequences")
            cores = [getattr(layer.attention, "core", None) for layer in model.layers]
            if any(type(core) is not SampledAttention for core in cores):
                raise RunError(f"{needs} attention {model.config.attention}")
            try:
                parallelize_module(model, self.mesh, {"layers.*.attention": self.context})
            except ValueError as error:
                raise RunError(f"{needs} this attention: {error}") from error
        if self.fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (self.size,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def share(self, batch: Batch) -> Batch:
        """This rank's part of a batch that all groups share.

        Raises:
            RunError: there are fewer sequences than groups.
        """
        sequences = batch.tokens.shape[0]
        if sequences < self.groups:
            raise RunError(f"{sequences} sequences a batch are too few for {self.groups} processes")
        begin, end = (sequences * group // self.groups for group in (self.group, self.group + 1))

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[begin:end]

        return self.cut(
            Batch(
                batch.tokens[begin:end],
                batch.targets[begin:end],
                rows(batch.key_mask),
                rows(batch.positions),
            )
        )

    def cut(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch of its group."""
        if self.context is None:
            return batch
        positions = batch.positions
        if positions is None:
            positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        self.context.length = batch.tokens.shape[1]
        shard = self.context.shard
        return Batch(
            shard(batch.tokens), shard(batch.targets, fill=IGNORED), None, shard(positions)
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
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank; so all of them do the same."""
        return self.sums(flag)[0] > 0

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every rank the sum of their gradients."""
        if self.size == 1:
            return
        parameters = list(parameters)
        if self.fsdp:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.size)  # FSDP took their mean
            return
        for parameter in parameters:
            if parameter.grad is None:  # not used on this rank, but perhaps on another
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(total)
        parts = torch.split(total, [grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Ranks]:
    """Joins the processes that torchrun started with this one, by what its environment says.

    Raises:
        LostRank: another process was gone, in what was done meanwhile.
        RunError: they cannot form groups of ``config.context_parallel``.
    """
    started = dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ
    joins = started and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        yield _ranks(config)
    except RuntimeError as error:
        # What torch says for gloo has no type of its own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LostRank(
            f"rank {dist.get_rank()} lost another process of the run; --resume goes on from its "
            "last checkpoint, with any number of processes"
        ) from error
    finally:
        if joins:
            dist.destroy_process_group()


def _ranks(config: Config) -> Ranks:
    together = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    sharers = config.context_parallel
    if size % sharers:
        raise RunError(
            f"context_parallel must divide the number of processes, {size}, got {sharers}"
        )
    fsdp = config.fsdp and size > 1
    if sharers == 1:
        return Ranks(rank, size, fsdp)
    from torch.distributed.device_mesh import init_device_mesh

    from smartbird.distributed import ContextParallel  # to import it takes long

    mesh = init_device_mesh("cpu", (size // sharers, sharers), mesh_dim_names=("dp", "cp"))
    return Ranks(rank, size, fsdp, ContextParallel(mesh["cp"], config.seq_len), mesh["cp"])

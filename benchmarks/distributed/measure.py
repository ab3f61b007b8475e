"""Times, bytes and memory of attention whose tokens lie on several processes of this machine.

The standing problem of the benchmarks: one causal sequence in float32, H = H_kv = 12, D = 64, S =
16, K = 64. Ranks talk through the loopback device, whose counters say what was moved.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.common.memory import peak_mib, reset_peak
from benchmarks.speed.contenders import Problem, Widths
from smartbird.distributed import ContextParallel, _collectives
from smartbird.functional import smart_bird_attention

_DEVICES = Path("/proc/net/dev")
_SEED = (1, 2)


@dataclasses.dataclass(frozen=True)
class Time:
    """One process with as many threads as there are ranks, and these with a thread each, in turn.

    Attributes:
        length: tokens.
        ranks: processes.
        backward: whether the backward pass is in it.
        one, many: seconds of each repetition; of ``many`` that of the slowest rank.
        waiting: seconds of each repetition of ``many`` that the first rank spent in exchanges.
    """

    length: int
    ranks: int
    backward: bool
    one: list[float]
    many: list[float]
    waiting: list[float]

    @property
    def efficiency(self) -> float:
        return statistics.median(self.one) / statistics.median(self.many)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a rank received, by the counters of the loopback device.

    Attributes:
        exchange: of ``ContextParallel``.
        received: bytes of all ranks in a call.
    """

    length: int
    ranks: int
    exchange: str
    backward: bool
    received: int

    @property
    def of_token(self) -> float:
        """Bytes for each token of the sequence and each rank."""
        return self.received / self.length / self.ranks


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak memory of the rank that takes most, beyond its inputs.

    Attributes:
        ranks: 1 without ContextParallel.
        bytes: of a forward and backward pass.
        inputs: bytes of a rank's own tensors.
    """

    length: int
    ranks: int
    exchange: str
    bytes: int
    inputs: int


def time_attention(length: int, ranks: int, backward: bool, repetitions: int) -> Time:
    """One process beside several, on tokens of the same sequence."""
    times = on_ranks(ranks, functools.partial(_time, length, backward, repetitions))
    return Time(length, ranks, backward, times[0]["one"], times[0]["many"], times[0]["waiting"])


def count_traffic(length: int, ranks: int, exchange: str, backward: bool) -> Traffic:
    """The bytes of one call."""
    received = on_ranks(ranks, functools.partial(_count, length, exchange, backward))
    return Traffic(length, ranks, exchange, backward, received[0])


def measure_memory(length: int, ranks: int, exchange: str) -> Memory:
    """Of a forward and backward pass."""
    peaks = on_ranks(ranks, functools.partial(_peak, length, exchange))
    return Memory(length, ranks, exchange, max(peak for peak, _ in peaks), peaks[0][1])


def on_ranks(size: int, measure: Callable[[], Any]) -> list[Any]:
    """What ``measure`` gives on each rank of a gloo group, as JSON has it."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (size, measure, folder), nprocs=size, start_method="spawn")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]


def _run(rank: int, size: int, measure: Callable[[], Any], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=5),
    )
    try:
        (Path(folder) / str(rank)).write_text(json.dumps(measure()))
    finally:
        dist.destroy_process_group()


# ---- on every rank ------------------------------------------------------------------------------


def _problem(length: int, backward: bool) -> Problem:
    torch.manual_seed(0)
    return Problem.random(
        Widths(), batch=1, length=length, dtype=torch.float32, requires_grad=backward
    )


def _whole(problem: Problem) -> Callable[[], None]:
    """A call of one process."""
    seed = torch.tensor(_SEED)

    def call() -> None:
        out = smart_bird_attention(
            *(problem.q, problem.k, problem.v, problem.q_sketch, problem.k_sketch),
            problem.num_samples,
            is_causal=True,
            seed=seed,
        )
        if out.requires_grad:
            _backward(out, problem.dout, [problem.q, problem.k, problem.v])

    return call


def _sharded(problem: Problem, exchange: str = "auto") -> tuple[list[Tensor], Callable[[], None]]:
    """This rank's tensors, and a call of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    cp = ContextParallel(group, problem.q.shape[2], exchange=exchange)
    sketches = (x.detach() for x in (problem.q_sketch, problem.k_sketch))
    own = [cp.shard(x.detach(), 2) for x in (problem.q, problem.k, problem.v)]
    own = [x.contiguous().requires_grad_(problem.q.requires_grad) for x in own]
    q, k, v = own
    q_sketch, k_sketch = (cp.shard(x, x.dim() - 2).contiguous() for x in sketches)
    dout = cp.shard(problem.dout, 2).contiguous()
    seed, num_samples = torch.tensor(_SEED), problem.num_samples

    def call() -> None:
        out = cp.attention(q, k, v, q_sketch, k_sketch, num_samples, is_causal=True, seed=seed)
        if out.requires_grad:
            _backward(out, dout, own)

    return [*own, q_sketch, k_sketch, dout], call


def _backward(out: Tensor, dout: Tensor, leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    out.backward(dout)


def _time(length: int, backward: bool, repetitions: int) -> dict[str, list[float]]:
    problem = _problem(length, backward)
    _, sharded = _sharded(problem)
    first = dist.get_rank() == 0
    whole = _whole(problem) if first else _nothing
    del problem
    times: dict[str, list[float]] = {"one": [], "many": [], "waiting": []}
    for repetition in range(repetitions + 1):
        dist.barrier()
        torch.set_num_threads(dist.get_world_size())
        one = _seconds(whole)
        torch.set_num_threads(1)
        with _waiting() as waiting:
            dist.barrier()
            many = torch.tensor(_seconds(sharded))
        dist.all_reduce(many, op=dist.ReduceOp.MAX)
        if repetition > 0:  # the first loads and sets up
            for name, seconds in (("one", one), ("many", float(many)), ("waiting", sum(waiting))):
                times[name].append(seconds)
    return times


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """Seconds of every exchange."""
    seconds: list[float] = []
    with_others = _collectives.with_others

    @contextmanager
    def timed(group: str) -> Iterator[Any]:
        start = time.perf_counter()
        with with_others(group) as of:
            yield of
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(_collectives, "with_others", timed):
        yield seconds


def _count(length: int, exchange: str, backward: bool) -> int:
    _, call = _sharded(_problem(length, backward), exchange)
    call()  # connects
    dist.barrier()
    before = _received()
    dist.barrier()
    call()
    dist.barrier()
    return _received() - before


def _received() -> int:
    """Bytes that have come through the loopback device."""
    for line in _DEVICES.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise OSError(f"{_DEVICES} has no device lo")


def _peak(length: int, exchange: str) -> tuple[int, int]:
    alone = dist.get_world_size() == 1
    problem = _problem(length, True)
    if alone:
        call = _whole(problem)
        inputs = [problem.q, problem.k, problem.v, problem.q_sketch, problem.k_sketch, problem.dout]
    else:
        inputs, call = _sharded(problem, exchange)
    del problem
    small = _whole(_problem(256, True)) if alone else _sharded(_problem(256, True), exchange)[1]
    small()  # what libraries take once
    del small
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    reset_peak()
    before = peak_mib()
    call()
    return round((peak_mib() - before) * 2**20), sum(x.nbytes for x in inputs)


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _nothing() -> None:
    """What ranks but the first do in the turn of one process."""

"""Runs cases on several processes of one group, which start once for all of them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Case = Callable[[], None]
IMPORTED = [
    "pytest",
    "torch._dynamo",  # at the first call of a custom op
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def run_on_ranks(size: int, cases: Sequence[Case], folder: Path) -> None:
    """Every case, one after the other, on every rank of a gloo group.

    Raises:
        Exception: of the first rank that failed, with the name of the case.
    """
    # A server that has imported what takes long once forks ranks in no time.
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(_run, (size, list(cases), str(folder)), nprocs=size, start_method="forkserver")


def _run(rank: int, size: int, cases: Sequence[Case], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=1)
    )
    try:
        for case in cases:
            torch.manual_seed(0)
            try:
                case()
            except BaseException as error:  # pytest's own is no Exception
                name = getattr(case, "__name__", case)
                raise AssertionError(f"{name}, rank {rank} of {size}: {error}") from error
    finally:
        dist.destroy_process_group()

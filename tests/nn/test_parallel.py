"""Losses that ride on the output, under what hooks into the outputs of a model: DDP and FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smartbird.nn import SmartBirdEncoderLayer

E, N = 16, 12


def make_model() -> nn.Module:
    torch.manual_seed(0)
    # Every key is drawn: ranks have random numbers of their own.
    options: dict[str, Any] = {"num_samples": N, "sketch_dim": 4, "loss_weight": 0.5}
    return nn.Sequential(
        *(
            SmartBirdEncoderLayer(E, 4, 32, dropout=0.0, batch_first=True, **options)
            for _ in range(2)
        )
    )


def tokens() -> Tensor:
    return torch.randn(4, N, E, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, x: Tensor) -> None:
    """Two passes: errors of bookkeeping show in the second."""
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()


def gradients(kind: str, rank: int, world_size: int) -> dict[str, Tensor]:
    """Gradients on this rank, which has its share of the tokens."""
    model = make_model()
    wrapped = model
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (world_size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        find_unused = kind == "ddp that looks for unused parameters"
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    train(wrapped, tokens().chunk(world_size)[rank])
    return {
        name: p.grad.full_tensor() if kind == "fsdp" else p.grad  # type: ignore[union-attr]
        for name, p in model.named_parameters()
    }


KINDS = ("ddp", "ddp that looks for unused parameters", "fsdp")


def run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        grads = {kind: gradients(kind, rank, world_size) for kind in KINDS}
        torch.save(grads, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_riding_losses_need_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(run, (2, str(tmp_path)), nprocs=2)
    model = make_model()
    train(model, tokens())
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for rank in range(2):
        for kind, grads in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            for name, grad in expected.items():
                torch.testing.assert_close(
                    grads[name], grad, msg=lambda said, of=(kind, name): f"{of}: {said}"
                )

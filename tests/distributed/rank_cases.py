"""What ranks must agree on with one process. Every case runs on every rank, see ranks.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import smartbird
from smartbird import SampledAttention, SmartBirdAttention, SmartBirdEncoderLayer, sketch_loss
from smartbird._visible import check_visible
from smartbird.distributed import ContextParallel
from smartbird.distributed import _collectives as wire
from smartbird.functional import attend, smart_bird_attention
from smartbird.ops import gather_attention, gather_scores
from smartbird.ops.gather import attend_to

K, S, D, DV = 6, 4, 8, 5
SEED = torch.tensor([3, 5])


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def close(actual: Tensor, expected: Tensor) -> None:
    """Up to the rounding of a sum in another order."""
    eps = torch.finfo(expected.dtype).eps
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=16 * eps, atol=16 * eps * max(scale, 1e-3))


# ---- attention of shards ------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    length: int
    heads: tuple[int, int, int, int, int] = (4, 4, 4, 1, 1)  # H, H_kv, H_i, H_s, H_ks
    layout: str = "head_tail"
    batch: int = 2
    dtype: torch.dtype = torch.float32
    masked: bool = False
    packed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the sketches of the whole sequence."""
        H, H_kv, _, H_s, H_ks = self.heads
        sizes = ((H, D), (H_kv, D), (H_kv, DV), (H_s, S), (H_ks, S))
        tensors = (self.normal(heads, width) for heads, width in sizes)
        return tuple(x.requires_grad_() for x in tensors)

    def normal(self, heads: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * heads + width)
        shape = (self.batch, heads, self.length, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def rows(self) -> dict[str, Any]:
        rows = {
            name: self.options[name]
            for name in ("is_causal", "window", "num_sinks")
            if name in self.options
        }
        generator = torch.Generator().manual_seed(7)
        if self.masked:
            mask = torch.rand(2, self.batch, self.length, generator=generator)
            rows |= {"key_mask": mask[0] < 0.7, "global_mask": mask[1] < 0.1}
        if self.packed:
            n = self.length
            cu = torch.tensor([0, n // 4, n // 4, n // 2 + 1, n], dtype=torch.int32)
            ids = torch.tensor([5, 6, 2, 9])
            rows |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "sequence_ids": ids}
        return rows

    def others(self) -> dict[str, Any]:
        rows = ("is_causal", "window", "num_sinks")
        others = {name: x for name, x in self.options.items() if name not in rows}
        return {"method": "gumbel", **others, "num_index_heads": self.heads[2]}


CAUSAL = {"is_causal": True}
PROBLEMS = (
    Problem(37, options=CAUSAL),
    Problem(48, options=CAUSAL),
    Problem(37, layout="contiguous"),
    Problem(1),
    Problem(3, options=CAUSAL),
    Problem(37, (4, 2, 2, 2, 1), options={**CAUSAL, "window": 2, "num_sinks": 1}),
    Problem(29, (4, 2, 4, 4, 2), options={"correction": True, "window": 3}),
    Problem(29, (8, 4, 4, 4, 4), options={**CAUSAL, "correction": True, "dropout_p": 0.3}),
    Problem(29, (4, 4, 1, 1, 1), options={**CAUSAL, "dropout_p": 0.3}),
    Problem(29, (12, 4, 3, 1, 1), "contiguous", options={"dropout_p": 0.3}),
    Problem(31, (4, 2, 4, 1, 1), masked=True, options={"method": "systematic", "correction": True}),
    Problem(31, masked=True, options={**CAUSAL, "method": "multinomial", "correction": True}),
    Problem(61, (4, 2, 2, 2, 2), batch=1, packed=True, options={**CAUSAL, "window": 2}),
    Problem(61, batch=1, packed=True, masked=True, layout="contiguous"),
    Problem(40, dtype=torch.bfloat16, options=CAUSAL),
    Problem(33, (4, 4, 2, 1, 1), dtype=torch.float64, options={"method": "topk", **CAUSAL}),
    Problem(33, options={"method": "dealt", **CAUSAL}),
    Problem(29, (6, 3, 3, 1, 1), options={**CAUSAL, "correction": True, "dropout_p": 0.3}),
)


def draw_and_attend(
    problem: Problem, tensors: tuple[Tensor, ...], visible: Any, attend_keys: Any
) -> tuple[Any, ...]:
    """indices, log_inclusion, out and lse."""
    lses = []

    def keep_lse(*args: Any, **options: Any) -> Any:
        out, lse = attend_keys(*args, **options)
        lses.append(lse)
        return out, lse

    attended = attend(
        *tensors,
        K,
        visible,
        **problem.others(),
        seed=SEED,
        need_indices=True,
        need_log_inclusion=problem.options.get("method") != "dealt",
        attend_keys=keep_lse,
    )
    return attended.indices, attended.log_inclusion, attended.out, lses[0]


def is_possible(exchange: str, problem: Problem) -> bool:
    size, (_, H_kv, H_i, _, _) = dist.get_world_size(), problem.heads
    return exchange != "ulysses" or (H_kv % size == 0 and (H_i % size == 0 or size % H_i == 0))


def draws_and_attention_are_those_of_one_process() -> None:
    for problem in PROBLEMS:
        whole = problem.tensors()
        q, k, v = whole[:3]
        sizes = (problem.batch, problem.length, problem.length, q.device)
        rows = problem.rows()
        visible = check_visible(*sizes, **rows)
        expected = draw_and_attend(problem, whole, visible, attend_to)
        dout = problem.normal(q.shape[1], DV)
        expected[2].backward(dout)
        for exchange in ("all_gather", "ulysses"):
            cp = ContextParallel(world(), problem.length, layout=problem.layout, exchange=exchange)
            call = cp.call(visible)
            own = [cp.shard(x.detach(), 2).requires_grad_() for x in whole]
            sharded = (
                *(call.cut(own[0]), *own[1:3], call.cut(own[3])),
                call.gather(own[4].detach()),
            )
            if not is_possible(exchange, problem):
                with pytest.raises(ValueError, match=r"^exchange must be 'all_gather' or 'auto'"):
                    draw_and_attend(problem, sharded, call.visible, call.attend_to)
                continue
            actual = draw_and_attend(problem, sharded, call.visible, call.attend_to)
            for ours, theirs in zip(actual, expected, strict=True):
                if ours is not None and theirs is not None:
                    exact(ours, call.cut(cp.shard(theirs, 2)))
            assert actual[3] is not None or exchange != "all_gather"
            actual[2].backward(call.cut(cp.shard(dout, 2)))
            exact(own[0].grad, cp.shard(q.grad, 2))
            for ours, theirs in zip(own[1:3], (k, v), strict=True):
                close(ours.grad, cp.shard(theirs.grad, 2))

        # The same by the function.
        cp = ContextParallel(world(), problem.length, layout=problem.layout)
        out, indices = cp.attention(
            *(cp.shard(x.detach(), 2) for x in whole),
            K,
            **rows,
            **problem.others(),
            seed=SEED,
            return_indices=True,
        )
        exact(out, cp.shard(expected[2], 2))
        exact(indices, cp.shard(expected[0], 2, fill=-1))
        exact(cp.unshard(out, 2), expected[2].detach())


def received(run: Callable[[], Any]) -> dict[str, int]:
    """Bytes that this rank is sent by others in a call, by the kind of exchange."""
    ranks = dist.get_world_size()
    bytes_of = {"gathered": 0, "summed": 0, "exchanged": 0}

    def counted(kind: str, collective: Any) -> Any:
        def call(output: Tensor, *args: Any, **options: Any) -> Any:
            output.zero_()  # as a group that only pretends to exchange leaves it
            # Of what is gathered or exchanged a part is this rank's own. Of a sum it is sent the
            # parts of all others.
            shares = ranks - 1 if kind == "summed" else (ranks - 1) / ranks
            bytes_of[kind] += int(output.numel() * output.element_size() * shares)
            return collective(output, *args, **options)

        return call

    with (
        mock.patch.object(wire, "_all_gather", counted("gathered", wire._all_gather)),
        mock.patch.object(wire, "_reduce_scatter", counted("summed", wire._reduce_scatter)),
        mock.patch.object(dist, "all_to_all_single", counted("exchanged", dist.all_to_all_single)),
    ):
        run()
    return bytes_of


def ranks_are_sent_what_the_page_says(
    N: int = 48, exchanges: tuple[str, ...] = ("all_gather", "ulysses")
) -> None:
    """By the formulas of docs/distributed.md, of a training step of the core."""
    ranks = dist.get_world_size()
    problem = Problem(N, (8, 4, 4, 4, 2), batch=1)
    H, H_kv, H_i, _, H_ks = problem.heads
    e = problem.dtype.itemsize
    keys_and_values = e * H_kv * (D + DV)
    sketches, to_distil = e * H_ks * S, e * H_kv * D
    queries_and_outputs = e * H * (D + DV)
    lists = 4 * H_i * K
    for exchange in exchanges:
        core = SampledAttention(H, num_kv_heads=H_kv, num_samples=K, is_causal=True)
        cp = cp_of(N, exchange=exchange)
        parallelize_module(core, mesh_of_all(), cp)
        own = [cp.shard(x.detach(), 2).requires_grad_() for x in problem.tensors()]

        def step(core: SampledAttention = core, own: list[Tensor] = own) -> None:
            (core(*own).sum() + sketch_loss(core)).backward()

        bytes_of = received(step)
        by_all_gather = exchange == "all_gather"
        expected = {
            "gathered": sketches + to_distil + (2 * keys_and_values if by_all_gather else 0),
            "summed": sketches + (keys_and_values if by_all_gather else 0),
            "exchanged": 0
            if by_all_gather
            else (2 * (keys_and_values + queries_and_outputs) + lists) / ranks,
        }
        for kind, bytes_of_token in expected.items():
            assert bytes_of[kind] == bytes_of_token * N * (ranks - 1) / ranks, (exchange, kind)


def defaults_are_those_of_one_process() -> None:
    """A seed that rank 0 draws, and num_index_heads from the heads."""
    problem = Problem(21, (4, 2, 2, 2, 1))
    whole = [x.detach() for x in problem.tensors()]
    torch.manual_seed(5)
    expected = smart_bird_attention(*whole, K, is_causal=True)
    torch.manual_seed(5 + dist.get_rank())
    cp = ContextParallel(world(), problem.length)
    exact(
        cp.unshard(cp.attention(*(cp.shard(x, 2) for x in whole), K, is_causal=True), 2), expected
    )


def tokens_come_back() -> None:
    for length in (1, 7, 24):
        for layout in ("head_tail", "contiguous"):
            cp = ContextParallel(world(), length, layout=layout)
            for x in (
                torch.randn(2, length, 3),
                torch.arange(2 * length).view(2, length),
                torch.rand(1, length) < 0.5,
            ):
                exact(cp.unshard(cp.shard(x)), x)
            positions = cp.positions()
            exact(cp.shard(torch.arange(length), 0, fill=-1) == positions, positions < length)
            # Every rank's part has the gradients of all of them.
            part = cp.shard(torch.randn(length, 3), 0).requires_grad_()
            weight = torch.arange(1.0, length + 1)[:, None]
            (cp.unshard(part, 0) * weight).sum().backward()
            exact(part.grad[:, :1], cp.shard(weight * dist.get_world_size(), 0))


# ---- layers -------------------------------------------------------------------------------------


def mesh_of_all() -> Any:
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def the_core_learns_as_in_one_process() -> None:
    """Loss and gradients of sketches, from draws of rank 0, with all that changes the loss."""
    packed = Problem(41, (4, 2, 2, 2, 1), batch=1, packed=True)
    masked = Problem(26, (4, 4, 4, 4, 2), masked=True)
    for problem, settings in (
        (Problem(26), {**CAUSAL, "loss_weight": 0.7}),
        (Problem(2), {**CAUSAL, "loss_weight": 0.7}),
        (Problem(26, (4, 2, 2, 2, 2)), {"window": 3, "num_sinks": 1, "distill_rows": 9}),
        (Problem(26, (4, 2, 4, 4, 2)), {**CAUSAL, "correction": True, "distill_rows": 1}),
        (masked, {"distill_correction": True, "window": 1}),
        (masked, {**CAUSAL, "uniform_share": 0.4, "temperature": 2.0, "dropout": 0.2}),
        (packed, {**CAUSAL, "window": 2, "distill_rows": 13}),
        (packed, {"method": "dealt", "num_sinks": 1}),
        (Problem(26, (4, 2, 2, 2, 1)), {**CAUSAL, "dense": True, "window": 2}),
        (masked, {"dense": True, "distill_rows": 5, "loss_weight": 0.7}),
    ):
        settings = dict(settings)
        dense = settings.pop("dense", False)
        H, H_kv, H_i, _, _ = problem.heads
        core = SampledAttention(
            H, num_kv_heads=H_kv, num_samples=K, num_index_heads=H_i, **settings
        )
        core.dense = dense
        cp = ContextParallel(world(), problem.length)
        sharded = copy.deepcopy(core)
        parallelize_module(sharded, mesh_of_all(), cp_of(problem.length))
        dout = problem.normal(H, DV)

        def train(
            core: SampledAttention, tensors: tuple[Tensor, ...], dout: Tensor, rows: dict[str, Any]
        ) -> tuple[Tensor, Tensor]:
            out = core(*tensors, **rows)
            loss = (out * dout).sum()
            of_sketch = sketch_loss(core)
            if core.loss_weight is None:
                loss = loss + 0.7 * of_sketch
            loss.backward()
            return out, of_sketch

        whole = problem.tensors()
        torch.manual_seed(11)
        expected = train(core, whole, dout, problem.rows())
        own = tuple(cp.shard(x.detach(), 2).requires_grad_() for x in whole)
        torch.manual_seed(11 + dist.get_rank())
        actual = train(sharded, own, cp.shard(dout, 2), problem.rows())
        (close if dense else exact)(actual[0], cp.shard(expected[0], 2))
        close(actual[1], expected[1])
        for ours, theirs in zip(own, whole, strict=True):
            close(ours.grad, cp.shard(theirs.grad, 2))


def cp_of(length: int, **options: Any) -> ContextParallel:
    return ContextParallel(mesh_of_all(), length, **options)


E = 16


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, E, generator=generator, dtype=torch.float64)


def layers_learn_as_in_one_process() -> None:
    for sketches, kv_heads, exchange, extra in (
        ("layer", 4, "auto", {}),
        ("kv", 2, "all_gather", {"correction": True}),
        ("head", 2, "auto", {"learning": ("distill", "bias")}),
        ("kv", 4, "auto", {"batch_first": False, "rotary": smartbird.nn.RotaryEmbedding()}),
    ):
        torch.manual_seed(0)
        layer = SmartBirdAttention(
            E,
            4,
            num_kv_heads=kv_heads,
            num_sketches=sketches,
            sketch_dim=4,
            num_samples=5,
            is_causal=True,
            loss_weight=0.3,
            dtype=torch.float64,
            **extra,
        )
        sharded = copy.deepcopy(layer)
        x = tokens(2, 27)
        dim = 1 if layer.batch_first else 0
        x = x if layer.batch_first else x.transpose(0, 1)
        cp = cp_of(27, exchange=exchange)
        parallelize_module(nn.ModuleDict({"a": sharded}), mesh_of_all(), {"a": cp})
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        torch.manual_seed(11)
        expected = layer(x)
        (expected * weight).sum().backward()
        torch.manual_seed(11 + dist.get_rank())
        actual = sharded(cp.shard(x, dim))
        (actual * cp.shard(weight, dim)).sum().backward()
        close(actual, cp.shard(expected, dim))
        for (name, ours), theirs in zip(
            sharded.named_parameters(), layer.parameters(), strict=True
        ):
            assert ours.grad is not None, name
            dist.all_reduce(ours.grad)
            close(ours.grad, theirs.grad)

        # In evaluation keys are a function of the sequence, to the last bit in float32 too.
        for each in (layer, sharded):
            each.float().eval()
        x = x.float()
        expected, drawn = layer(x, return_indices=True)
        actual, indices = sharded(cp.shard(x, dim), return_indices=True)
        exact(indices, cp.shard(drawn, 2, fill=-1))
        close(actual, cp.shard(expected, dim))
        # Keys drawn elsewhere.
        if not layer.core.correction:
            close(sharded(cp.shard(x, dim), indices=indices), cp.shard(expected, dim))


def compiled_layers_are_the_same() -> None:
    """In one graph, with both exchanges."""
    for exchange in ("all_gather", "ulysses"):
        options: dict[str, Any] = {"num_samples": 5, "sketch_dim": 4, "loss_weight": 0.3}
        layer = SmartBirdAttention(E, 4, is_causal=True, dtype=torch.float64, **options)
        cp = cp_of(27, exchange=exchange)
        parallelize_module(layer, mesh_of_all(), cp)
        x = cp.shard(tokens(2, 27))
        results = []
        for each in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(3)
            out = each(x)
            out.square().sum().backward()
            results.append((out, *(weight.grad for weight in layer.parameters())))
            layer.zero_grad()
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


# ---- DTensor ------------------------------------------------------------------------------------


def gathered_tensors(heads: tuple[int, int, int], bias_heads: int) -> list[Any]:
    """q, k, v, indices and a bias or None."""
    H, H_kv, H_i = heads
    B, N, M = 4, 8, 12
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    indices = torch.randint(-1, M, (B, H_i, N, K), generator=generator, dtype=torch.int32)
    bias = normal(B, bias_heads, N, K) if bias_heads else None
    return [normal(B, H, N, D), normal(B, H_kv, M, D), normal(B, H_kv, M, DV), indices, bias]


def attend_and_differentiate(tensors: list[Any], weights: tuple[Tensor, ...]) -> list[Any]:
    """Outputs of both gather ops and all gradients of their sum with ``weights``."""
    q, k, v, indices, bias = tensors
    out, lse = gather_attention(q, k, v, indices, bias=bias, return_lse=True)
    scores = gather_scores(q, k, indices).exp()  # 0 where there is no key
    total = sum((x * w).sum() for x, w in zip((out, lse.exp(), scores), weights, strict=True))
    total.backward()
    return [out, lse, scores, *(x.grad for x in (q, k, v, bias) if x is not None)]


def dtensors_are_gathered_where_they_lie() -> None:
    """Forward without a word between ranks, for all that the rules say, and backward."""
    size = dist.get_world_size()
    mesh = mesh_of_all()
    everywhere, batch, heads_, queries = Replicate(), Shard(0), Shard(1), Shard(2)
    by_heads = [heads_, heads_, heads_, heads_, heads_]
    for heads, bias_heads, placements in (
        ((8, 8, 8), 8, [batch] * 5),
        ((8, 4, 8), 0, by_heads),
        ((8, 4, 4), 4, by_heads),
        ((8, 4, 1), 8, [heads_, heads_, heads_, everywhere, heads_]),
        ((8, 4, 1), 1, [heads_, heads_, heads_, everywhere, everywhere]),
        ((8, 1, 1), 0, [heads_, everywhere, everywhere, everywhere, heads_]),
        ((4, 2, 2), 2, [queries, everywhere, everywhere, queries, queries]),
        ((6, 3, 1), 0, [queries, everywhere, everywhere, queries, queries]),
        ((6, 3, 1), 0, [everywhere] * 5),
    ):
        whole = gathered_tensors(heads, bias_heads)
        generator = torch.Generator().manual_seed(1)
        weights = tuple(
            torch.randn(4, heads[0], 8, *width, generator=generator, dtype=torch.float64)
            for width in ((DV,), (), (K,))
        )
        expected = attend_and_differentiate(whole, weights)
        spread = [
            None if x is None else distribute_tensor(x.detach(), mesh, [placement])
            for x, placement in zip(whole, placements, strict=True)
        ]
        for x in spread:
            if x is not None and x.dtype.is_floating_point:
                x.requires_grad_()
        with CommDebugMode() as sent:
            q, k, v, indices, bias = spread
            out = gather_attention(q, k, v, indices, bias=bias)
        assert sent.get_total_counts() == 0, placements
        assert out.placements == (placements[0],)
        actual = attend_and_differentiate(
            spread, tuple(distribute_tensor(w, mesh, [placements[0]]) for w in weights)
        )
        assert actual[3].placements == (placements[0],)
        for ours, theirs in zip(actual, expected, strict=True):
            close(ours.full_tensor(), theirs)

    # What cannot stay is moved: heads that ranks cannot share, and keys.
    heads = (3 * size, 3, 3) if size == 2 else (6, 3, 3)
    whole = gathered_tensors(heads, 0)
    expected_out = gather_attention(*whole[:4])
    for placements in ([heads_] * 4, [queries] * 4):
        spread = [
            distribute_tensor(x.detach(), mesh, [p])
            for x, p in zip(whole[:4], placements, strict=True)
        ]
        close(gather_attention(*spread).full_tensor(), expected_out)

    # Dropout is that of the whole.
    spread = [distribute_tensor(x.detach(), mesh, [batch]) for x in whole[:4]]
    seed = distribute_tensor(SEED, mesh, [everywhere])
    close(
        gather_attention(*spread, dropout_p=0.4, seed=seed).full_tensor(),
        gather_attention(*whole[:4], dropout_p=0.4, seed=SEED),
    )


def dtensors_on_a_mesh_of_two_dimensions() -> None:
    """Batch and heads of four ranks."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = gathered_tensors((8, 4, 4), 0)
    expected = gather_attention(*whole[:4])
    spread = [distribute_tensor(x.detach(), mesh, [Shard(0), Shard(1)]) for x in whole[:4]]
    out = gather_attention(*spread)
    assert out.placements == (Shard(0), Shard(1))
    close(out.full_tensor(), expected)


# ---- data parallel and sharded weights ----------------------------------------------------------


def make_model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    settings = {"num_samples": 12, "sketch_dim": 4, **options}
    return nn.Sequential(
        *(
            SmartBirdEncoderLayer(
                E, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **settings
            )
            for _ in range(2)
        )
    )


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant and not x.requires_grad:
            x = x.detach().requires_grad_()  # or a reentrant checkpoint has nothing to do
        out: Tensor = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return out


def shard_weights(model: nn.Sequential) -> nn.Module:
    for layer in model:
        fully_shard(layer, mesh=mesh_of_all())
    return fully_shard(model, mesh=mesh_of_all())


def replicate(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def replicate_and_look(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def checkpointed(wrap: Callable[[Any], nn.Module], use_reentrant: bool) -> Any:
    def wrapped(model: nn.Sequential) -> nn.Module:
        return wrap(nn.Sequential(*(Checkpointed(layer, use_reentrant) for layer in model)))

    return wrapped


WRAPPERS = (
    replicate,
    replicate_and_look,
    shard_weights,
    checkpointed(replicate, False),
    checkpointed(replicate, True),
    checkpointed(shard_weights, False),
    checkpointed(shard_weights, True),
)


def whole_weights(model: nn.Module) -> list[Tensor]:
    weights = [x.detach() for x in model.parameters()]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in weights]


def train(
    model: nn.Module,
    wrapped: nn.Module,
    loss_of: Callable[[int, int], Tensor],
    steps: int,
    parts: int = 1,
) -> list[Tensor]:
    """The loss of each step, a sum over its parts, and then the weights of the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for part in range(parts):
            loss = loss_of(step, part)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses + whole_weights(model)


def same_training(actual: list[Tensor], expected: list[Tensor], steps: int) -> None:
    """Losses are means over ranks, weights the same on all."""
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if number < steps:
            dist.all_reduce(ours)
            ours = ours / dist.get_world_size()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_parallel_training_is_that_of_one_process(steps: int = 4) -> None:
    """By every wrapper, with the batch in one part and accumulated from two."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for parts in (1, 2):

        def run(wrap: Any, ranks: int, rank: int, parts: int = parts) -> list[Tensor]:
            # A riding loss is not divided by the number of parts, so its weight is. All keys are
            # drawn, as ranks have random numbers of their own.
            model = make_model(loss_weight=0.5 / parts)
            wrapped = wrap(model)

            def loss_of(step: int, part: int) -> Tensor:
                x = normal(step, 4, 12, E).chunk(parts)[part].chunk(ranks)[rank]
                return (wrapped(x) - x.roll(1, 1)).square().mean() / parts

            return train(model, wrapped, loss_of, steps, parts)

        expected = run(lambda model: model, 1, 0)
        for wrap in WRAPPERS:
            same_training(run(wrap, size, rank), expected, steps)


def context_parallel_training(
    mesh: Any, sequences: int, wrap: Any, **settings: Any
) -> list[Tensor]:
    """Sequences on the ranks of ``mesh``, a share of them on each of as many groups as there are.

    Where the mesh is None, in one process.
    """
    length, ranks = 22, 1
    model = make_model(is_causal=True, loss_weight=0.5, **settings)
    groups, group = 1, 0
    if mesh is not None:
        ranks = dist.get_world_size()
        groups, group = ranks // mesh.size(), dist.get_rank() // mesh.size()
        cp = ContextParallel(mesh, length)
        for layer in model:
            parallelize_module(layer, mesh, {"self_attn": cp})
            # Wrappers take the mean of what must be added up over the ranks of a group.
            layer.self_attn.core.loss_weight *= mesh.size()
    wrapped = wrap(model)

    def loss_of(step: int, part: int) -> Tensor:
        x = normal(step, sequences, length, E).chunk(groups)[group]
        target, weight = x.roll(1, 1), torch.ones(1, length, 1, dtype=torch.float64)
        torch.manual_seed(step)
        if mesh is not None:
            torch.manual_seed(step + 100 * (dist.get_rank() % mesh.size()))
            x, target, weight = (cp.shard(each) for each in (x, target, weight))
        # A sum over this rank's tokens by the number of all of them, and times the ranks.
        loss = ((wrapped(x) - target).square() * weight).sum() / (sequences * length * E)
        return loss * ranks

    return train(model, wrapped, loss_of, STEPS)


STEPS = 3


def context_parallel_training_is_that_of_one_process() -> None:
    settings = {"num_samples": 4, "num_kv_heads": 2, "num_sketches": "kv"}
    expected = context_parallel_training(None, 2, lambda model: model, **settings)
    for wrap in WRAPPERS:
        actual = context_parallel_training(mesh_of_all(), 2, wrap, **settings)
        same_training(actual, expected, STEPS)


def context_and_data_parallel_training_is_that_of_one_process() -> None:
    """Two sequences on two pairs of ranks, weights over all four of them."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    expected = context_parallel_training(None, 2, lambda model: model, num_samples=22)
    for wrap in (shard_weights, replicate):
        actual = context_parallel_training(mesh["cp"], 2, wrap, num_samples=22)
        same_training(actual, expected, STEPS)


# ---- what is refused ----------------------------------------------------------------------------


def what_is_not_served_is_refused() -> None:
    mesh = mesh_of_all()
    for wrong, error, said in (
        ({"mesh": "cpu"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"length": 8.0}, TypeError, "length must be an int"),
        ({"layout": "ring"}, ValueError, "layout must be one of head_tail, contiguous"),
        ({"exchange": "ring"}, ValueError, "exchange must be one of auto, all_gather, ulysses"),
    ):
        with pytest.raises(error, match=said):
            ContextParallel(**{"mesh": mesh, "length": 8, **wrong})
    two = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match="mesh must have one dimension, got 2"):
        ContextParallel(two, 8)

    cp = ContextParallel(mesh, 8 + 8 * (dist.get_rank() == 1))
    whole = [torch.zeros(1, 2, cp.length, 4) for _ in range(3)]
    whole += [torch.zeros(1, cp.length, 4) for _ in range(2)]
    own = [cp.shard(x, x.dim() - 2) for x in whole]
    with pytest.raises(RuntimeError, match=r"ranks must agree .*: rank \d has .* length=\d+"):
        cp.attention(*own, K)

    cp = ContextParallel(mesh, 8)
    with pytest.raises(ValueError, match=r"x must have 8 tokens in dimension 1"):
        cp.shard(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"x must have \d+ tokens in dimension 0"):
        cp.unshard(torch.zeros(9), 0)
    with pytest.raises(ValueError, match="dim must be a dimension of x"):
        cp.shard(torch.zeros(8))

    problem = Problem(8)
    own = [cp.shard(x.detach(), 2) for x in problem.tensors()]
    longer = [torch.cat([x, x], 2) for x in own]
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for arguments, options, error, said in (
        (longer, {}, ValueError, r"q must have \d+ tokens in dimension 2, by length=8 and"),
        (own[:1] + longer[1:3] + own[3:4] + longer[4:], {}, ValueError, r"k must have \d+ tokens"),
        (own, {"query_offset": 0}, TypeError, "unexpected keyword argument 'query_offset'"),
        (own, {"first_head": 0}, TypeError, "unexpected keyword argument 'first_head'"),
        (own, {"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"key_mask must be"),
        (
            [x[:1] for x in own],
            {"cu_seqlens_q": cu, "cu_seqlens_k": cu},
            ValueError,
            "cu_seqlens_q must end at the length of the whole sequence, 8, got 4",
        ),
    ):
        with pytest.raises(error, match=said):
            cp.attention(*arguments, K, **options)

    core = SampledAttention(4, num_samples=K)
    parallelize_module(core, mesh, cp)
    mask = torch.ones(2, 8, dtype=torch.bool)
    for options, said in (
        ({"query_mask": mask}, "query_mask must be None under ContextParallel"),
        ({"query_offset": 3}, "query_offset must be None under ContextParallel"),
        ({"first_head": 1}, "first_head must be 0 under ContextParallel"),
    ):
        with pytest.raises(ValueError, match=said):
            core(*own, **options)
    with (
        pytest.raises(ValueError, match="observer must be None under ContextParallel"),
        smartbird.sketch_stats(core),
    ):
        core(*own)

    layer = SmartBirdAttention(E, 4, num_samples=K, sketch_dim=4, dtype=torch.float64)
    parallelize_module(layer, mesh, cp)
    x = cp.shard(tokens(2, 8))
    with pytest.raises(ValueError, match="key_mask must be None under ContextParallel"):
        layer(x, key_mask=torch.ones(x.shape[:2], dtype=torch.bool))
    nested = torch.nested.nested_tensor(list(x), layout=torch.jagged)
    with pytest.raises(ValueError, match="query must not be nested under ContextParallel"):
        layer(nested)
    with pytest.raises(ValueError, match=r"key must have \d+ tokens in dimension 1, by length=8"):
        layer(x, torch.cat([x, x], 1))
    for module, style, error, said in (
        (nn.Linear(2, 2), cp, TypeError, "must be applied to SampledAttention"),
        (
            SmartBirdAttention(E, 4, learning=("value",)),
            cp,
            ValueError,
            "learning must be without 'value'",
        ),
        (core, ContextParallel(two["cp"], 8), ValueError, "device_mesh must be of the ranks"),
    ):
        with pytest.raises(error, match=said):
            parallelize_module(module, mesh, style)

    with pytest.raises(ValueError, match=r"indices"):
        core.eval()(*own, indices=torch.full((2, 4, own[0].shape[2], 2), 99, dtype=torch.int32))


def an_error_on_one_rank_ends_the_wait_of_the_others() -> None:
    """What only one rank can see to be wrong: a sketch that is not a number."""
    own = [x.detach() for x in Problem(8).tensors()]
    group = dist.new_group(timeout=timedelta(seconds=1))
    cp = ContextParallel(group, 8)
    own = [cp.shard(x, 2) for x in own]
    if dist.get_rank() == 1:
        own[3][:] = torch.nan
        with pytest.raises(ValueError, match="q_sketch"):
            cp.attention(*own, K, is_causal=True)
    else:
        with pytest.raises(dist.DistBackendError, match=r"rank 0 of the 2 .* has lost the others"):
            cp.attention(*own, K, is_causal=True)


def the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    text = page.read_text() if page.exists() else ""  # of a tree of tests alone
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        with mock.patch.object(dist, "init_process_group"):  # there is one
            exec(compile(block, "docs/distributed.md", "exec"), {})


def every_number_of_ranks() -> tuple[Callable[[], None], ...]:
    return (
        tokens_come_back,
        draws_and_attention_are_those_of_one_process,
        defaults_are_those_of_one_process,
        the_core_learns_as_in_one_process,
        layers_learn_as_in_one_process,
    )

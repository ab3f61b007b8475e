"""Sizes and settings at which the CUDA kernels take another way; right on every backend."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from cases import (
    CASE,
    DTYPES,
    Backend,
    Case,
    check_against_reference,
    make_inputs,
)
from torch import Tensor

pytestmark = pytest.mark.sanitized

# Head dims of every row layout, few and many queries, more slots than a query keeps on chip.
LAYOUTS = [
    Case(f"D={D}", B=1, N=3, M=40, H=2, H_kv=1, H_i=2, D=D, Dv=D, K=33)
    for D in (8, 32, 64, 128, 192, 256)
]
# For each multiprocessor: enough that no query is shared by the warps of a block.
QUERIES_PER_PROCESSOR = 10
MANY_QUERIES = Case("many_queries", B=2, N=40, M=50, H=4, H_kv=2, H_i=4, D=32, Dv=32, K=40)
MANY_SLOTS = Case("many_slots", B=1, N=2, M=50, H=2, H_kv=1, H_i=1, K=1100)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LAYOUTS, MANY_QUERIES, MANY_SLOTS, CASE["gqa"]], ids=str)
def test_attention(backend: Backend, case: Case, dtype: torch.dtype, deterministic: bool) -> None:
    """The fixture asks for deterministic algorithms and takes that back at the end."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if case is MANY_QUERIES and backend.device.type == "cuda":
        processors = torch.cuda.get_device_properties(backend.device).multi_processor_count
        case = dataclasses.replace(case, N=QUERIES_PER_PROCESSOR * processors // (case.B * case.H))
    x = make_inputs(case, dtype, backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = ops.gather_scores(q, k, x.indices)
        return *ops.gather_attention(q, k, v, x.indices, return_lse=True), scores

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


@pytest.mark.parametrize("S", [8, 16, 24, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sketch_dims(backend: Backend, dtype: torch.dtype, S: int) -> None:
    case = Case("sketch", B=1, N=19, M=75, S=S, is_causal=True, masked=False)
    x = make_inputs(case, dtype, backend.device)

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        q, k = x.q.to(q_sketch.dtype), x.k.to(q_sketch.dtype)
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, is_causal=True)
        return ops.sketch_lse(q_sketch, k_sketch, is_causal=True), loss

    check_against_reference(backend.ops, run, x.q_sketch, x.k_sketch)


@pytest.mark.parametrize("M", [20_000, 30_000, 70_000, 150_000])
@pytest.mark.parametrize("method", ["gumbel", "systematic", "topk"])
def test_long_rows(backend: Backend, method: str, M: int) -> None:
    """Keys by the thousand for each lane. Here two hundred keys hold all mass."""
    K = 200
    k_sketch = torch.full((1, M, 1), -200.0)
    likely = torch.randperm(M, generator=torch.Generator().manual_seed(1))[:K].sort().values
    k_sketch[0, likely] = torch.rand(K, 1, generator=torch.Generator().manual_seed(2))
    indices, log_inclusion = backend.ops.sketch_sample(
        torch.ones(1, 2, 1, device=backend.device),
        k_sketch.to(backend.device),
        K,
        scale=1.0,
        method=method,
        seed=torch.tensor([1, 2], device=backend.device),
    )
    assert torch.equal(indices.cpu(), likely.int().expand(1, 1, 2, K))
    assert (log_inclusion > -1e-3).all()

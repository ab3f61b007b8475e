"""sampled_attention is sketch_sample and gather_attention in one op, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASE, CASES, DTYPES, METHODS, Backend, Case, Inputs, make_inputs
from torch import Tensor

from smartbird._checks import check_sketches
from smartbird._visible import check_visible
from smartbird.ops.sampled import sampled_attention

pytestmark = pytest.mark.one_order

DROPOUT, FIRST_HEAD = 0.3, 4


def by_one_op(x: Inputs, method: str, correction: bool) -> Tensor:
    case = x.case
    visible = check_visible(
        *(case.B, case.N, case.M, x.q.device), **x.rows(), first_head=FIRST_HEAD
    )
    return sampled_attention(
        *(x.q, x.k, x.v, *check_sketches(x.q_sketch, x.k_sketch), case.K),
        visible,
        num_index_heads=case.H_i,
        method=method,
        correction=correction,
        scale=0.4,
        sketch_scale=0.6,
        dropout_p=DROPOUT,
        seed=x.seed,
    )


def by_two(x: Inputs, method: str, correction: bool, ops: Any) -> Tensor:
    rows = {**x.sampling(), "first_head": FIRST_HEAD}
    indices, log_inclusion = ops.sketch_sample(
        *(x.q_sketch, x.k_sketch, x.case.K), method=method, scale=0.6, **rows
    )
    arithmetic = torch.promote_types(x.q.dtype, torch.float32)
    offset = x.query_offset
    if offset is None and x.cu_seqlens_q is None:
        offset = x.case.M - x.case.N
    elif offset is None:  # gather_attention knows of no keys: their difference, of each sequence
        offset = (x.cu_seqlens_k.diff() - x.cu_seqlens_q.diff()).long()
    out: Tensor = ops.gather_attention(
        *(x.q, x.k, x.v, indices),
        bias=-log_inclusion.to(arithmetic) if correction else None,
        scale=0.4,
        dropout_p=DROPOUT,
        seed=x.seed,
        query_offset=offset,
        cu_seqlens_q=x.cu_seqlens_q,
        first_head=FIRST_HEAD,
    )
    return out


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_two_ops(backend: Backend, case: Case, method: str, correction: bool) -> None:
    x = make_inputs(case, torch.float32, backend.device)
    expected = by_two(x, method, correction, backend.ops)
    assert torch.equal(by_one_op(x, method, correction), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["packed_forced", "past_the_tiles", "sketches"])
def test_gradients_are_those_of_the_two_ops(
    backend: Backend, name: str, method: str, dtype: torch.dtype
) -> None:
    x = make_inputs(CASE[name], dtype, backend.device)
    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    results = []
    for out in (by_one_op(x, method, True), by_two(x, method, True, backend.ops)):
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        total = (out * weights.to(dtype)).sum()
        results.append((out.detach(), *torch.autograd.grad(total, inputs)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_else_has_a_gradient(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    x.q_sketch.requires_grad_()
    out = by_one_op(x, "gumbel", False)
    (gradient,) = torch.autograd.grad(out.sum(), [x.q_sketch], allow_unused=True)
    assert gradient is None

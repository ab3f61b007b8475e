"""Every dispatcher op through torch.library.opcheck: schema, fake kernel, autograd, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASE, DTYPES, METHODS, Backend, Case, drawn_entries, make_inputs

SMALL = Case("small", B=2, N=6, M=9, H=4, H_kv=2, H_i=2, D=8, Dv=6, S=4, K=3, is_causal=True)
PROBLEMS = [
    SMALL,
    Case("masked", B=2, N=6, M=9, H=4, H_kv=2, H_i=2, D=8, Dv=6, S=4, K=3, masked=True),
    CASE["strided"],
    CASE["empty_batch"],
    CASE["no_queries"],
    CASE["no_keys"],
]


def samples(op: str, case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """Argument lists of ``op`` on one problem, with inputs that require gradients."""
    x = make_inputs(case, dtype, device)
    floats = (x.q, x.k, x.v, x.q_sketch, x.k_sketch)
    q, k, v, q_sketch, k_sketch = (t.detach().requires_grad_() for t in floats)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    slots = (case.B, case.H, case.N, case.K)
    bias = torch.randn(slots, dtype=arithmetic, device=device).requires_grad_()
    masks = (case.is_causal, x.key_mask)
    ops = torch.ops.smartbird

    if op == "sketch_sample":
        return [
            (x.q_sketch, x.k_sketch, case.K, 2, method, 0.5, *masks, 1, 1, x.seed, need)
            for method in METHODS
            for need in (True, False)
        ]
    if op == "gather_scores":
        return [(q, k, x.indices, 0.5)]
    if op == "gather_attention":
        return [
            (q, k, v, x.indices, None, 0.5, 0.0, None),
            (q, k, v, x.indices, bias, 0.5, 0.3, x.seed),
        ]
    if op == "sampled_attention":
        inputs = (x.q, x.k, x.v, x.q_sketch, x.k_sketch, case.K, 2)
        return [
            (*inputs, method, correction, 0.5, 0.3, *masks, 1, 1, 0.2, x.seed)
            for method in METHODS
            for correction in (True, False)
        ]
    if op == "sketch_lse":
        return [(q_sketch, k_sketch, 0.5, *masks)]
    if op == "summed_attention":
        return [(x.q, x.k, k_sketch, 0.5, *masks)]
    if op == "sampled_distill":
        indices, log_inclusion = drawn_entries(x)
        inputs = (x.q, x.k, q_sketch, k_sketch, indices)
        return [(*inputs, b, 0.5, 0.3, *masks, True) for b in (None, -log_inclusion.to(arithmetic))]
    if op == "gather_scores_backward":
        dscores = torch.randn(slots, device=device).to(dtype)
        return [(dscores, x.q, x.k, x.indices, 0.5)]
    if op == "gather_attention_backward":
        out, lse = ops.gather_attention(x.q, x.k, x.v, x.indices, None, 0.5, 0.0, None)
        common = (x.q, x.k, x.v, x.indices)
        return [
            (out, dlse, *common, b, 0.5, p, x.seed if p else None, *needed)
            for dlse, b, p in ((None, None, 0.0), (torch.ones_like(lse), bias.detach(), 0.3))
            for needed in (
                (True, True, b is not None),
                (True, False, False),
                (False, True, False),
            )
        ]
    if op == "sketch_lse_backward":
        lse = ops.sketch_lse(x.q_sketch, x.k_sketch, 0.5, *masks)
        return [(torch.ones_like(lse), x.q_sketch, x.k_sketch, lse, 0.5, *masks)]
    if op == "summed_attention_backward":
        out, lse = ops.summed_attention(x.q, x.k, x.k_sketch, 0.5, *masks)
        return [(out, x.q, x.k, lse, 0.5, *masks)]
    raise AssertionError(f"no samples for {op}")


OPS = (
    "sketch_sample",
    "gather_scores",
    "gather_scores_backward",
    "gather_attention",
    "gather_attention_backward",
    "sampled_attention",
    "sketch_lse",
    "sketch_lse_backward",
    "summed_attention",
    "summed_attention_backward",
    "sampled_distill",
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_opcheck(backend: Backend, case: Case, op: str) -> None:
    for arguments in samples(op, case, torch.float32, backend.device):
        torch.library.opcheck(getattr(torch.ops.smartbird, op).default, arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_dtypes(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Schema and fake kernel: the dtype of every result."""
    for arguments in samples(op, SMALL, dtype, backend.device)[:2]:
        torch.library.opcheck(
            getattr(torch.ops.smartbird, op).default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_every_op_is_checked(backend: Backend) -> None:
    """A tensor op that is registered but not listed above fails here."""
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.partition("::")[2] for s in schemas if s.name.startswith("smartbird::")}
    takes_tensors = {
        name
        for name in names
        if any(
            "Tensor" in str(a.type)
            for a in getattr(torch.ops.smartbird, name).default._schema.arguments
        )
    }
    assert takes_tensors == set(OPS)

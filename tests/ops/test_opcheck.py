"""Every dispatcher op through torch.library.opcheck: schema, fake kernel, autograd, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASE, DTYPES, METHODS, Backend, Case, drawn_entries, make_inputs

from smartbird._checks import check_sketches
from smartbird._visible import check_visible

pytestmark = pytest.mark.one_order

SIZES: dict[str, Any] = {"N": 6, "M": 9, "H": 4, "H_kv": 2, "H_i": 2, "D": 8, "Dv": 6, "S": 4}
SMALL = Case("small", K=5, is_causal=True, **SIZES)
PACKED = Case("packed", B=1, K=5, lengths=((2, 4), (3, 3)), query_offset=1, **SIZES)
PROBLEMS = [
    SMALL,
    Case("masked", K=5, masked=True, **SIZES),
    Case("offsets", K=5, own_offsets=True, has_globals=True, H_s=2, H_ks=1, **SIZES),
    PACKED,
    CASE["strided"],
    CASE["empty_batch"],
    CASE["no_queries"],
    CASE["no_keys"],
]
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def samples(op: str, case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """Argument lists of ``op`` on one problem, with inputs that require gradients."""
    x = make_inputs(case, dtype, device)
    sketches = check_sketches(x.q_sketch, x.k_sketch)
    floats = (x.q, x.k, x.v, *sketches)
    q, k, v, q_sketch, k_sketch = (t.detach().requires_grad_() for t in floats)
    num_sketches, num_key_sketches = q_sketch.shape[1], k_sketch.shape[1]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    slots = (case.B, case.H, case.N, case.K)
    bias = torch.randn(slots, dtype=arithmetic, device=device).requires_grad_()
    rows = x.rows() | {"window": 1, "num_sinks": 1}
    visible = check_visible(case.B, case.N, case.M, device, **rows)
    drawing = visible.sampling()
    masks = visible.residual().dense()
    dropout = (0.3, x.seed, *visible.dropout())
    no_dropout = (0.0, None, None, None, None, None, 0)
    ops = torch.ops.smartbird

    if op == "sketch_sample":
        return [
            (*sketches, case.K, 2, method, 0.5, *drawing, x.seed, need)
            for method in METHODS
            for need in (True, False)
        ]
    if op == "gather_scores":
        return [(q, k, x.indices, 0.5)]
    if op == "gather_attention":
        return [
            (q, k, v, x.indices, None, 0.5, *no_dropout),
            (q, k, v, x.indices, bias, 0.5, *dropout),
        ]
    if op == "sampled_attention":
        return [
            (q, k, v, *sketches, case.K, 2, method, correction, 0.5, 0.3, *drawing, 0.2, x.seed)
            for method in METHODS
            for correction in (True, False)
        ]
    if op == "sketch_lse":
        return [(q_sketch, k_sketch, 0.5, *masks)]
    if op == "summed_attention":
        return [(x.q, x.k, k_sketch, num_sketches, 0.5, *masks)]
    if op == "sampled_distill":
        indices, log_inclusion = drawn_entries(x)
        inputs = (x.q, x.k, q_sketch, k_sketch, indices)
        return [
            (*inputs, b, 0.5, 0.3, *masks, mean, need_grads)
            for b in (None, -log_inclusion.to(arithmetic))
            for mean, need_grads in ((True, True), (False, True), (True, False))
        ]
    if op == "gather_scores_backward":
        dscores = torch.randn(slots, device=device).to(dtype)
        return [(dscores, x.q, x.k, x.indices, 0.5)]
    if op == "gather_attention_backward":
        out, lse = ops.gather_attention(x.q, x.k, x.v, x.indices, None, 0.5, *no_dropout)
        common = (x.q, x.k, x.v, x.indices)
        return [
            (out, dlse, *common, b, 0.5, *dropped, *needed)
            for dlse, b, dropped in (
                (None, None, no_dropout),
                (torch.ones_like(lse), bias.detach(), dropout),
            )
            for needed in (
                (True, True, b is not None),
                (True, False, False),
                (False, True, False),
            )
        ]
    if op == "sketch_lse_backward":
        lse = ops.sketch_lse(*sketches, 0.5, *masks)
        return [(torch.ones_like(lse), *sketches, lse, 0.5, *masks)]
    if op == "summed_attention_backward":
        out, lse = ops.summed_attention(x.q, x.k, sketches[1], num_sketches, 0.5, *masks)
        return [(out, x.q, x.k, lse, num_key_sketches, 0.5, *masks)]
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
        torch.library.opcheck(
            getattr(torch.ops.smartbird, op).default, arguments, test_utils=QUICK_CHECKS
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
def test_opcheck_traced(backend: Backend, case: Case, op: str) -> None:
    """Forward and backward pass through AOTAutograd, with sizes that are symbols."""
    arguments = samples(op, case, torch.float32, backend.device)
    for some in (arguments[0], arguments[-1]) if len(arguments) > 1 else arguments:
        torch.library.opcheck(getattr(torch.ops.smartbird, op).default, some)


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
    """A tensor op that is registered but not listed above fails here.

    Those that name a group of processes are tested in tests/distributed.
    """
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.partition("::")[2] for s in schemas if s.name.startswith("smartbird::")}
    arguments = {
        name: getattr(torch.ops.smartbird, name).default._schema.arguments for name in names
    }
    takes_tensors = {
        name
        for name, taken in arguments.items()
        if any("Tensor" in str(a.type) for a in taken) and all(a.name != "group" for a in taken)
    }
    assert takes_tensors == set(OPS)

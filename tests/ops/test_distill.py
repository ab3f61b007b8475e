"""sketch_lse and distill_loss of the compiled extension, forward and backward."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from cases import (
    CASE,
    DTYPES,
    PROBLEMS,
    Backend,
    Case,
    Inputs,
    assert_accurate,
    check_against_reference,
    drawn_entries,
    leaves,
    make_inputs,
    results_and_gradients,
)
from torch import Tensor

from smartbird import reference

TARGETS = ("dense", "sampled", "corrected")
SMALL = Case("small", B=2, N=4, M=5, H=4, H_kv=2, H_i=2, D=3, Dv=2, S=2, K=3, masked=True)


def target_keywords(x: Inputs, target: str) -> dict[str, Tensor]:
    """Dense, or with replacement so that duplicates occur, with or without log_inclusion."""
    if target == "dense":
        return {}
    indices, log_inclusion = drawn_entries(x)
    if target == "sampled":
        return {"indices": indices}
    return {"indices": indices, "log_inclusion": log_inclusion}


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS)
def test_sketch_lse(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        return (ops.sketch_lse(q_sketch, k_sketch, **x.rows()),)

    check_against_reference(backend.ops, run, x.q_sketch, x.k_sketch)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("case", "dtype"), PROBLEMS)
def test_distill_loss(backend: Backend, case: Case, target: str, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)
    keywords = target_keywords(x, target) | x.rows()

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        q, k = x.q.to(q_sketch.dtype), x.k.to(q_sketch.dtype)
        return (ops.distill_loss(q, k, q_sketch, k_sketch, **keywords),)

    check_against_reference(backend.ops, run, x.q_sketch, x.k_sketch)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["globals", "offsets", "packed_forced", "packed_offsets"])
def test_rows_asked_for(backend: Backend, name: str, target: str, reduction: str) -> None:
    """In any order, one of them twice."""
    x = make_inputs(CASE[name], torch.float32, backend.device)
    rows = torch.tensor([7, 0, 7, x.case.N - 1, 3], device=backend.device)
    keywords = target_keywords(x, target) | x.rows() | {"rows": rows, "reduction": reduction}

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        q, k = x.q.to(q_sketch.dtype), x.k.to(q_sketch.dtype)
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, **keywords)
        return loss, ops.sketch_lse(q_sketch, k_sketch, rows=rows, **x.rows())

    check_against_reference(backend.ops, run, x.q_sketch, x.k_sketch)


@pytest.mark.parametrize("target", TARGETS)
def test_no_rows_asked_for(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["globals"], torch.float32, backend.device)
    keywords = target_keywords(x, target) | x.rows()
    keywords["rows"] = torch.zeros(0, dtype=torch.int64, device=backend.device)
    q_sketch, k_sketch = leaves(x.q_sketch, x.k_sketch)
    loss = backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **keywords)
    loss.backward()
    assert loss == 0
    assert (q_sketch.grad == 0).all()
    assert (k_sketch.grad == 0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_who_the_rows_are_does_not_matter(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["packed_forced"], torch.float32, backend.device)
    keywords = target_keywords(x, target) | x.rows()
    ids = torch.tensor([5, 1, 9, 0, 2, 3, 4], device=backend.device)
    losses = [
        backend.ops.distill_loss(x.q, x.k, x.q_sketch, x.k_sketch, **keywords, **who)
        for who in ({}, {"sequence_ids": ids, "first_head": 3})
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("target", TARGETS)
def test_scales(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["gqa"], torch.float64, backend.device)
    keywords = target_keywords(x, target)

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        loss = ops.distill_loss(
            x.q, x.k, q_sketch, k_sketch, scale=0.3, sketch_scale=1.7, **keywords
        )
        return loss, ops.sketch_lse(q_sketch, k_sketch, scale=1.7)

    check_against_reference(backend.ops, run, x.q_sketch, x.k_sketch)


@pytest.mark.parametrize("target", TARGETS)
def test_large_scores(backend: Backend, target: str) -> None:
    """Scores of hundreds: the row maximum has to be taken out before exp.

    Gradients recompute p from a float32 lse of that size, so the relative error is its rounding.
    """
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    keywords = target_keywords(x, target)

    def run(ops: ModuleType, q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        q, k = x.q.to(q_sketch.dtype), x.k.to(q_sketch.dtype)
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, scale=64.0, sketch_scale=64.0, **keywords)
        return loss, ops.sketch_lse(q_sketch, k_sketch, scale=64.0)

    sketches = (x.q_sketch, x.k_sketch)
    actual = results_and_gradients(lambda *t: run(backend.ops, *t), *sketches)
    exact = results_and_gradients(lambda *t: run(reference, *t), *sketches, dtype=torch.float64)
    largest = exact[1].abs().max()
    assert largest > 500
    for a, e in zip(actual, exact, strict=True):
        allowed = 2 * torch.finfo(torch.float32).eps * largest * e.abs().max()
        assert (a - e).abs().max() < allowed


def test_results_are_float32_but_for_float64(backend: Backend) -> None:
    for dtype in DTYPES:
        x = make_inputs(SMALL, dtype, backend.device)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert backend.ops.sketch_lse(x.q_sketch, x.k_sketch).dtype == expected
        loss = backend.ops.distill_loss(x.q, x.k, x.q_sketch, x.k_sketch)
        assert (loss.dtype, loss.shape) == (expected, ())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck_distill_loss(backend: Backend, target: str, is_causal: bool) -> None:
    x = make_inputs(SMALL, torch.float64, backend.device)
    x.case = Case(**(vars(SMALL) | {"is_causal": is_causal}))
    keywords = target_keywords(x, target) | x.rows()

    def loss(q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
        return backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **keywords)

    assert torch.autograd.gradcheck(loss, leaves(x.q_sketch, x.k_sketch))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_sketch_lse(backend: Backend, is_causal: bool) -> None:
    x = make_inputs(SMALL, torch.float64, backend.device)

    def lse(q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
        rows = backend.ops.sketch_lse(q_sketch, k_sketch, is_causal=is_causal, key_mask=x.key_mask)
        return rows[rows.isfinite()]

    assert torch.autograd.gradcheck(lse, leaves(x.q_sketch, x.k_sketch))


@pytest.mark.parametrize("needed", [0, 1], ids=["q_sketch", "k_sketch"])
def test_gradient_of_one_input_only(backend: Backend, needed: int) -> None:
    x = make_inputs(CASE["gqa"], torch.float64, backend.device)
    tensors = [x.q_sketch, x.k_sketch]

    def run(ops: ModuleType, leaf: Tensor) -> tuple[Tensor, ...]:
        pair = [leaf if i == needed else t for i, t in enumerate(tensors)]
        return ops.distill_loss(x.q, x.k, *pair), ops.sketch_lse(*pair)

    check_against_reference(backend.ops, run, tensors[needed])


@pytest.mark.parametrize("target", TARGETS)
def test_target_is_constant(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    q, k, q_sketch, k_sketch = leaves(x.q, x.k, x.q_sketch, x.k_sketch)
    loss = backend.ops.distill_loss(q, k, q_sketch, k_sketch, **target_keywords(x, target))
    loss.backward()
    assert q.grad is None
    assert k.grad is None
    assert q_sketch.grad.abs().sum() > 0
    constant = backend.ops.distill_loss(q, k, x.q_sketch, x.k_sketch, **target_keywords(x, target))
    assert not constant.requires_grad


@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_least_where_the_sketch_is_the_target(backend: Backend, target: str) -> None:
    """One head, sketch = q and k: cross-entropy is entropy, and its gradient is zero."""
    x = make_inputs(Case("one_head", H=1, H_kv=1, H_i=1, K=21), torch.float64, backend.device)
    keywords = {} if target == "dense" else target_keywords(x, target)
    q_sketch, k_sketch = leaves(x.q[:, 0], x.k[:, 0])
    loss = backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **keywords)
    loss.backward()
    p = (x.q @ x.k.mT / math.sqrt(x.case.D)).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert_accurate(loss.detach(), entropy, entropy)
    for leaf in (q_sketch, k_sketch):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-14)


@pytest.mark.parametrize("target", TARGETS)
def test_no_valid_key_at_all(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["masked"], torch.float32, backend.device)
    x.key_mask = torch.zeros_like(x.key_mask)
    q_sketch, k_sketch = leaves(x.q_sketch, x.k_sketch)
    keywords = target_keywords(x, target) | x.rows()
    loss = backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **keywords)
    lse = backend.ops.sketch_lse(q_sketch, k_sketch, **x.rows())
    (loss + lse.sum()).backward()
    assert loss == 0
    assert (lse == -math.inf).all()
    assert (q_sketch.grad == 0).all()
    assert (k_sketch.grad == 0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_poison(backend: Backend, target: str) -> None:
    """NaN in masked keys and in rows without a valid key reaches neither results nor gradients."""
    x = make_inputs(CASE["masked_causal_gqa"], torch.float32, backend.device)
    keywords = target_keywords(x, target) | x.rows()
    hidden = ~x.key_mask
    rows = ~x.valid().any(-1)
    q = x.q.masked_fill(rows[:, None, :, None], math.nan)
    k = x.k.masked_fill(hidden[:, None, :, None], math.nan)
    q_sketch, k_sketch = leaves(
        x.q_sketch.masked_fill(rows[..., None], math.nan),
        x.k_sketch.masked_fill(hidden[..., None], math.nan),
    )
    loss = backend.ops.distill_loss(q, k, q_sketch, k_sketch, **keywords)
    lse = backend.ops.sketch_lse(q_sketch, k_sketch, **x.rows())
    (loss + lse[~rows].sum()).backward()
    clean = backend.ops.distill_loss(x.q, x.k, x.q_sketch, x.k_sketch, **keywords)
    assert torch.equal(loss.detach(), clean)
    assert torch.equal(lse.detach(), backend.ops.sketch_lse(x.q_sketch, x.k_sketch, **x.rows()))
    assert q_sketch.grad.isfinite().all()
    assert k_sketch.grad.isfinite().all()
    assert (q_sketch.grad[rows] == 0).all()
    assert (k_sketch.grad[hidden] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("where", ["q_sketch", "k_sketch"])
def test_nan_in_a_row_that_counts_is_seen(backend: Backend, where: str, target: str) -> None:
    x = make_inputs(CASE["masked_causal_gqa"], torch.float32, backend.device)
    keywords = target_keywords(x, target) | x.rows()
    sketches = {"q_sketch": x.q_sketch.clone(), "k_sketch": x.k_sketch.clone()}
    row = x.valid().any(-1)[0].nonzero()[-1, 0]
    at = row if where == "q_sketch" else x.key_mask[0].nonzero()[0, 0]
    sketches[where][0, at] = math.nan
    lse = backend.ops.sketch_lse(**sketches, **x.rows())
    assert lse[0, row].isnan()
    assert backend.ops.distill_loss(x.q, x.k, **sketches, **keywords).isnan()


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_has_no_gradient(backend: Backend, target: str) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    q_sketch, k_sketch = leaves(x.q_sketch, x.k_sketch)
    loss = backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **target_keywords(x, target))

    def differentiate_twice() -> None:
        (gradient,) = torch.autograd.grad(loss, q_sketch, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="differentiated once only"):
        differentiate_twice()


@pytest.mark.usefixtures("restore_num_threads")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["gqa", "past_the_tiles"])
def test_number_of_threads_does_not_matter(backend: Backend, name: str, target: str) -> None:
    x = make_inputs(CASE[name], torch.float32, backend.device)
    keywords = target_keywords(x, target)

    def run(q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, ...]:
        loss = backend.ops.distill_loss(x.q, x.k, q_sketch, k_sketch, **keywords)
        return loss, backend.ops.sketch_lse(q_sketch, k_sketch)

    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(results_and_gradients(run, x.q_sketch, x.k_sketch))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_a_row_without_a_valid_key_has_no_gradient_whatever_its_indices(backend: Backend) -> None:
    """Causal with N > M: the first rows see nothing, yet their indices name keys."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 5, 8)
    sketches = (torch.randn(1, 9, 4), torch.randn(1, 5, 4))
    q_sketch, k_sketch = leaves(*(x.to(backend.device) for x in sketches))
    indices = torch.zeros(1, 2, 9, 3, dtype=torch.int32)
    indices[..., 1:] = -1
    inputs = (x.to(backend.device) for x in (q, k))
    loss = backend.ops.distill_loss(
        *inputs, q_sketch, k_sketch, indices=indices.to(backend.device), is_causal=True
    )
    (dq,) = torch.autograd.grad(loss, q_sketch)
    assert (dq[0, :4] == 0).all()
    assert (dq[0, 4] == 0).all()  # its one key is the target and all it sees
    assert (dq[0, 5:] != 0).any(-1).all()

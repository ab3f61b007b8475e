"""gather_scores and gather_attention of the compiled extension, forward and backward."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from cases import (
    CASE,
    DTYPES,
    SHAPES,
    Backend,
    Case,
    Inputs,
    assert_accurate,
    assert_all_accurate,
    check_against_reference,
    leaves,
    make_inputs,
    results_and_gradients,
)
from torch import Tensor

from smartbird import reference

SMALL = Case("small", B=2, N=6, M=5, H=4, H_kv=2, H_i=2, D=3, Dv=2, K=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (ops.gather_scores(q, k, x.indices),)

    check_against_reference(backend.ops, run, x.q, x.k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, return_lse=True)

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_over_sampled_keys(backend: Backend, case: Case) -> None:
    """Ascending distinct indices with the unused slots at the end, and the sampling correction."""
    x = make_inputs(case, torch.float32, backend.device)
    indices, log_inclusion = reference.sketch_sample(x.q_sketch, x.k_sketch, case.K, **x.sampling())
    bias = -log_inclusion.repeat_interleave(case.H // case.H_i, 1)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (ops.gather_attention(q, k, v, indices, bias=bias.to(q.dtype), scale=0.7),)

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 21, 6),
        (1, 4, 21, 6),
        (2, 1, 1, 6),
        (4, 1, 6),
        (21, 1),
        (6,),
        (1, 1, 1, 1),
        (),
    ],
    ids=str,
)
def test_bias(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_inputs(CASE["self"], dtype, backend.device)
    bias = torch.randn(shape, dtype=torch.float64).to(backend.device, dtype)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, bias=bias, return_lse=True)

    check_against_reference(backend.ops, run, x.q, x.k, x.v, bias)


@pytest.mark.parametrize("batch", [1, 2])
def test_bias_per_index_head(backend: Backend, batch: int) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    assert 1 < x.case.H_i < x.case.H
    bias = torch.randn(batch, x.case.H_i, x.case.N, x.case.K, device=backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, bias=bias, return_lse=True)

    check_against_reference(backend.ops, run, x.q, x.k, x.v, bias)


def test_bias_of_minus_infinity_removes_a_key(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    bias = torch.zeros(x.case.B, x.case.H, x.case.N, x.case.K, device=backend.device)
    bias[:, :, :, 2] = -math.inf
    bias[:, :, 4] = -math.inf  # rows left without any key

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, bias=bias.to(q.dtype), return_lse=True)

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


def test_large_logits(backend: Backend) -> None:
    """Logits of a few thousand: the row maximum has to be taken out before exp."""
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, scale=1024.0, return_lse=True)

    actual = run(backend.ops, x.q, x.k, x.v)
    same_dtype = run(reference, x.q, x.k, x.v)
    exact = run(reference, x.q.double(), x.k.double(), x.v.double())
    assert_all_accurate(actual, same_dtype, exact)


@pytest.mark.parametrize("unused", ["out", "lse"])
def test_gradient_of_one_output_only(backend: Backend, unused: str) -> None:
    x = make_inputs(CASE["gqa"], torch.float64, backend.device)

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = ops.gather_attention(q, k, v, x.indices, return_lse=True)
        # v takes part in the loss even where only lse is used.
        return (lse, 0.0 * v) if unused == "out" else (out,)

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


@pytest.mark.parametrize("needed", range(4), ids=["q", "k", "v", "bias"])
def test_gradient_of_one_input_only(backend: Backend, needed: int) -> None:
    x = make_inputs(CASE["gqa"], torch.float64, backend.device)
    bias = torch.randn(6, 21, 6, dtype=torch.float64, device=backend.device)
    tensors = [x.q, x.k, x.v, bias]

    def run(ops: ModuleType, leaf: Tensor) -> tuple[Tensor, ...]:
        q, k, v, b = [leaf if i == needed else t for i, t in enumerate(tensors)]
        return ops.gather_attention(q, k, v, x.indices, bias=b, return_lse=True)

    check_against_reference(backend.ops, run, tensors[needed])


@pytest.mark.slow_emulated
def test_gradcheck(backend: Backend) -> None:
    x = make_inputs(SMALL, torch.float64, backend.device)
    bias = torch.randn(4, 1, 3, dtype=torch.float64, device=backend.device)
    used = (x.indices != -1).repeat_interleave(2, 1)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return backend.ops.gather_scores(q, k, x.indices)[used]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = backend.ops.gather_attention(
            q, k, v, x.indices, bias=bias, dropout_p=0.4, seed=x.seed, return_lse=True
        )
        return out, lse[used.any(-1)]

    assert torch.autograd.gradcheck(scores, leaves(x.q, x.k))
    assert torch.autograd.gradcheck(attention, leaves(x.q, x.k, x.v, bias))


@pytest.mark.parametrize("op", ["gather_scores", "gather_attention", "sketch_lse"])
def test_a_gradient_has_no_gradient(backend: Backend, op: str) -> None:
    x = make_inputs(SMALL, torch.float32, backend.device)
    (q,) = leaves(x.q_sketch if op == "sketch_lse" else x.q)
    rest = {
        "gather_scores": (x.k, x.indices.clamp(min=0)),
        "gather_attention": (x.k, x.v, x.indices),
        "sketch_lse": (x.k_sketch,),
    }[op]
    out = getattr(backend.ops, op)(q, *rest)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        gradient.square().sum().backward()


def test_lse_is_float32_but_for_float64(backend: Backend) -> None:
    for dtype in DTYPES:
        x = make_inputs(SMALL, dtype, backend.device)
        _, lse = backend.ops.gather_attention(x.q, x.k, x.v, x.indices, return_lse=True)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# What is not attended must not be read, whatever it holds.


def poisoned(x: Inputs) -> Inputs:
    """NaN in every key and value that no index names, and in queries of rows without an index."""
    read = torch.zeros(x.case.B, x.case.H, x.case.M + 1, dtype=torch.bool)
    entries = x.indices.long().repeat_interleave(x.case.H // x.case.H_i, 1)
    read.scatter_(2, entries.flatten(2).remainder(x.case.M + 1).cpu(), True)
    read = read[..., : x.case.M].unflatten(1, (x.case.H_kv, -1)).any(2).to(x.k.device)
    assert not read.all()
    x.k = x.k.masked_fill(~read[..., None], math.nan)
    x.v = x.v.masked_fill(~read[..., None], math.nan)
    x.q = x.q.masked_fill((entries == -1).all(-1, keepdim=True), math.nan)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison(backend: Backend, dtype: torch.dtype) -> None:
    case = Case("sparse", N=6, M=300, H=6, H_kv=2, H_i=3, K=9)
    x = poisoned(make_inputs(case, dtype, backend.device))
    bias = torch.randn(2, 6, 6, 9, device=backend.device).to(dtype)
    unused = (x.indices == -1).repeat_interleave(2, 1)
    bias = bias.masked_fill(unused, math.nan)
    q, k, v, bias = leaves(x.q, x.k, x.v, bias)
    out, lse = backend.ops.gather_attention(q, k, v, x.indices, bias=bias, return_lse=True)
    scores = backend.ops.gather_scores(q, k, x.indices)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    assert torch.equal(scores == -math.inf, unused)
    assert scores[~unused].isfinite().all()
    used_lse, used_scores = lse[lse.isfinite()], scores[~unused]
    (out.float().sum() + used_lse.sum() + used_scores.float().sum()).backward()
    for leaf in (q, k, v, bias):
        assert leaf.grad.isfinite().all()
    assert (q.grad[q.isnan()] == 0).all()
    assert (k.grad[k.isnan()] == 0).all()
    assert (v.grad[v.isnan()] == 0).all()
    assert (bias.grad[unused] == 0).all()


# What is attended and not finite shows, and goes nowhere else.


@pytest.mark.parametrize(("where", "value"), [("q", math.nan), ("q", math.inf), ("k", math.nan)])
@pytest.mark.parametrize("K", [9, 70])
def test_what_is_not_finite_stays_in_its_rows(
    backend: Backend, K: int, where: str, value: float
) -> None:
    """A row that meets it gives NaN, however many of its slots are empty; no other row changes."""
    x = make_inputs(Case("causal", N=40, M=40, H=4, H_kv=2, H_i=4, K=K), torch.float32)
    row = torch.arange(40)[:, None]
    slot = torch.arange(K, dtype=torch.int32)
    # Slots that are empty come first, in between and last; the last query has no others.
    empty = (slot > row) | (slot % 5 == 3) | (slot < 2) | (row == 39)
    indices = slot.masked_fill(empty, -1).expand(2, 4, 40, K).contiguous()
    q, k = x.q.clone(), x.k.clone()
    meets = torch.zeros(2, 4, 40, dtype=torch.bool)
    if where == "q":
        q[1, 1, 20] = value
        meets[1, 1, 20] = True
    else:
        k[1, 1, 5, 0] = value
        meets[1, 2:, 5:39] = True

    def run(q: Tensor, k: Tensor) -> list[Tensor]:
        parts = leaves(*(t.to(backend.device) for t in (q, k, x.v)))
        entries = indices.to(backend.device)
        out, lse = backend.ops.gather_attention(*parts, entries, return_lse=True)
        out.sum().backward()
        return [t.detach().cpu() for t in (out, lse, *(part.grad for part in parts))]

    *rows, dk, dv = run(q, k)
    *clean_rows, clean_dk, clean_dv = run(x.q, x.k)
    for got, clean in zip(rows, clean_rows, strict=True):
        assert torch.equal(got.isnan().reshape(2, 4, 40, -1).any(-1), meets)
        assert torch.equal(got[~meets], clean[~meets])
    # Gradients of keys that none of those rows names; the first and the last are such keys.
    named = (meets.unsqueeze(-1) & (indices >= 0)).any(2)
    named = (
        torch.nn.functional.pad(named[..., :40], (0, max(0, 40 - K))).unflatten(1, (2, 2)).any(2)
    )
    assert not named[..., [0, 39]].any()
    for got, clean in ((dk, clean_dk), (dv, clean_dv)):
        torch.testing.assert_close(got[~named], clean[~named])


def test_a_row_of_nan_is_not_an_empty_row(backend: Backend) -> None:
    """Wherever its slots are: the first vector of slots or lane may hold none that counts."""
    q = torch.full((1, 1, 1, 4), math.nan, device=backend.device)
    k = v = torch.randn(1, 1, 50, 4, device=backend.device)
    for K in (1, 3, 8, 33):
        for slot in range(K):
            indices = torch.full((1, 1, 1, K), -1, dtype=torch.int32, device=backend.device)
            indices[..., slot] = 7
            out, lse = backend.ops.gather_attention(q, k, v, indices, return_lse=True)
            assert out.isnan().all(), (K, slot)
            assert lse.isnan().all(), (K, slot)


# Dropout.


def kept_weights(
    backend: Backend, B: int, H: int, N: int, K: int, p: float, seed: Tensor
) -> Tensor:
    """bool [B, H, N, K]: the slots that survive. Weights are 1/K and value j is the j-th unit."""
    q = torch.zeros(B, H, N, 1, device=backend.device)
    k = torch.zeros(B, H, K, 1, device=backend.device)
    v = torch.eye(K, device=backend.device).expand(B, H, K, K)
    indices = torch.arange(K, dtype=torch.int32, device=backend.device).expand(B, H, N, K)
    out = backend.ops.gather_attention(
        q, k, v, indices.contiguous(), dropout_p=p, seed=seed.to(backend.device)
    )
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (K * (1 - p))))
    return kept.cpu()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate(backend: Backend, p: float) -> None:
    kept = kept_weights(backend, 2, 3, 211, 37, p, torch.tensor([3, 4])).double()
    # Fixed seed; five standard deviations of the number kept: a right kernel fails 1 seed in 10^6.
    for rate, count in ((kept.mean(), kept.numel()), (kept[..., -1].mean(), kept[..., -1].numel())):
        assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)


@pytest.mark.one_order
def test_dropout_is_independent_between_entries(backend: Backend) -> None:
    """No correlation between neighbours along batch, head, row, slot, seed and offset."""
    kept = kept_weights(backend, 4, 4, 64, 32, 0.5, torch.tensor([3, 4])).double() * 2 - 1
    others = [
        kept_weights(backend, 4, 4, 64, 32, 0.5, torch.tensor(seed)).double() * 2 - 1
        for seed in ([3, 5], [4, 4])
    ]
    products = [
        kept.narrow(d, 1, n - 1) * kept.narrow(d, 0, n - 1) for d, n in enumerate(kept.shape)
    ]
    for product in [*products, *(kept * other for other in others)]:
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())


@pytest.mark.slow_emulated
def test_dropout_is_unbiased(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float64, backend.device)
    expected = backend.ops.gather_attention(x.q, x.k, x.v, x.indices)
    seeds = torch.tensor([[n, 0] for n in range(400)], device=backend.device)
    draws = torch.stack(
        [
            backend.ops.gather_attention(x.q, x.k, x.v, x.indices, dropout_p=0.3, seed=seed)
            for seed in seeds
        ]
    )
    error = (draws.mean(0) - expected).abs()
    deviation = draws.std(0) / math.sqrt(len(draws))
    # About 4000 entries: five and a half standard errors for the largest of them.
    assert (error <= 5.5 * deviation + 1e-12).all()
    assert (deviation > 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_one_half_doubles_what_is_kept(backend: Backend, dtype: torch.dtype) -> None:
    x = make_inputs(CASE["gqa"], dtype, backend.device)
    kwargs = {"dropout_p": 0.5, "seed": x.seed}
    ones = torch.ones_like(x.v)
    _, lse = backend.ops.gather_attention(x.q, x.k, x.v, x.indices, return_lse=True, **kwargs)
    _, without = backend.ops.gather_attention(x.q, x.k, x.v, x.indices, return_lse=True)
    assert torch.equal(lse, without)
    total = backend.ops.gather_attention(x.q, x.k, ones, x.indices, **kwargs)
    assert (total >= 0).all()
    assert (total <= 2 + 8 * torch.finfo(dtype).eps).all()


def test_seed(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)

    def run(**kwargs: object) -> Tensor:
        return backend.ops.gather_attention(x.q, x.k, x.v, x.indices, dropout_p=0.5, **kwargs)

    assert torch.equal(run(seed=x.seed), run(seed=x.seed.clone()))
    for other in torch.eye(2, dtype=torch.int64, device=backend.device):
        assert not torch.equal(run(seed=x.seed), run(seed=x.seed + other))
    assert not torch.equal(run(), run())

    def seeded() -> Tensor:
        return run(generator=torch.Generator(backend.device).manual_seed(3))

    assert torch.equal(seeded(), seeded())
    torch.manual_seed(3)
    first = run()
    torch.manual_seed(3)
    assert torch.equal(first, run())


# Equal seed, equal result.


@pytest.mark.usefixtures("restore_num_threads")
@pytest.mark.parametrize("name", ["gqa", "mqa_shared_index", "past_the_tiles"])
def test_number_of_threads_does_not_matter(backend: Backend, name: str) -> None:
    x = make_inputs(CASE[name], torch.float32, backend.device)
    bias = torch.randn(x.case.H, 1, x.case.K, device=backend.device)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        attention = backend.ops.gather_attention(
            q, k, v, x.indices, bias=bias, dropout_p=0.2, seed=x.seed, return_lse=True
        )
        return (*attention, backend.ops.gather_scores(q, k, x.indices))

    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(results_and_gradients(run, x.q, x.k, x.v, bias))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_batch_element_alone_is_the_same(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)

    def run(n: int) -> Tensor:
        return backend.ops.gather_attention(
            x.q[:n], x.k[:n], x.v[:n], x.indices[:n], dropout_p=0.2, seed=x.seed
        )

    assert torch.equal(run(1), run(2)[:1])


def test_no_gradient_mode_is_the_same(backend: Backend) -> None:
    x = make_inputs(CASE["gqa"], torch.float32, backend.device)
    with_grad = backend.ops.gather_attention(*leaves(x.q, x.k, x.v), x.indices)
    with torch.inference_mode():
        without = backend.ops.gather_attention(x.q, x.k, x.v, x.indices)
    assert with_grad.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_grad, without)


@pytest.mark.cpu_only
@pytest.mark.slow_emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 48), (7, 33)])
@pytest.mark.parametrize(("H", "H_kv", "H_i"), [(12, 3, 3), (10, 2, 1), (8, 1, 2), (3, 3, 1)])
def test_heads_that_share_a_list_are_as_on_their_own(
    backend: Backend, H: int, H_kv: int, H_i: int, D: int, Dv: int, dtype: torch.dtype
) -> None:
    """Rows that are read once for several heads give the bits of rows read for each."""
    # Long enough for several parts of a list; a few slots are empty, and a few weights are 0.
    case = Case("", B=2, N=5, M=400, H=H, H_kv=H_kv, H_i=H_i, D=D, Dv=Dv, K=150)
    x = make_inputs(case, dtype, backend.device)
    # Sums over keys are in the order of slots: a key that a list held twice would change it.
    indices = torch.rand(2, H_i, 5, 400).topk(150).indices.sort(-1)[0].int()
    indices[0, :, 1, 140:] = -1
    bias = torch.zeros(2, H, 5, 150, dtype=torch.promote_types(dtype, torch.float32))
    bias[:, 1, 2, 30:50] = -torch.inf

    def run(indices: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out = backend.ops.gather_attention(*leaves, indices, bias=bias)
        out.float().square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    shared, apart = run(indices), run(indices.repeat_interleave(H // H_i, 1))
    for name, a, b in zip(("out", "dq", "dk", "dv"), shared, apart, strict=True):
        assert torch.equal(a, b), name


# Sizes that overflow a grid dimension or a 32-bit offset.


@pytest.mark.slow_emulated
def test_many_heads_and_batch_elements(backend: Backend) -> None:
    x = make_inputs(
        Case("many", B=33000, N=1, M=2, H=2, H_kv=2, H_i=1, D=2, Dv=1, K=2),
        torch.float32,
        backend.device,
    )

    def run(ops: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.gather_attention(q, k, v, x.indices, return_lse=True)

    check_against_reference(backend.ops, run, x.q, x.k, x.v)


@pytest.mark.slow
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Strides of 2^31 elements; only the pages in use are ever touched."""
    case = Case("far", B=2, N=4, M=3, H=2, H_kv=2, H_i=2, D=8, Dv=8, K=3)
    x = make_inputs(case, torch.float16, backend.device)

    def far(t: Tensor) -> Tensor:
        H, N, D = t.shape[1:]
        strides = (2**31 + 64, N * D, D, 1)
        # Not torch.empty: deterministic mode would fill, and so commit, all of it.
        storage = torch.UntypedStorage(2 * (strides[0] + H * N * D), device=t.device)
        return t.new_empty(0).set_(storage, 0, t.shape, strides).copy_(t)

    near = backend.ops.gather_attention(x.q, x.k, x.v, x.indices)
    assert torch.equal(backend.ops.gather_attention(far(x.q), far(x.k), far(x.v), x.indices), near)


def test_double_index_of_one_key_adds_up(backend: Backend) -> None:
    """A key named twice weighs, and collects gradient, as two keys."""
    case = Case("pair", B=1, N=1, M=2, H=1, H_kv=1, H_i=1, K=2)
    x = make_inputs(case, torch.float64, backend.device)
    indices = torch.zeros(1, 1, 1, 2, dtype=torch.int32, device=backend.device)
    q, k, v = leaves(x.q, x.k, x.v)
    out, lse = backend.ops.gather_attention(q, k, v, indices, return_lse=True)
    score = (x.q[0, 0, 0] @ x.k[0, 0, 0]) / math.sqrt(x.case.D)
    assert_accurate(out[0, 0, 0].detach(), x.v[0, 0, 0], x.v[0, 0, 0])
    assert lse.item() == pytest.approx(score.item() + math.log(2))
    out.sum().backward()
    expected = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=backend.device)
    torch.testing.assert_close(v.grad[0, 0], expected.expand(2, 16))

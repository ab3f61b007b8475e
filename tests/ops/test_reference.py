"""The reference against dense attention and against answers computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASE,
    CASES,
    DTYPES,
    METHODS,
    Case,
    Inputs,
    assert_accurate,
    drawn_entries,
    leaves,
    make_inputs,
)
from torch import Tensor

from smartbird import reference

LOG2 = math.log(2.0)


def row(*values: float) -> Tensor:
    """Keys of one head whose scores against the query 1 are ``values``: [1, 1, M, 1], float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def index_row(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).view(1, 1, 1, -1)


def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """scaled_dot_product_attention with a boolean mask; NaN in rows without a valid key."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None])
    return out.masked_fill(~valid.any(-1)[:, None, :, None], math.nan)


# Every key chosen: sparse attention is dense attention.


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("self", K=21),
        Case("gqa", H=6, H_kv=2, H_i=3, K=30),
        Case("causal_cache", N=5, M=37, K=40, is_causal=True),
        Case("causal_rows_without_keys", N=30, M=9, K=9, is_causal=True),
        Case("masked", K=21, masked=True),
        Case("forced", K=21, masked=True, is_causal=True, window=3, num_sinks=2),
    ],
    ids=str,
)
def test_all_keys_is_dense_attention(
    case: Case, dtype: torch.dtype, method: str, correction: bool
) -> None:
    x = make_inputs(case, dtype)
    valid = x.valid()
    sampling = {**x.sampling(), "method": method, "correction": correction}
    out = reference.smart_bird_attention(x.q, x.k, x.v, x.q_sketch, x.k_sketch, case.K, **sampling)
    same_dtype = dense(x.q, x.k, x.v, valid)
    exact = dense(x.q.double(), x.k.double(), x.v.double(), valid)
    attends = valid.any(-1)[:, None].expand(out.shape[:-1])
    assert_accurate(out[attends], same_dtype[attends], exact[attends])
    assert (out[~attends] == 0).all()


def test_all_keys_gives_dense_gradients() -> None:
    x = make_inputs(Case("gqa_masked_causal", H_kv=2, H_i=1, K=21, is_causal=True), torch.float64)
    sparse, full = leaves(x.q, x.k, x.v), leaves(x.q, x.k, x.v)
    reference.smart_bird_attention(
        *sparse, x.q_sketch, x.k_sketch, 21, **x.sampling()
    ).square().sum().backward()
    dense(*full, x.valid()).square().sum().backward()
    for a, b in zip(sparse, full, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["self", "gqa", "masked", "causal_cache"])
def test_dense_distill_loss_is_cross_entropy(name: str) -> None:
    x = make_inputs(CASE[name], torch.float64)
    valid = x.valid()
    k = x.k.repeat_interleave(x.case.H // x.case.H_kv, 1)
    logits = (x.q @ k.mT / math.sqrt(x.case.D)).masked_fill(~valid[:, None], -math.inf)
    sketch = (x.q_sketch @ x.k_sketch.mT / math.sqrt(x.case.S)).masked_fill(~valid, -1e30)
    target = logits.softmax(-1).mean(1)
    rows = valid.any(-1)
    expected = F.cross_entropy(sketch[rows], target[rows])
    actual = reference.distill_loss(x.q, x.k, x.q_sketch, x.k_sketch, **x.masks())
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["self", "masked", "causal_rows_without_keys"])
def test_distill_loss_over_every_index_is_the_dense_one(name: str) -> None:
    x = make_inputs(CASE[name], torch.float64)
    args = (x.q, x.k, x.q_sketch, x.k_sketch)
    indices, log_inclusion = reference.sketch_sample(
        x.q_sketch, x.k_sketch, x.case.M, num_index_heads=2, **x.masks()
    )
    sampled = reference.distill_loss(
        *args, indices=indices, log_inclusion=log_inclusion, **x.masks()
    )
    torch.testing.assert_close(sampled, reference.distill_loss(*args, **x.masks()))


def test_sketch_lse_is_logsumexp() -> None:
    x = make_inputs(CASE["masked_causal_gqa"], torch.float64)
    scores = 0.3 * x.q_sketch @ x.k_sketch.mT
    expected = scores.masked_fill(~x.valid(), -math.inf).logsumexp(-1)
    actual = reference.sketch_lse(x.q_sketch, x.k_sketch, scale=0.3, **x.masks())
    torch.testing.assert_close(actual, expected)


# Rows: which keys they see, and which they must hold.


def seen_and_held(x: Inputs, num_samples: int, b: int, i: int) -> tuple[list[int], list[int]]:
    """The definition, key by key, of row i of batch element b."""
    case = x.case
    first_query, num_queries, first_key, num_keys, s = 0, case.N, 0, case.M, b
    if case.lengths:
        s, num_queries, num_keys = 0, *case.lengths[0]
        while i >= first_query + num_queries:
            first_query, first_key, s = first_query + num_queries, first_key + num_keys, s + 1
            if s == len(case.lengths):
                return [], []
            num_queries, num_keys = case.lengths[s]
    offset = x.query_offset
    if isinstance(offset, Tensor):
        offset = int(offset[s])
    position = (num_keys - num_queries if offset is None else offset) + i - first_query
    seen, near, many = [], [], []
    for place in range(num_keys):
        j = first_key + place
        if case.is_causal and place > position:
            continue
        if x.key_mask is not None and not x.key_mask[b, j]:
            continue
        seen.append(j)
        if case.window and case.is_causal and position - case.window < place:
            near.append(j)
        if case.window and not case.is_causal and abs(place - position) <= case.window // 2:
            near.append(j)
        if x.global_mask is not None and x.global_mask[b, j]:
            many.append(j)
    held = set(seen[: case.num_sinks]) | set(near)
    for j in many:
        if len(held) < num_samples:
            held.add(j)
    return seen, sorted(held)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_see_and_hold(case: Case) -> None:
    x = make_inputs(case, torch.float32)
    valid, forced = x.valid_and_forced(case.K)
    for b, i in itertools.product(range(case.B), range(case.N)):
        seen, held = seen_and_held(x, case.K, b, i)
        assert valid[b, i].nonzero().flatten().tolist() == seen, (b, i)
        assert forced[b, i].nonzero().flatten().tolist() == held, (b, i)


@pytest.mark.parametrize("name", ["packed_masked", "packed_offsets", "sketch_per_head"])
def test_several_sequences_and_sketches_are_one_each(name: str) -> None:
    """A pack gives what its sequences give alone, H_s sketches what each gives its heads."""
    x = make_inputs(CASE[name], torch.float64)
    case, group = x.case, x.case.H // x.case.H_s
    indices, log_inclusion = drawn_entries(x)
    whole = {
        reduction: reference.distill_loss(
            x.q, x.k, x.q_sketch, x.k_sketch, indices=indices, log_inclusion=log_inclusion,
            reduction=reduction, **x.rows(),
        )
        for reduction in ("sum", "mean")
    }  # fmt: skip
    lse = reference.sketch_lse(x.q_sketch, x.k_sketch, **x.rows())
    total, count = 0.0, 0
    sequences = [(b, slice(0, case.N), slice(0, case.M), b) for b in range(case.B)]
    if case.lengths:
        ends = [x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist()]
        sequences = [
            (0, slice(*ends[0][s : s + 2]), slice(*ends[1][s : s + 2]), s)
            for s in range(len(case.lengths))
        ]
    for b, queries, keys, s in sequences:
        offset = x.query_offset
        options = {
            "is_causal": case.is_causal,
            "window": case.window,
            "num_sinks": case.num_sinks,
            "query_offset": int(offset[s]) if isinstance(offset, Tensor) else offset,
            "key_mask": None if x.key_mask is None else x.key_mask[b : b + 1, keys],
        }
        for n in range(case.H_s):
            heads = slice(n * group, (n + 1) * group)
            k = x.k.repeat_interleave(case.H // case.H_kv, 1)[b : b + 1, heads, keys]
            q_sketch = x.q_sketch[b : b + 1, n, queries]
            k_sketch = x.k_sketch[b : b + 1, n // (case.H_s // case.H_ks), keys]
            rows = lse[b : b + 1, n, queries]
            alone = reference.sketch_lse(q_sketch, k_sketch, **options)
            torch.testing.assert_close(alone, rows)
            index_heads = slice(n * case.H_i // case.H_s, (n + 1) * case.H_i // case.H_s)
            drawn = indices[b : b + 1, index_heads, queries]
            total = total + reference.distill_loss(
                x.q[b : b + 1, heads, queries],
                k,
                q_sketch,
                k_sketch,
                indices=torch.where(drawn < 0, drawn, drawn - keys.start),
                log_inclusion=log_inclusion[b : b + 1, index_heads, queries],
                reduction="sum",
                **options,
            )
            count += int((alone > -math.inf).sum())
    torch.testing.assert_close(whole["sum"], total)
    torch.testing.assert_close(whole["mean"], total / count)


@pytest.mark.parametrize("sampled", [False, True])
def test_what_is_forced_is_neither_in_the_target_nor_in_the_normaliser(sampled: bool) -> None:
    """As if these keys were masked, one row at a time."""
    x = make_inputs(Case("forced", window=3, num_sinks=2, has_globals=True, K=12), torch.float64)
    options = {}
    if sampled:
        options["indices"], options["log_inclusion"] = drawn_entries(x)
    args = (x.q, x.k, x.q_sketch, x.k_sketch)
    whole = reference.distill_loss(*args, reduction="sum", **options, **x.rows())
    free = x.free()
    total = 0.0
    for i in range(x.case.N):
        row = slice(i, i + 1)
        own = {name: t[:, :, row] for name, t in options.items()}
        if sampled:
            entries = own["indices"].long().remainder(x.case.M + 1)
            kept = F.pad(free[:, None, row], (0, 1)).expand(-1, x.case.H_i, -1, -1)
            own["indices"] = own["indices"].masked_fill(~kept.gather(-1, entries), -1)
        total = total + reference.distill_loss(
            x.q[:, :, row], x.k, x.q_sketch[:, row], x.k_sketch,
            key_mask=free[:, i], reduction="sum", **own,
        )  # fmt: skip
        lse = reference.sketch_lse(x.q_sketch, x.k_sketch, **x.rows())[:, i]
        alone = reference.sketch_lse(x.q_sketch[:, row], x.k_sketch, key_mask=free[:, i])[:, 0]
        torch.testing.assert_close(lse, alone)
    torch.testing.assert_close(whole, total)


def test_rows_asked_for() -> None:
    x = make_inputs(CASE["globals"], torch.float64)
    rows = torch.tensor([7, 0, 7, 20])
    lse = reference.sketch_lse(x.q_sketch, x.k_sketch, **x.rows())
    some = reference.sketch_lse(x.q_sketch, x.k_sketch, rows=rows, **x.rows())
    assert torch.equal(some, lse[:, rows])
    args = (x.q, x.k, x.q_sketch, x.k_sketch)
    each = [
        reference.distill_loss(*args, rows=rows[n : n + 1], reduction="sum", **x.rows())
        for n in range(4)
    ]
    total = reference.distill_loss(*args, rows=rows, reduction="sum", **x.rows())
    torch.testing.assert_close(total, sum(each))
    mean = reference.distill_loss(*args, rows=rows, **x.rows())
    torch.testing.assert_close(mean, total / x.free()[:, rows].any(-1).sum())


@pytest.mark.parametrize("method", ["topk", "gumbel"])
def test_padding_is_taken_out(method: str) -> None:
    x = make_inputs(Case("self", is_causal=True), torch.float64)
    real = torch.rand(2, 21) < 0.6
    args = (x.q, x.k, x.v, x.q_sketch, x.k_sketch, 21)
    out, indices = reference.smart_bird_attention(
        *args, method=method, is_causal=True, query_mask=real, key_mask=real, return_indices=True
    )
    expected = dense(x.q, x.k, x.v, (torch.ones(21, 21) > 0).tril() & real[:, None])
    attends = real[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(out[attends], expected[attends])
    assert (out[~attends] == 0).all()
    assert (indices[~attends] == -1).all()
    for b, i in real.nonzero().tolist():
        keys = real[b, : i + 1].nonzero().flatten().tolist()
        assert indices[b, 0, i].tolist() == keys + [-1] * (21 - len(keys))


def test_varlen_is_the_packed_form() -> None:
    x = make_inputs(CASE["packed_offsets"], torch.float64)
    options = {"method": "topk", **x.sampling()}
    args = (x.q, x.k, x.v, x.q_sketch, x.k_sketch)
    out = reference.smart_bird_attention(*args, 6, **options)
    flat = reference.smart_bird_attention_varlen(
        *(t[0].transpose(0, 1) for t in args), 6, **options
    )
    assert torch.equal(flat, out[0].transpose(0, 1))


# By hand.


def test_gather_scores_by_hand() -> None:
    scores = reference.gather_scores(row(2.0), row(3.0, 5.0), index_row(1, -1, 0, 1))
    assert scores.flatten().tolist() == [10.0, -math.inf, 6.0, 10.0]
    scaled = reference.gather_scores(row(2.0), row(3.0, 5.0), index_row(0), scale=0.5)
    assert scaled.item() == 3.0


@pytest.mark.parametrize(
    ("indices", "bias", "expected", "total"),
    [
        ((0, 1), None, (1 / 3, 2 / 3), 3.0),
        ((1, 0), None, (1 / 3, 2 / 3), 3.0),
        ((0, 1, 1), None, (1 / 5, 4 / 5), 5.0),  # duplicates add
        ((-1, 1, -1, 0), None, (1 / 3, 2 / 3), 3.0),
        ((0, 1), (LOG2, 0.0), (1 / 2, 1 / 2), 4.0),
        ((0, 1), (-math.inf, 0.0), (0.0, 1.0), 2.0),
        ((0, 1, -1), (0.0, 0.0, math.inf), (1 / 3, 2 / 3), 3.0),  # bias of an unused slot
        ((-1, -1), None, (0.0, 0.0), 0.0),
        ((0, 1), (-math.inf, -math.inf), (0.0, 0.0), 0.0),
    ],
)
def test_gather_attention_by_hand(
    indices: tuple[int, ...],
    bias: tuple[float, ...] | None,
    expected: tuple[float, ...],
    total: float,
) -> None:
    values = torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2)
    out, lse = reference.gather_attention(
        row(1.0),
        row(0.0, LOG2),
        values,
        index_row(*indices),
        bias=None if bias is None else torch.tensor(bias, dtype=torch.float64),
        return_lse=True,
    )
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert lse.item() == pytest.approx(math.log(total) if total else -math.inf)


def test_head_of_keys_and_of_indices() -> None:
    """Head h reads key head h // (H / H_kv) and index head h // (H / H_i)."""
    v = torch.arange(6.0).view(1, 3, 2, 1)  # key head c, key j holds 2c + j
    indices = torch.tensor([0, 1], dtype=torch.int32).view(1, 2, 1, 1)
    out = reference.gather_attention(torch.zeros(1, 6, 1, 1), torch.zeros(1, 3, 2, 1), v, indices)
    assert out.flatten().tolist() == [0.0, 0.0, 2.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("indices", "log_inclusion", "target"),
    [
        (None, None, (1 / 3, 2 / 3)),
        ((0, 1), None, (1 / 3, 2 / 3)),
        ((1, -1), None, (0.0, 1.0)),
        ((0, 0, 1), None, (1 / 2, 1 / 2)),
        ((0, 1), (-LOG2, 0.0), (1 / 2, 1 / 2)),
        ((0, 1, -1), (-LOG2, 0.0, -math.inf), (1 / 2, 1 / 2)),
        ((-1, -1), None, (0.0, 0.0)),
    ],
)
def test_distill_loss_by_hand(
    indices: tuple[int, ...] | None,
    log_inclusion: tuple[float, ...] | None,
    target: tuple[float, float],
) -> None:
    loss = reference.distill_loss(
        row(1.0),
        row(0.0, LOG2),
        row(1.0)[:, 0],
        row(math.log(3.0), 0.0)[:, 0],
        indices=None if indices is None else index_row(*indices),
        log_inclusion=None
        if log_inclusion is None
        else torch.tensor(log_inclusion).expand(1, 1, 1, -1),
    )
    p = (3 / 4, 1 / 4)
    expected = -sum(t * math.log(b) for t, b in zip(target, p, strict=True))
    assert loss.item() == pytest.approx(expected)


def test_distill_loss_averages_heads_and_rows_with_keys() -> None:
    q = torch.ones(1, 2, 2, 1)
    k = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]).view(1, 2, 2, 1)
    sketch = torch.zeros(1, 2, 1)
    key_mask = torch.tensor([[True, True]])
    # Causal with M = 1 after N = 2: row 0 has no key, row 1 one key, so the loss is log 1.
    one_key = reference.distill_loss(q, k[:, :, :1], sketch, sketch[:, :1], is_causal=True)
    assert one_key.item() == 0.0
    # Uniform p: every row gives log 2, whatever the target.
    assert reference.distill_loss(q, k, sketch, sketch, key_mask=key_mask).item() == pytest.approx(
        LOG2
    )
    # Heads (1/2, 1/2) and (3/4, 1/4) average to (5/8, 3/8); p is (1/3, 2/3).
    slanted = torch.tensor([0.0, LOG2]).view(1, 2, 1)
    loss = reference.distill_loss(q, k, torch.ones(1, 2, 1), slanted)
    assert loss.item() == pytest.approx(5 / 8 * math.log(3) + 3 / 8 * math.log(3 / 2))


def test_systematic_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), k = 2: pi = (1, 1/2, 1/2), running sums 1, 3/2, 2."""
    scores = torch.tensor([LOG2, 0.0, 0.0], dtype=torch.float64)
    log_p = scores.log_softmax(-1).view(1, 1, 1, 3)
    k = torch.full((1, 1, 1, 1), 2)
    for u, expected in ((0.0, [1, 1, 0]), (0.49, [1, 1, 0]), (0.5, [1, 0, 1]), (0.99, [1, 0, 1])):
        counts, log_pi = reference._draw_systematic(log_p, k, torch.full((1, 1, 1, 1), u))
        assert counts.flatten().tolist() == expected
        torch.testing.assert_close(log_pi.flatten(), torch.tensor([0.0, -LOG2, -LOG2]).double())


def test_gumbel_log_inclusion_is_finite_for_any_spread() -> None:
    scores = torch.tensor([0.0, -1e-9, -100.0, -200.0, -2000.0]).view(1, 5, 1)
    _, log_inclusion = reference.sketch_sample(torch.ones(1, 64, 1), scores, 4)
    assert log_inclusion.isfinite().all()
    assert (log_inclusion <= 0).all()


# Gradients in float64, through unused slots, duplicates, empty rows and masks.

SMALL = Case("small", B=2, N=4, M=5, H=4, H_kv=2, H_i=2, D=3, Dv=2, S=2, K=3, masked=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal: bool) -> None:
    x = make_inputs(SMALL, torch.float64)
    bias = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    q, k, v, q_sketch, k_sketch, bias = leaves(x.q, x.k, x.v, x.q_sketch, x.k_sketch, bias)
    masks = {"is_causal": is_causal, "key_mask": x.key_mask}
    seed = x.seed

    def finite(t: Tensor) -> Tensor:
        return t[t.isfinite()]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return finite(reference.gather_scores(q, k, x.indices))

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.gather_attention(
            q, k, v, x.indices, bias=bias, dropout_p=0.4, seed=seed, return_lse=True
        )
        return out, finite(lse)

    def lse(q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
        return finite(reference.sketch_lse(q_sketch, k_sketch, **masks))

    def loss(q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
        return reference.distill_loss(x.q, x.k, q_sketch, k_sketch, **masks)

    assert torch.autograd.gradcheck(scores, (q, k))
    assert torch.autograd.gradcheck(attention, (q, k, v, bias))
    assert torch.autograd.gradcheck(lse, (q_sketch, k_sketch))
    assert torch.autograd.gradcheck(loss, (q_sketch, k_sketch))


@pytest.mark.parametrize("with_log_inclusion", [False, True])
def test_gradcheck_distill_sampled(with_log_inclusion: bool) -> None:
    x = make_inputs(SMALL, torch.float64)
    indices, log_inclusion = drawn_entries(x)

    def loss(q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
        return reference.distill_loss(
            x.q,
            x.k,
            q_sketch,
            k_sketch,
            indices=indices,
            log_inclusion=log_inclusion if with_log_inclusion else None,
            key_mask=x.key_mask,
        )

    assert torch.autograd.gradcheck(loss, leaves(x.q_sketch, x.k_sketch))


def test_rows_without_keys_have_zero_gradients() -> None:
    x = make_inputs(CASE["masked"], torch.float64)
    q, k, v, q_sketch, k_sketch = leaves(x.q, x.k, x.v, x.q_sketch, x.k_sketch)
    out, lse = reference.gather_attention(q, k, v, torch.full_like(x.indices, -1), return_lse=True)
    sketch = reference.sketch_lse(q_sketch, k_sketch, **x.masks())
    loss = reference.distill_loss(q, k, q_sketch, k_sketch, **x.masks())
    (out.sum() + lse.sum() + sketch.sum() + loss).backward()
    for leaf in (q, k, v):
        assert (leaf.grad == 0).all()
    for leaf in (q_sketch, k_sketch):  # the last batch element is masked out
        assert (leaf.grad[-1] == 0).all()
        assert leaf.grad[0].abs().sum() > 0


def test_distill_target_is_constant() -> None:
    x = make_inputs(CASE["self"], torch.float64)
    q, k = leaves(x.q, x.k)
    q_sketch, k_sketch = leaves(x.q_sketch, x.k_sketch)
    reference.distill_loss(q, k, q_sketch, k_sketch).backward()
    assert q.grad is None
    assert k.grad is None
    assert q_sketch.grad.abs().sum() > 0


# Arguments that would give a wrong answer silently.


@pytest.mark.parametrize("index", [-2, 5])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(ValueError, match="indices"):
        reference.gather_scores(row(1.0), row(0, 0, 0, 0, 0), index_row(index))


def test_log_inclusion_without_indices() -> None:
    with pytest.raises(ValueError, match="log_inclusion"):
        reference.distill_loss(
            row(1.0),
            row(1.0),
            row(1.0)[:, 0],
            row(1.0)[:, 0],
            log_inclusion=torch.zeros(1, 1, 1, 1),
        )

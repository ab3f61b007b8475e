"""SampledAttention: the composition of smartbird.functional as a module without parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smartbird
from smartbird import ops
from smartbird.functional import smart_bird_attention
from smartbird.nn import DenseWarmup, SampledAttention, seed_evaluation, sketch_loss

H, KV, N, D, S = 4, 2, 11, 8, 4


def make_core(**options: Any) -> SampledAttention:
    return SampledAttention(H, **{"num_kv_heads": KV, "num_samples": 4, **options})


def tensors(batch: int = 2, queries: int = N, keys: int = N, sketches: int = 1) -> list[Tensor]:
    return [
        torch.randn(batch, H, queries, D),
        torch.randn(batch, KV, keys, D),
        torch.randn(batch, KV, keys, D),
        torch.randn(batch, sketches, queries, S),
        torch.randn(batch, sketches, keys, S),
    ]


def real_tokens() -> Tensor:
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:6] = False
    return mask


# --- What it computes ---


@pytest.mark.parametrize("sketches", [1, KV])
@pytest.mark.parametrize("method", ["gumbel", "dealt"])
def test_equals_the_function(method: str, sketches: int) -> None:
    core = make_core(
        method=method,
        correction=True,
        temperature=2.0,
        dropout=0.3,
        num_sinks=1,
        window=1,
        scale=0.7,
        sketch_scale=0.4,
        is_causal=True,
    )
    x = tensors(sketches=sketches)
    torch.manual_seed(1)
    out, indices = core(*x, return_indices=True)
    torch.manual_seed(1)
    expected, expected_indices = smart_bird_attention(
        *x,
        4,
        method=method,
        correction=True,
        dropout_p=0.3,
        num_sinks=1,
        window=1,
        scale=0.7,
        sketch_scale=0.2,
        is_causal=True,
        return_indices=True,
    )
    assert indices.shape == (2, KV, N, 4)
    assert indices.equal(expected_indices)
    assert out.equal(expected)
    # Evaluation draws without a temperature and drops nothing, with seed and sequence id 0.
    expected = smart_bird_attention(
        *x,
        4,
        method=method,
        correction=True,
        num_sinks=1,
        window=1,
        scale=0.7,
        sketch_scale=0.4,
        is_causal=True,
        seed=torch.zeros(2, dtype=torch.int64),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
    )
    assert core.eval()(*x).equal(expected)


@pytest.mark.parametrize(("kv_heads", "sketches", "expected"), [(2, 1, 2), (1, 3, 3), (2, 3, 6)])
def test_heads_share_draws_where_they_share_keys_and_sketch(
    kv_heads: int, sketches: int, expected: int
) -> None:
    x = [torch.randn(1, heads, N, D) for heads in (6, kv_heads, kv_heads, sketches, sketches)]
    core = SampledAttention(6, num_kv_heads=kv_heads, num_samples=4)
    of_layer = core(*x, return_indices=True)[1]
    of_function = smart_bird_attention(*x, 4, return_indices=True)[1]
    assert of_layer.shape == of_function.shape == (1, expected, N, 4)


def test_one_sketch_may_be_given_without_heads() -> None:
    core = make_core().eval()
    *qkv, q_sketch, k_sketch = tensors()
    assert core(*qkv, q_sketch[:, 0], k_sketch[:, 0]).equal(core(*qkv, q_sketch, k_sketch))


def test_calls_say_who_their_rows_are() -> None:
    core = make_core(is_causal=True).eval()
    x = tensors()
    ids, offset = torch.tensor([3, 8]), torch.tensor([0, -2])
    mask = torch.rand(2, N) < 0.3
    rows = {
        "key_mask": real_tokens(),
        "global_mask": mask,
        "query_offset": offset,
        "sequence_ids": ids,
        "first_head": 2,
    }
    expected = smart_bird_attention(*x, 4, is_causal=True, seed=torch.zeros(2).long(), **rows)
    assert core(*x, **rows).equal(expected)
    assert not core(*x, is_causal=False, **rows).equal(expected)


def test_dense_equals_attention_of_every_key() -> None:
    core = make_core(is_causal=True, num_samples=N).eval()
    x = tensors()
    mask = real_tokens()
    expected = core(*x, query_mask=mask, key_mask=mask)
    core.dense = True
    torch.testing.assert_close(core(*x, query_mask=mask, key_mask=mask), expected)
    torch.testing.assert_close(
        core(*x, key_mask=mask)[mask[:, None].expand(-1, H, -1)],
        expected[mask[:, None].expand(-1, H, -1)],
    )
    # A pack whose last row belongs to no sequence.
    pack = [x[:1] for x in tensors()]
    rows = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 4, 4, N - 1]).int())
    out = core(*pack, **rows)
    core.dense = False
    torch.testing.assert_close(out, core(*pack, **rows))
    assert (out[:, :, -1] == 0).all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("sketches", [1, KV])
def test_bias_sketch_joins_the_logits(sketches: int, dense: bool) -> None:
    core = make_core(num_samples=N, sketch_scale=0.3).eval()
    core.dense = dense
    q, k, v, q_sketch, k_sketch = tensors(sketches=sketches)
    bias = tuple(torch.randn_like(x, requires_grad=True) for x in (q_sketch, k_sketch))
    scores = 0.3 * bias[0] @ bias[1].mT
    k_heads, v_heads, scores = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v, scores))
    expected = F.scaled_dot_product_attention(q, k_heads, v_heads, attn_mask=scores)
    out = core(q, k, v, q_sketch, k_sketch, bias_sketch=bias)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(
        torch.autograd.grad(out.square().sum(), bias),
        torch.autograd.grad(expected.square().sum(), bias),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


# --- Given keys ---


def test_given_indices_are_attended_to() -> None:
    core, x = make_core(), tensors()
    out, indices = core(*x, return_indices=True)
    again, same = core(*x, indices=indices, return_indices=True)
    assert again.equal(out)
    assert same.equal(indices)


def test_given_indices_of_a_padded_batch() -> None:
    core, x, mask = make_core().eval(), tensors(), real_tokens()
    masks = {"query_mask": mask, "key_mask": mask}
    out, indices = core(*x, **masks, return_indices=True)
    assert core(*x, **masks, indices=indices).equal(out)
    # A key that is padding is none.
    more = F.pad(indices, (0, 1))
    more[1, ..., -1] = 4
    more[0, ..., -1] = 0
    assert core(*x, **masks, indices=more).equal(out)
    with pytest.raises(ValueError, match=r"indices must be .* of the query"):
        core(*x, **masks, indices=indices[:1])
    for wrong in (N, -2):
        more[0, ..., -1] = wrong
        with pytest.raises(ValueError, match="indices"):
            core(*x, **masks, indices=more)


# --- What it learns ---


def test_forced_keys_are_left_out_of_what_is_distilled() -> None:
    core = make_core(num_sinks=1, window=1, is_causal=True, distill_temperature=1.0, scale=0.5)
    x = tensors(sketches=KV)
    _, indices = core(*x, return_indices=True)
    q, k, _, q_sketch, k_sketch = x
    expected = ops.distill_loss(
        *(q, k, q_sketch, k_sketch),
        indices=indices,
        scale=0.5,
        num_sinks=1,
        window=1,
        is_causal=True,
    )
    torch.testing.assert_close(sketch_loss(core), expected)


@pytest.mark.parametrize("dense", [False, True])
def test_a_subset_of_rows_is_judged(dense: bool) -> None:
    core, x = make_core(distill_rows=3, distill_temperature=1.0), tensors()
    core.dense = dense
    torch.manual_seed(1)
    core(*x)
    torch.manual_seed(1)
    indices = None
    if not dense:
        indices, _ = ops.sketch_sample(*x[3:], 4, num_index_heads=KV)
    rows = torch.randperm(N)[:3]
    expected = ops.distill_loss(*x[:2], *x[3:], indices=indices, rows=rows)
    torch.testing.assert_close(sketch_loss(core), expected)


def test_padding_is_not_judged() -> None:
    core, x = make_core(method="topk", distill_temperature=1.0), tensors()
    mask = real_tokens()
    core(*x, query_mask=mask, key_mask=mask)
    loss = sketch_loss(core)
    total = 0.0
    for b in range(2):
        core(*(each[b : b + 1][:, :, mask[b]] for each in x))
        total += sketch_loss(core) * mask[b].sum()
    torch.testing.assert_close(loss, total / mask.sum())


# --- Modules ---


def test_it_has_no_state() -> None:
    core = make_core()
    assert list(core.state_dict()) == []
    assert list(core.buffers()) == []
    assert smartbird.SampledAttention is SampledAttention


def test_evaluation_does_not_depend_on_where_a_module_was_made() -> None:
    with torch.device("meta"):
        core = make_core()
    x = tensors()
    expected = make_core().eval()(*x)
    assert core.to_empty(device="cpu").eval()(*x).equal(expected)
    seed_evaluation(core, 3)
    assert not core(*x).equal(expected)
    for other in (copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert other(*x).equal(core(*x))


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_any_int64_is_a_seed(seed: int) -> None:
    core = make_core().eval()
    seed_evaluation(core, seed)
    expected = smart_bird_attention(
        *(x := tensors()),
        4,
        seed=torch.tensor([seed, 0]),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
    )
    assert core(*x).equal(expected)


def test_a_seed_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        seed_evaluation(make_core(), 3.7)
    with pytest.raises(ValueError, match="seed must be between"):
        seed_evaluation(make_core(), 2**63)


# --- Bad input ---


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads 4, got 3"),
        ({"num_index_heads": 3}, ValueError, "num_index_heads must divide num_heads 4, got 3"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"sketch_scale": "1"}, TypeError, "sketch_scale must be a float"),
        ({"loss_weight": float("inf")}, ValueError, "loss_weight must be finite"),
        ({"distill": 1}, TypeError, "distill must be a bool"),
        ({"distill_rows": 0}, ValueError, "distill_rows must be at least 1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        make_core(**options)


def test_fewer_samples_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        make_core().anneal_samples(-1)


def test_bad_calls_are_named() -> None:
    core = make_core()
    q, k, v, q_sketch, k_sketch = tensors()
    with pytest.raises(ValueError, match="q must have 4 heads, got 2"):
        core(q[:, :2], k, v, q_sketch, k_sketch)
    with pytest.raises(ValueError, match="k must have 2 heads, got 1"):
        core(q, k[:, :1], v[:, :1], q_sketch, k_sketch)
    with pytest.raises(ValueError, match="num_index_heads must be a multiple of the sketches"):
        make_core(num_index_heads=2)(q, k, v, *tensors(sketches=4)[3:])
    for wrong in (3, q, (q,), (q_sketch, None)):
        with pytest.raises(TypeError, match="bias_sketch must be"):
            core(*tensors(), bias_sketch=wrong)
    cu_seqlens = torch.tensor([0, N], dtype=torch.int32)
    with pytest.raises(ValueError, match="query_mask must be None with cu_seqlens_q"):
        core(*tensors(), query_mask=real_tokens(), cu_seqlens_q=cu_seqlens)
    with pytest.raises(ValueError, match="query_mask must be"):
        core(*tensors(), query_mask=real_tokens()[:, 1:])
    with pytest.raises(TypeError, match="key_mask must be a bool Tensor"):
        core(*tensors(), query_mask=real_tokens(), key_mask=torch.ones(2, N))
    DenseWarmup(core, 1)
    with pytest.raises(ValueError, match="indices must be None and return_indices False"):
        core(*tensors(), return_indices=True)

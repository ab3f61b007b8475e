"""The functional form: a composition of the ops, so what is tested is how it composes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import METHODS
from torch import Tensor

from smartbird import ops, reference
from smartbird.functional import dense_attention, smart_bird_attention


def make_inputs(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    num_queries: int = 13,
    num_keys: int = 13,
    head_dim: int = 8,
    sketch_dim: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(batch, heads, num_queries, head_dim, dtype=dtype),
        "k": torch.randn(batch, kv_heads, num_keys, head_dim, dtype=dtype),
        "v": torch.randn(batch, kv_heads, num_keys, head_dim, dtype=dtype),
        "q_sketch": torch.randn(batch, num_queries, sketch_dim, dtype=dtype),
        "k_sketch": torch.randn(batch, num_keys, sketch_dim, dtype=dtype),
    }


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Attention to the keys of `valid`, broadcastable to [B, H, N, M]; zero where there is none."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~valid, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v


def valid_keys(num_queries: int, num_keys: int, is_causal: bool, key_mask: Tensor | None) -> Tensor:
    valid = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        valid = valid.tril(num_keys - num_queries)
    return valid if key_mask is None else valid & key_mask[:, None, None, :]


def half_mask(num_keys: int) -> Tensor:
    """Key mask of two sequences: about half of the keys, and none at all."""
    return torch.stack([torch.rand(num_keys) < 0.5, torch.zeros(num_keys, dtype=torch.bool)])


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("method", ["gumbel", "systematic", "multinomial", "topk"])
def test_every_key_sampled_is_dense_attention(method: str, correction: bool) -> None:
    x = make_inputs()
    out = smart_bird_attention(**x, num_samples=13, method=method, correction=correction)
    expected = F.scaled_dot_product_attention(x["q"], x["k"], x["v"])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(13, 13), (5, 13), (13, 5)])
@pytest.mark.parametrize("attention", ["sampled", "dense"])
def test_masks(
    attention: str, num_queries: int, num_keys: int, is_causal: bool, masked: bool
) -> None:
    x = make_inputs(kv_heads=2, num_queries=num_queries, num_keys=num_keys)
    key_mask = half_mask(num_keys) if masked else None
    masks = {"is_causal": is_causal, "key_mask": key_mask}
    if attention == "sampled":
        out = smart_bird_attention(**x, num_samples=num_keys, **masks)
    else:
        out = dense_attention(x["q"], x["k"], x["v"], **masks)
    valid = valid_keys(num_queries, num_keys, is_causal, key_mask)
    torch.testing.assert_close(out, softmax_attention(x["q"], x["k"], x["v"], valid))


def test_dense_attention_has_finite_gradients_in_rows_without_keys() -> None:
    x = make_inputs()
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    dense_attention(q, k, v, key_mask=half_mask(13), is_causal=True).sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[1] == 0).all()


@pytest.mark.parametrize("index_heads", [1, 2, 4])
@pytest.mark.parametrize("correction", [False, True])
def test_topk_equals_the_reference(index_heads: int, correction: bool) -> None:
    x = make_inputs(kv_heads=2)
    options = {
        "num_samples": 5,
        "method": "topk",
        "num_index_heads": index_heads,
        "correction": correction,
        "window": 2,
        "num_sinks": 1,
        "is_causal": True,
        "scale": 0.7,
        "sketch_scale": 1.3,
        "return_indices": True,
    }
    out, indices = smart_bird_attention(**x, **options)
    expected, expected_indices = reference.smart_bird_attention(**x, **options)
    torch.testing.assert_close(out, expected)
    assert indices.equal(expected_indices)


@pytest.mark.parametrize("index_heads", [1, 2, 4])
def test_composes_the_ops_with_one_seed(index_heads: int) -> None:
    x, seed = make_inputs(), torch.tensor([3, 4])
    out, indices = smart_bird_attention(
        **x,
        num_samples=5,
        num_index_heads=index_heads,
        correction=True,
        dropout_p=0.3,
        seed=seed,
        return_indices=True,
    )
    drawn, log_inclusion = ops.sketch_sample(
        x["q_sketch"], x["k_sketch"], 5, num_index_heads=index_heads, seed=seed
    )
    bias = -log_inclusion.repeat_interleave(4 // index_heads, dim=1)
    expected = ops.gather_attention(
        x["q"], x["k"], x["v"], drawn, bias=bias, dropout_p=0.3, seed=seed
    )
    assert indices.equal(drawn)
    torch.testing.assert_close(out, expected)


def test_index_heads_default_to_one_per_head() -> None:
    _, indices = smart_bird_attention(**make_inputs(), num_samples=5, return_indices=True)
    assert indices.shape == (2, 4, 13, 5)
    assert indices.dtype == torch.int32
    assert not indices[:, 0].equal(indices[:, 1])


def test_correction_estimates_dense_attention() -> None:
    # A sketch that knows nothing of the scores: what the sample favours, attention does not.
    x = make_inputs(
        batch=1, heads=256, kv_heads=1, num_queries=4, num_keys=400, dtype=torch.float64
    )
    x["q"] = x["q"][:, :1].expand(-1, 256, -1, -1)
    dense = F.scaled_dot_product_attention(x["q"][:, :1], x["k"], x["v"])[0, 0]
    error = {}
    for correction in (False, True):
        out = smart_bird_attention(
            **x, num_samples=100, correction=correction, seed=torch.tensor([0, 0])
        )
        error[correction] = (out[0].mean(0) - dense).square().mean().sqrt().item()
    # One draw misses by 0.15 to 0.2; the mean of 256 has a 16th of that as noise. What is left of
    # the error without correction is its bias, 0.06.
    assert error[True] < 0.5 * error[False]


def test_seed_comes_from_the_generator() -> None:
    x = make_inputs()
    first = smart_bird_attention(**x, num_samples=5, generator=torch.Generator().manual_seed(1))
    again = smart_bird_attention(**x, num_samples=5, generator=torch.Generator().manual_seed(1))
    other = smart_bird_attention(**x, num_samples=5, generator=torch.Generator().manual_seed(2))
    assert first.equal(again)
    assert not first.equal(other)


def test_seed_comes_from_the_global_generator_by_default() -> None:
    x = make_inputs()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(smart_bird_attention(**x, num_samples=5))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])


def test_gradients_reach_q_k_v_and_not_the_sketch() -> None:
    x = {name: tensor.requires_grad_() for name, tensor in make_inputs().items()}
    smart_bird_attention(**x, num_samples=5, correction=True).sum().backward()
    for name in ("q", "k", "v"):
        assert x[name].grad is not None
        assert x[name].grad.abs().sum() > 0
    assert x["q_sketch"].grad is None
    assert x["k_sketch"].grad is None


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, correction: bool) -> None:
    out = smart_bird_attention(**make_inputs(dtype=dtype), num_samples=5, correction=correction)
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"method": "best"}, ValueError, "method"),
        ({"num_index_heads": 3}, ValueError, "num_index_heads"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"key_mask": torch.ones(2, 13)}, TypeError, "key_mask"),
        ({"window": 4, "num_sinks": 2}, ValueError, "window"),
        ({"q": torch.randn(2, 13, 8)}, ValueError, "q "),
        ({"seed": torch.zeros(2)}, TypeError, "seed"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], name: str) -> None:
    arguments = {**make_inputs(), "num_samples": 5, **change}
    with pytest.raises(error, match=name):
        smart_bird_attention(**arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "window": 3, "num_sinks": 2},
        {"dropout_p": 0.3, "num_index_heads": 4},
    ],
    ids=str,
)
def test_without_gradients_the_result_is_the_same(
    method: str, correction: bool, options: dict[str, Any]
) -> None:
    """One op draws and attends a block of queries at a time: here 1024, then the 76 that are left,
    for the indices of 2048 would take more than 16 MiB."""
    B, H, N, K = 4, 8, 1100, 160
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(B, H, N, 4, generator=generator) for _ in range(3))
    q_sketch, k_sketch = (torch.randn(B, N, 4, generator=generator) for _ in range(2))
    key_mask = torch.rand(B, N, generator=generator) < 0.9
    seed = torch.tensor([3, 4])

    def attention(q: Tensor) -> Tensor:
        out = smart_bird_attention(
            q,
            k,
            v,
            q_sketch,
            k_sketch,
            K,
            method=method,
            correction=correction,
            key_mask=key_mask,
            seed=seed,
            **options,
        )
        assert isinstance(out, Tensor)
        return out

    recorded = attention(q.requires_grad_())
    assert recorded.requires_grad
    with torch.no_grad():
        assert torch.equal(attention(q), recorded)

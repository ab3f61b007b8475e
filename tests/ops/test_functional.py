"""The functional form: a composition of the ops, so what is tested is how it composes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASE, CASES, METHODS, Backend, Case, check_against_reference
from cases import make_inputs as case_inputs
from torch import Tensor

from smartbird import ops, reference
from smartbird._checks import check_inputs
from smartbird._packing import packing
from smartbird._visible import check_visible
from smartbird.functional import (
    add_uniform_keys,
    attend,
    deal_keys,
    dense_attention,
    smart_bird_attention,
    smart_bird_attention_varlen,
)


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
@pytest.mark.parametrize("method", [*METHODS, "dealt"])
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_index_heads_default_to_those_of_keys(kv_heads: int) -> None:
    x = make_inputs(kv_heads=kv_heads)
    _, indices = smart_bird_attention(**x, num_samples=5, return_indices=True)
    assert indices.shape == (2, kv_heads, 13, 5)
    assert indices.dtype == torch.int32
    assert kv_heads == 1 or not indices[:, 0].equal(indices[:, 1])


def test_index_heads_default_to_the_sketches_where_those_are_more() -> None:
    x = make_inputs(kv_heads=2)
    x["q_sketch"] = torch.randn(2, 4, 13, 4)
    x["k_sketch"] = torch.randn(2, 4, 13, 4)
    _, indices = smart_bird_attention(**x, num_samples=5, return_indices=True)
    assert indices.shape == (2, 4, 13, 5)


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
        ({"correction": "no"}, TypeError, "correction must be a bool"),
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_problem_is_that_of_the_reference(case: Case) -> None:
    """By the method that is the same in both, so that it can be compared number by number."""
    x = case_inputs(case, torch.float64)

    def run(module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        attention = smart_bird_attention if module is ops else reference.smart_bird_attention
        return (
            attention(
                q, k, v, x.q_sketch, x.k_sketch, case.K, method="topk", scale=0.7, **x.sampling()
            ),
        )

    check_against_reference(ops, run, x.q, x.k, x.v)


@pytest.mark.parametrize("name", ["packed", "packed_masked", "packed_offsets", "offsets", "offset"])
def test_dense_attention_sees_the_same_keys(name: str) -> None:
    x = case_inputs(CASE[name], torch.float64)
    k, v = (t.repeat_interleave(x.q.shape[1] // t.shape[1], 1) for t in (x.k, x.v))
    expected = softmax_attention(x.q, k, v, x.valid().unsqueeze(1))
    torch.testing.assert_close(dense_attention(x.q, x.k, x.v, **x.masks()), expected)


@pytest.mark.parametrize("num_queries", [1, 13])
@pytest.mark.parametrize("query_offset", [None, 0, 12])
def test_dense_attention_of_few_queries(num_queries: int, query_offset: int | None) -> None:
    x = make_inputs(num_queries=num_queries)
    out = dense_attention(x["q"], x["k"], x["v"], is_causal=True, query_offset=query_offset)
    offset = 13 - num_queries if query_offset is None else query_offset
    valid = torch.ones(num_queries, 13, dtype=torch.bool).tril(offset)
    torch.testing.assert_close(out, softmax_attention(x["q"], x["k"], x["v"], valid))


# --- Padding, packs and nested tensors ---


ROWS = [
    {},
    {"is_causal": True, "window": 3, "num_sinks": 1},
    {"method": "dealt", "num_index_heads": 4, "is_causal": True, "num_sinks": 1},
    {"correction": True, "dropout_p": 0.3},
    {"query_offset": 2, "is_causal": True},
    {"query_offset": torch.tensor([2, 0, -1]), "is_causal": True},
]
LENGTHS = (13, 4, 9)
IDS = torch.tensor([5, 3, 8])


def one_by_one(x: dict[str, Tensor], options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Each of three sequences alone, without its padding."""
    results = []
    for b, length in enumerate(LENGTHS):
        alone = {name: t[b : b + 1].narrow(-2, 0, length) for name, t in x.items()}
        offset = options.get("query_offset")
        if isinstance(offset, Tensor):
            offset = int(offset[b])
        own = {**options, "query_offset": offset, "sequence_ids": IDS[b : b + 1]}
        results.append(smart_bird_attention(**alone, **own, return_indices=True))
    return results


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", ROWS, ids=str)
def test_padding_is_as_if_it_were_not_there(options: dict[str, Any], side: str, grad: bool) -> None:
    """Whatever it holds and wherever it is."""
    x = make_inputs(batch=3)
    options = {"num_samples": 5, "seed": torch.tensor([3, 4]), **options}
    expected = one_by_one(x, options)
    place = torch.arange(13).expand(3, 13)
    real = place < torch.tensor(LENGTHS)[:, None]
    if side == "left":
        real = real.flip(1)
        x = {
            name: torch.stack([t[b].roll(13 - n, -2) for b, n in enumerate(LENGTHS)])
            for name, t in x.items()
        }
    for t in x.values():
        hidden = ~real if t.dim() == 3 else ~real[:, None].expand(t.shape[:3])
        t[hidden] = torch.nan
        t.requires_grad_(grad)
    out, indices = smart_bird_attention(
        **x,
        **options,
        query_mask=real,
        key_mask=real,
        sequence_ids=IDS,
        return_indices=True,
    )
    assert torch.equal(
        out,
        smart_bird_attention(**x, **options, query_mask=real, key_mask=real, sequence_ids=IDS),
    )
    for b, (length, (alone, drawn)) in enumerate(zip(LENGTHS, expected, strict=True)):
        rows = slice(13 - length, None) if side == "left" else slice(length)
        assert torch.equal(out[b, :, rows], alone[0])
        shift = 13 - length if side == "left" else 0
        assert torch.equal(
            indices[b, :, rows], torch.where(drawn[0] < 0, drawn[0], drawn[0] + shift)
        )
        assert (out[b, :, ~real[b]] == 0).all()
        assert (indices[b, :, ~real[b]] == -1).all()
    if grad:
        out.sum().backward()
        for name in "qkv":
            gradient = x[name].grad
            assert gradient is not None
            assert gradient.isfinite().all()
            assert (gradient[~real[:, None].expand(gradient.shape[:3])] == 0).all()


def test_padding_of_queries_alone() -> None:
    """Cross-attention: all keys are real where no key_mask says otherwise."""
    x = make_inputs(num_queries=7)
    real = torch.arange(7) < torch.tensor([[7], [2]])
    seed = torch.tensor([3, 4])
    out = smart_bird_attention(**x, num_samples=5, query_mask=real, seed=seed)
    alone = smart_bird_attention(
        **{
            name: t[1:].narrow(-2, 0, 2) if name.startswith("q") else t[1:] for name, t in x.items()
        },
        num_samples=5,
        seed=seed,
        sequence_ids=torch.tensor([1]),
    )
    assert torch.equal(out[1, :, :2], alone[0])
    assert (out[1, :, 2:] == 0).all()
    expected = reference.smart_bird_attention(
        **x, num_samples=5, method="topk", query_mask=real, global_mask=torch.ones(2, 13) > 0
    )
    actual = smart_bird_attention(
        **x, num_samples=5, method="topk", query_mask=real, global_mask=torch.ones(2, 13) > 0
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sketch_heads", [None, 2])
@pytest.mark.parametrize("options", ROWS, ids=str)
def test_packed_sequences_are_those_of_a_batch(
    options: dict[str, Any], sketch_heads: int | None
) -> None:
    x = make_inputs(batch=3, kv_heads=2)
    if sketch_heads:
        x["q_sketch"], x["k_sketch"] = torch.randn(3, 2, 13, 4), torch.randn(3, 1, 13, 4)
    options = {"num_samples": 5, "seed": torch.tensor([3, 4]), **options}
    expected = one_by_one(x, options)

    def pack(t: Tensor) -> Tensor:
        parts = [t[b].narrow(-2, 0, length) for b, length in enumerate(LENGTHS)]
        return torch.cat(parts, -2) if t.dim() == 3 else torch.cat(parts, -2).transpose(0, 1)

    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = {name: pack(t) for name, t in x.items()}
    out, indices = smart_bird_attention_varlen(
        **packed,
        **options,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        sequence_ids=IDS,
        return_indices=True,
    )
    assert out.is_contiguous()
    for s, (alone, drawn) in enumerate(expected):
        rows = slice(int(ends[s]), int(ends[s + 1]))
        assert torch.equal(out[rows].transpose(0, 1), alone[0])
        assert torch.equal(
            indices[:, rows], torch.where(drawn[0] < 0, drawn[0], drawn[0] + ends[s])
        )

    def nest(t: Tensor) -> Tensor:
        values = t.transpose(0, 1) if t.dim() == 3 else t
        return torch.nested.nested_tensor_from_jagged(values, ends.long(), jagged_dim=t.dim() - 1)

    nested = {name: nest(t).requires_grad_() for name, t in packed.items()}
    out, indices = smart_bird_attention(**nested, **options, sequence_ids=IDS, return_indices=True)
    for ours, theirs, (alone, drawn) in zip(out.unbind(), indices.unbind(), expected, strict=True):
        assert torch.equal(ours, alone[0])
        assert torch.equal(theirs, drawn[0])
    (gradient,) = torch.autograd.grad(out.values().sum(), nested["v"])
    assert gradient.is_nested
    assert gradient.values().abs().sum() > 0


@pytest.mark.parametrize("masked", [False, True])
def test_packed_queries_stand_at_the_last_keys(backend: Backend, masked: bool) -> None:
    """Also for dropout, whichever way keys and attention are put together."""
    x = case_inputs(CASE["packed_forced_causal"], torch.float32, backend.device)
    keep = torch.rand(1, x.case.M, device=backend.device) < 0.8
    options = {**x.sampling(), "key_mask": keep if masked else None, "dropout_p": 0.4}
    lengths = torch.tensor(x.case.lengths, device=backend.device)
    outs = []
    for offset in (None, lengths[:, 1] - lengths[:, 0]):
        for grad in (False, True):
            q = x.q.clone().requires_grad_(grad)
            args = (q, x.k, x.v, x.q_sketch, x.k_sketch, x.case.K)
            outs.append(smart_bird_attention(*args, **{**options, "query_offset": offset}).detach())
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_packing_in_a_graph_carries_the_padding_along() -> None:
    """There no data may decide a shape; the result is the same."""
    x = make_inputs()
    real = torch.rand(2, 13) < 0.6
    packed, carried = packing(real), torch.compile(packing, backend="eager", fullgraph=True)(real)
    assert packed.order.shape[0] == real.sum()
    assert carried.order.shape[0] == real.numel()
    assert torch.equal(carried.order[: len(packed.order)], packed.order)
    assert torch.equal(carried.cu_seqlens, packed.cu_seqlens)
    for t in (x["q"], x["q_sketch"].unsqueeze(1)):
        expected = t.masked_fill(~real[:, None, :, None], -1)
        for p in (packed, carried):
            rows = p.pack(t)[:, :, : len(packed.order)]
            unpacked = packed.unpack(rows, fill=-1)
            assert torch.equal(unpacked, expected)
    assert torch.equal(carried.unpack(carried.pack(x["q"])), x["q"])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"query_mask": torch.ones(2, 13)}, TypeError, "query_mask must be a bool Tensor"),
        ({"query_mask": torch.ones(2, 12) > 0}, ValueError, r"query_mask must be \[B, N\]"),
        (
            {
                "query_mask": torch.ones(2, 13) > 0,
                "cu_seqlens_k": torch.tensor([0, 13], dtype=torch.int32),
            },
            ValueError,
            "cu_seqlens_k must be None with query_mask",
        ),
        (
            {"q": torch.nested.nested_tensor([torch.randn(4, 3, 8)], layout=torch.jagged)},
            ValueError,
            "q must be ragged in its next to last dimension",
        ),
        ({"first_head": 2, "method": "dealt"}, ValueError, "'dealt'"),
    ],
)
def test_what_cannot_be_packed_is_named(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        smart_bird_attention(**{**make_inputs(), "num_samples": 5, **change})


def test_nested_tensors_go_together() -> None:
    def nested(*lengths: int) -> Tensor:
        return torch.nested.nested_tensor(
            [torch.randn(n, 4, 8) for n in lengths], layout=torch.jagged
        ).transpose(1, 2)

    q, other = nested(3, 5), nested(4, 4)
    sketch = torch.nested.nested_tensor([torch.randn(n, 4) for n in (3, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match="k_sketch must be a nested tensor"):
        smart_bird_attention(q, q, q, sketch, torch.randn(2, 5, 4), 2)
    with pytest.raises(ValueError, match=r"v must have the lengths of k \[3, 5\], got \[4, 4\]"):
        smart_bird_attention(q, q, other, sketch, sketch, 2)
    with pytest.raises(ValueError, match="key_mask must be None with nested tensors"):
        smart_bird_attention(q, q, q, sketch, sketch, 2, key_mask=torch.ones(2, 5) > 0)


# --- Keys dealt out by rank, and uniform ones added ---


def dealt(
    scores: Tensor, valid: list[int], forced: set[int], num_samples: int, num_index_heads: int
) -> list[list[int]]:
    """The rule of deal_keys for one row, card by card."""
    ranked = sorted((j for j in valid if j not in forced), key=lambda j: -scores[j].item())
    hands = [sorted(forced) for _ in range(num_index_heads)]
    for rank, key in enumerate(ranked):
        hand = hands[rank % num_index_heads]
        if len(hand) < num_samples:
            hand.append(key)
    for hand in hands:
        hand += [key for key in ranked if key not in hand][: num_samples - len(hand)]
    return [sorted(hand) + [-1] * (num_samples - len(hand)) for hand in hands]


@pytest.mark.parametrize("num_index_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "num_sinks"), [(0, 0), (3, 0), (0, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(23, 23), (5, 40), (9, 4), (3, 0)])
def test_dealt_keys_follow_the_rule(
    num_queries: int,
    num_keys: int,
    window: int,
    num_sinks: int,
    is_causal: bool,
    masked: bool,
    num_index_heads: int,
) -> None:
    x = make_inputs(num_queries=num_queries, num_keys=num_keys, dtype=torch.float64)
    key_mask = half_mask(num_keys) if masked else None
    num_samples, scale = 5, -0.3
    indices = deal_keys(
        x["q_sketch"],
        x["k_sketch"],
        num_samples,
        num_index_heads=num_index_heads,
        scale=scale,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
    )
    assert indices.dtype == torch.int32
    assert indices.shape == (2, num_index_heads, num_queries, num_samples)
    scores = x["q_sketch"] @ x["k_sketch"].mT * scale
    allowed = valid_keys(num_queries, num_keys, is_causal, key_mask)
    allowed = allowed.expand(2, 1, num_queries, num_keys)[:, 0]
    for b in range(2):
        for i in range(num_queries):
            valid = allowed[b, i].nonzero().flatten().tolist()
            position = i + num_keys - num_queries
            before, after = (window - 1, 0) if is_causal else (window // 2, window // 2)
            near = range(position - before, position + after + 1) if window else ()
            forced = set(valid[:num_sinks]) | {j for j in valid if j in near}
            expected = dealt(scores[b, i], valid, forced, num_samples, num_index_heads)
            assert indices[b, :, i].tolist() == expected, (b, i)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.B and case.M and case.N])
def test_dealt_keys_of_every_problem_follow_the_rule(name: str) -> None:
    x = case_inputs(CASE[name], torch.float64)
    case = x.case
    num_sketches = case.H_s or 1
    group = 2
    options = {**x.rows(), "num_index_heads": num_sketches * group}
    indices = deal_keys(x.q_sketch, x.k_sketch, case.K, **options)
    valid, forced = x.valid_and_forced(case.K)
    scores = reference._sketches(x.q_sketch, x.k_sketch)
    scores = scores[0] @ scores[1].mT
    for b, i in torch.cartesian_prod(torch.arange(case.B), torch.arange(case.N)).tolist():
        keys = [row[b, i].nonzero().flatten().tolist() for row in (valid, forced)]
        for s in range(num_sketches):
            hands = dealt(scores[b, s, i], keys[0], set(keys[1]), case.K, group)
            assert indices[b, s * group : (s + 1) * group, i].tolist() == hands, (b, s, i)


def test_dealt_keys_of_equal_scores_go_by_index() -> None:
    sketch = torch.zeros(1, 12, 2)
    indices = deal_keys(sketch, sketch, 3, num_index_heads=2)
    assert indices[0, :, 5].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_dealing_leaves_the_generator_alone() -> None:
    x = make_inputs()
    state = torch.get_rng_state()
    deal_keys(x["q_sketch"].requires_grad_(), x["k_sketch"], 3, num_index_heads=2)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"window": 4}, ValueError, "num_samples must be at least the number of forced keys"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_index_heads": 0}, ValueError, "num_index_heads"),
        ({"num_index_heads": 1.0}, TypeError, "num_index_heads must be an int, got float"),
    ],
)
def test_bad_deals_are_named(change: dict[str, Any], error: type[Exception], said: str) -> None:
    x = make_inputs()
    options = {"num_samples": 4, "num_index_heads": 2, **change}
    with pytest.raises(error, match=said):
        deal_keys(x["q_sketch"], x["k_sketch"], **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_added_keys_are_valid_and_new(method: str, is_causal: bool) -> None:
    x, key_mask = make_inputs(num_queries=30, num_keys=30), half_mask(30)
    masks: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask}
    held, _ = ops.sketch_sample(
        x["q_sketch"], x["k_sketch"], 6, num_index_heads=3, method=method, **masks
    )
    seed = torch.tensor([1, 2])
    indices = add_uniform_keys(held, 30, 4, seed=seed, **masks)
    assert indices.dtype == torch.int32
    assert indices.shape == (2, 3, 30, 10)
    assert indices.equal(add_uniform_keys(held, 30, 4, seed=seed, **masks))
    valid = valid_keys(30, 30, is_causal, key_mask).expand(2, 1, 30, 30)[:, 0]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 3, 30))).tolist():
        before = [j for j in held[b, h, i].tolist() if j >= 0]
        after = [j for j in indices[b, h, i].tolist() if j >= 0]
        assert indices[b, h, i].tolist() == sorted(after) + [-1] * (10 - len(after))
        assert all(valid[b, i, j] for j in after)
        added = list(after)
        for j in before:  # all there as often as before
            added.remove(j)
        assert len(set(added)) == len(added) <= 4
        assert not set(added) & set(before)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (torch.zeros(1, 2, 3, 4), TypeError),
        ([0], TypeError),
        (torch.zeros(2, 3, 4, dtype=torch.int32), ValueError),
        (torch.zeros(1, 2, 3, 0, dtype=torch.int32), ValueError),
    ],
)
def test_keys_are_added_to_indices_only(indices: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="indices must"):
        add_uniform_keys(indices, 10, 3)


def test_an_argument_of_the_uniform_draw_is_named() -> None:
    indices = torch.zeros(1, 2, 3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="count must be at least 1"):
        add_uniform_keys(indices, 10, 0)
    with pytest.raises(TypeError, match="num_keys must be an int, got float"):
        add_uniform_keys(indices, 10.0, 1)


@pytest.mark.parametrize("name", ["packed", "packed_offsets", "offsets", "globals"])
def test_keys_are_added_where_rows_see_them(name: str) -> None:
    x = case_inputs(CASE[name], torch.float32)
    case = x.case
    held, _ = ops.sketch_sample(x.q_sketch, x.k_sketch, case.K, **x.sampling())
    indices = add_uniform_keys(held, case.M, 4, **x.masks())
    valid = x.valid()[:, None].expand(-1, case.H_i, -1, -1)
    entries = indices.long().remainder(case.M + 1)
    assert (F.pad(valid, (0, 1), value=True).gather(-1, entries)).all()
    # Without a held key in the way, a row has all of its keys, or four more.
    num_held, num_now = ((t >= 0).sum(-1) for t in (held, indices))
    assert (num_now >= num_held).all()
    assert (num_now[num_held == valid.sum(-1)] == num_held[num_held == valid.sum(-1)]).all()


def test_uniform_keys_are_drawn_apart_from_the_others() -> None:
    """One seed for both: where the sketch is uniform too, the two draws have nothing in common."""
    zeros = torch.zeros(1, 2000, 1)
    q, k = torch.zeros(1, 1, 2000, 4), torch.zeros(1, 1, 40, 4)
    q, k, _, q_sketch, k_sketch = check_inputs(q, k, k, zeros, zeros[:, :40])
    attended = attend(
        *(q, k, k, q_sketch, k_sketch, 8),
        check_visible(1, 2000, 40, q.device),
        num_index_heads=1,
        method="gumbel",
        seed=torch.tensor([1, 2]),
        num_uniform=4,
    )
    assert attended.indices is not None
    # Of 4 added keys each is held already with probability 4 / 40: five standard deviations.
    dropped = (attended.indices == -1).sum().item()
    assert abs(dropped - 2000 * 4 * 0.1) < 5 * (2000 * 4 * 0.1 * 0.9) ** 0.5


def test_added_keys_are_uniform() -> None:
    held = torch.tensor([2, 5, -1], dtype=torch.int32).expand(1, 1, 4000, 3)
    indices = add_uniform_keys(held, 10, 3)
    counts = torch.bincount(indices[indices >= 0], minlength=10).double()
    assert (counts[[2, 5]] == 4000).all()
    # Each of the others is among 3 distinct of 10 with probability 0.3: five standard deviations.
    others = counts[[0, 1, 3, 4, 6, 7, 8, 9]]
    assert ((others - 1200).abs() < 5 * (4000 * 0.3 * 0.7) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_dealt_by_scores_that_are_not_rounded(dtype: torch.dtype) -> None:
    q_sketch, k_sketch = torch.randn(2, 9, 16).to(dtype), torch.randn(2, 80, 16).to(dtype)
    dealt = deal_keys(q_sketch, k_sketch, 8, num_index_heads=4)
    assert dealt.equal(deal_keys(q_sketch.float(), k_sketch.float(), 8, num_index_heads=4))

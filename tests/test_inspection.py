"""What the layers of a model chose, and how much of dense attention, written out, that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smartbird import (
    DenseWarmup,
    SampledAttention,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    sketch_stats,
)
from smartbird.inspection import LayerCall, attention_recall, record

MASKS = [None, torch.arange(24) < torch.tensor([[24], [17], [1]])]


def valid_keys(
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    key_mask: Tensor | None,
    query_offset: int | None = None,
) -> Tensor:
    """Bool [B or 1, 1, N, M]."""
    valid = torch.ones(num_queries, num_keys, dtype=torch.bool)
    offset = num_keys - num_queries if query_offset is None else query_offset
    valid = (valid.tril(offset) if is_causal else valid)[None, None]
    return valid if key_mask is None else valid & key_mask[:, None, None]


def dense_probabilities(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the valid keys, float64 [B, H, N, M]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~valid, -torch.inf).softmax(-1)


def some_keys(valid: Tensor, batch: int, index_heads: int, num_samples: int) -> Tensor:
    """Random valid keys with repetitions, -1 instead of others, in no order."""
    num_queries, num_keys = valid.shape[-2:]
    indices = torch.randint(num_keys, (batch, index_heads, num_queries, num_samples))
    kept = valid.expand(batch, index_heads, -1, -1).gather(-1, indices)
    return indices.masked_fill(~kept, -1).int()


def held(probabilities: Tensor, indices: Tensor) -> Tensor:
    """The sum of the probabilities [B, H, N, M] of the keys of each row, counted once."""
    indices = indices.repeat_interleave(probabilities.shape[1] // indices.shape[1], dim=1)
    chosen = torch.zeros_like(probabilities, dtype=torch.bool)
    for slot in indices.unbind(-1):
        used = slot >= 0
        chosen |= torch.zeros_like(chosen).scatter_(
            -1, slot.clamp(min=0).long().unsqueeze(-1), used.unsqueeze(-1)
        )
    return (probabilities * chosen).sum(-1)


@pytest.mark.parametrize("key_mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "query_offset"), [(7, None), (24, None), (7, 3)])
@pytest.mark.parametrize(("kv_heads", "index_heads"), [(4, 1), (4, 4), (2, 2), (1, 4)])
def test_recall_is_the_sum_of_dense_probabilities(
    kv_heads: int,
    index_heads: int,
    num_queries: int,
    query_offset: int | None,
    is_causal: bool,
    key_mask: Tensor | None,
) -> None:
    q, k = 2.0 * torch.randn(3, 4, num_queries, 8), torch.randn(3, kv_heads, 24, 8)
    valid = valid_keys(num_queries, 24, is_causal, key_mask, query_offset)
    indices = some_keys(valid, 3, index_heads, 6)
    recall = attention_recall(
        q, k, indices, is_causal=is_causal, key_mask=key_mask, query_offset=query_offset
    )
    expected = held(dense_probabilities(q, k, valid), indices).float()
    torch.testing.assert_close(recall, expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]
)
def test_recall_is_measured_in_float32_at_least(dtype: torch.dtype, tolerance: float) -> None:
    q, k = torch.randn(2, 1, 2, 24, 8, dtype=dtype)
    indices = some_keys(valid_keys(24, 24, False, None), 1, 2, 6)
    recall = attention_recall(q, k, indices)
    assert recall.dtype == torch.promote_types(dtype, torch.float32)
    expected = held(dense_probabilities(q, k, torch.tensor(True)), indices)
    torch.testing.assert_close(recall.double(), expected, rtol=0, atol=tolerance)


def test_queries_that_do_not_count_have_no_recall() -> None:
    q, k = torch.randn(2, 3, 2, 24, 8)
    mask = MASKS[1]
    recall = attention_recall(q, k, None, key_mask=mask, query_mask=mask)
    assert recall.isnan().equal(~mask[:, None].expand(3, 2, 24))
    assert (recall[~recall.isnan()] == 1.0).all()
    # A causal query of more queries than keys that sees no key.
    assert attention_recall(q, k[:, :, :20], None, is_causal=True)[..., :4].isnan().all()


@pytest.mark.parametrize("key_mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "query_offset"), [(7, None), (24, None), (9, -2)])
def test_best_and_chance(
    num_queries: int, query_offset: int | None, is_causal: bool, key_mask: Tensor | None
) -> None:
    q, k = torch.randn(3, 4, num_queries, 8), torch.randn(3, 2, 24, 8)
    valid = valid_keys(num_queries, 24, is_causal, key_mask, query_offset)
    indices = some_keys(valid, 3, 2, 5)
    keys = LayerCall(q, k, indices, is_causal, key_mask, query_offset=query_offset).keys()
    probabilities = dense_probabilities(q, k, valid).float()
    best = probabilities.topk(5).values.sum(-1)
    torch.testing.assert_close(keys.best, best, rtol=0, atol=1e-5, equal_nan=True)
    # Of even attention, any keys hold their share.
    even = valid / valid.sum(-1, keepdim=True)
    chance = held(even.expand_as(probabilities), indices)
    torch.testing.assert_close(keys.chance, chance, equal_nan=True)
    assert keys.recall.isnan().equal(keys.best.isnan())


class Decoder(nn.Module):
    """Self- and cross-attention of more than one layout and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SmartBirdEncoderLayer(
            16, 4, 32, batch_first=True, num_samples=5, sketch_dim=4
        )
        self.own = SmartBirdAttention(
            16, 4, num_kv_heads=2, num_samples=3, sketch_dim=4, num_index_heads=2
        )
        self.cross = SmartBirdAttention(16, 4, num_samples=5, sketch_dim=4, batch_first=False)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(memory, src_key_padding_mask=padding)
        x, indices = self.own(x, is_causal=True, return_indices=True)
        out: Tensor = self.cross(x.transpose(0, 1), memory.transpose(0, 1), key_mask=~padding)
        return out, indices


def decoder() -> tuple[Decoder, Tensor, Tensor, Tensor]:
    """A model and its inputs: 2 sequences of 7 tokens that look at 9 others."""
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    return Decoder().eval(), torch.randn(2, 7, 16), torch.randn(2, 9, 16), padding


def test_every_layer_is_recorded_and_the_model_computes_the_same() -> None:
    model, *inputs = decoder()
    expected = model(*inputs)
    with record(model) as calls:
        out, indices = model(*inputs)
    assert out.equal(expected[0])
    assert indices.equal(expected[1])
    assert list(calls) == ["encoder.self_attn.core", "own.core", "cross.core"]
    assert calls["own.core"].indices.equal(indices)

    shapes = {
        name: (call.q.shape, call.k.shape, call.indices.shape) for name, call in calls.items()
    }
    assert shapes == {
        "encoder.self_attn.core": ((2, 4, 9, 4), (2, 4, 9, 4), (2, 4, 9, 5)),
        "own.core": ((2, 4, 7, 4), (2, 2, 7, 4), (2, 2, 7, 3)),
        "cross.core": ((2, 4, 7, 4), (2, 4, 9, 4), (2, 4, 7, 5)),
    }
    assert [call.is_causal for call in calls.values()] == [False, True, False]
    kept = ~inputs[2]
    assert calls["encoder.self_attn.core"].query_mask.equal(kept)
    assert calls["own.core"].key_mask is None
    assert calls["own.core"].query_mask is None
    assert calls["cross.core"].key_mask.equal(kept)
    assert calls["cross.core"].query_mask.all()
    for call in calls.values():
        keys = call.keys()
        counted = ~keys.recall.isnan()
        assert (keys.recall <= keys.best + 1e-5)[counted].all()
        assert (keys.chance <= keys.best + 1e-5)[counted].all()

    calls.clear()
    model(*inputs)
    assert calls == {}


def test_recorded_queries_and_keys_are_those_the_layer_attends_with() -> None:
    # All keys are drawn, so that the layer's output is dense attention of the recorded q and k.
    layer = SmartBirdAttention(16, 4, num_samples=6, sketch_dim=4).eval()
    x = torch.randn(6, 16)
    with record(layer) as calls:
        out = layer(x)
    call = calls["core"]
    torch.testing.assert_close(call.recall(), torch.ones(1, 4, 6))
    v = x @ layer.in_proj_weight[32:].T + layer.in_proj_bias[32:]
    heads = dense_probabilities(call.q, call.k, torch.tensor(True)).float() @ v.view(
        6, 4, 4
    ).transpose(0, 1)
    expected = layer.out_proj(heads[0].transpose(0, 1).flatten(1))
    torch.testing.assert_close(out, expected)


def test_the_last_calls_are_kept_in_their_order() -> None:
    first, second = (SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2) for _ in range(2))
    model = nn.ModuleDict({"first": first, "second": second}).eval()
    x = torch.randn(2, 7, 8)
    with record(model) as calls:
        for layer in (first, second, first):
            layer(x)
            x = x + 1
    assert list(calls) == ["second.core", "first.core"]
    assert calls["first.core"].indices.equal(first(x - 1, return_indices=True)[1])


def test_a_dense_layer_is_recorded_without_indices() -> None:
    model = nn.Sequential(SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2)).eval()
    DenseWarmup(model, 1)
    x = torch.randn(2, 7, 8)
    expected = model(x)
    with record(model) as calls:
        assert model(x).equal(expected)
    assert calls["0.core"].indices is None
    keys = calls["0.core"].keys()
    for share in (keys.recall, keys.best, keys.chance):
        assert share.equal(torch.ones(2, 2, 7))


def test_training_goes_on_under_a_record() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2)
    x = torch.randn(2, 7, 8, requires_grad=True)
    with record(layer) as calls:
        layer(x).sum().backward()
    assert x.grad is not None
    assert not calls["core"].q.requires_grad


def qkv(batch: int, num_queries: int, num_keys: int) -> list[Tensor]:
    """q, k and v of 4 and 2 heads, and sketches."""
    return [
        torch.randn(batch, 4, num_queries, 8),
        *torch.randn(2, batch, 2, num_keys, 8),
        torch.randn(batch, num_queries, 3),
        torch.randn(batch, num_keys, 3),
    ]


def of_sequence(call: LayerCall, b: int) -> LayerCall:
    """One line of a call, its padding cut off."""
    rows = call.query_mask[b] if call.query_mask is not None else slice(None)
    keys = call.key_mask[b] if call.key_mask is not None else slice(None)
    offset = call.query_offset
    return LayerCall(
        call.q[b : b + 1, :, rows],
        call.k[b : b + 1, :, keys],
        None if call.indices is None else call.indices[b : b + 1, :, rows],
        call.is_causal,
        query_offset=offset[b : b + 1] if isinstance(offset, Tensor) else offset,
        scale=call.scale,
    )


def assert_same_call(actual: LayerCall, expected: LayerCall) -> None:
    assert actual.q.equal(expected.q)
    assert actual.k.equal(expected.k)
    assert actual.indices.equal(expected.indices)
    ours, theirs = actual.keys(), expected.keys()
    for name in ("recall", "best", "chance"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "kept",
    [
        torch.arange(24) < torch.tensor([[24], [17], [1]]),
        torch.arange(24) >= torch.tensor([[0], [7], [23]]),
        torch.arange(24) % torch.tensor([[1], [2], [3]]) == 0,
        torch.arange(24) < torch.tensor([[9], [0], [4]]),  # shorter than the batch; one is empty
    ],
    ids=["right", "left", "between", "empty"],
)
def test_of_a_padded_batch_every_sequence_is_recorded_as_if_it_were_alone(
    kept: Tensor, is_causal: bool
) -> None:
    layer = SmartBirdAttention(16, 4, num_samples=5, sketch_dim=4, is_causal=is_causal).eval()
    x = torch.randn(3, 24, 16)
    with record(layer) as calls:
        layer(x, key_mask=kept)
    batch = calls["core"]
    lengths = kept.sum(-1)
    assert batch.q.shape == (3, 4, lengths.max(), 4)
    assert batch.query_mask.equal(torch.arange(lengths.max()) < lengths[:, None])
    assert batch.key_mask.equal(batch.query_mask)
    padding = ~batch.query_mask[:, None].expand(3, 4, -1)
    assert batch.indices[padding].eq(-1).all()
    for share in (batch.recall(), batch.keys().best, batch.keys().chance):
        assert share.isnan().equal(padding)
    for b in range(3):
        if lengths[b] > 0:
            with record(layer) as calls:
                _, indices = layer(x[b, kept[b]], return_indices=True)
            alone = calls["core"]
            assert alone.indices.equal(indices)
            of_batch = of_sequence(batch, b)
            torch.testing.assert_close(of_batch.recall(), alone.recall(), rtol=0, atol=1e-5)
            assert of_batch.indices.equal(alone.indices)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_offset", [None, 5, "each"])
def test_packed_sequences_are_recorded_as_a_batch(
    query_offset: int | str | None, is_causal: bool
) -> None:
    layer = SampledAttention(4, num_kv_heads=2, num_samples=5, is_causal=is_causal).eval()
    lengths = [(3, 9), (0, 4), (7, 12), (2, 0)]
    offsets = torch.tensor([0, 3, 20, 1])
    sequences = [qkv(1, *each) for each in lengths]
    cu_seqlens_q, cu_seqlens_k = torch.tensor([(0, 0), *lengths]).cumsum(0).int().T.contiguous()
    packed = [torch.cat(parts, dim=-2) for parts in zip(*sequences, strict=True)]
    with record(layer) as calls:
        layer(
            *packed,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            query_offset=offsets if query_offset == "each" else query_offset,
        )
    batch = calls[""]
    assert batch.q.shape == (4, 4, 7, 8)
    assert batch.k.shape == (4, 2, 12, 8)
    assert batch.recall().shape == batch.keys().best.shape == (4, 4, 7)
    for b, inputs in enumerate(sequences):
        offset = offsets[b : b + 1] if query_offset == "each" else query_offset
        with record(layer) as calls:
            layer(*inputs, query_offset=offset)
        assert_same_call(of_sequence(batch, b), calls[""])


@pytest.mark.parametrize("query_offset", [None, 4, torch.tensor([0, 11])])
def test_a_call_without_projections_is_recorded(query_offset: int | Tensor | None) -> None:
    layer = SampledAttention(4, num_kv_heads=2, num_samples=5, is_causal=True, scale=2.0).eval()
    model = nn.ModuleList([layer])
    inputs = qkv(2, 7, 20)
    key_mask = torch.rand(2, 20) < 0.7
    with record(model) as calls:
        _, indices = layer(
            *inputs, key_mask=key_mask, query_offset=query_offset, return_indices=True
        )
    call = calls["0"]
    assert call.indices.equal(indices)
    assert call.query_mask is None
    offset = torch.as_tensor(13 if query_offset is None else query_offset).reshape(-1, 1)
    position = offset + torch.arange(7)
    valid = torch.arange(20) <= position[:, None, :, None]
    valid = valid & key_mask[:, None, None]
    expected = held(dense_probabilities(4.0 * 2.0**0.5 * inputs[0], inputs[1], valid), indices)
    keys = call.keys()
    torch.testing.assert_close(keys.recall, expected.float(), rtol=0, atol=1e-5, equal_nan=True)
    assert (keys.recall <= keys.best + 1e-5)[~keys.recall.isnan()].all()


def test_observers_do_not_hide_each_other() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2).eval()
    x = torch.randn(2, 7, 8)
    with sketch_stats(layer) as stats, record(layer) as outer, record(layer) as inner:
        layer(x)
    assert outer["core"].indices.equal(inner["core"].indices)
    mass = outer["core"].recall().mean().item()
    assert stats["core"].mass == pytest.approx(mass, abs=1e-5)
    assert layer.core.observer is None


def test_a_compiled_model_is_recorded() -> None:
    model = nn.Sequential(SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2)).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 7, 8)
    expected = compiled(x)
    with record(compiled) as calls:
        out = compiled(x)
    torch.testing.assert_close(out, expected)
    assert list(calls) == ["_orig_mod.0.core"]
    calls.clear()
    compiled(x)
    assert calls == {}

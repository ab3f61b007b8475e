"""What the layers of a model chose, and how much of dense attention, written out, that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smartbird import SmartBirdAttention, SmartBirdEncoderLayer
from smartbird.inspection import LayerCall, attention_recall, record
from smartbird.nn import DenseWarmup

MASKS = [None, torch.arange(24) < torch.tensor([[24], [17], [1]])]


def valid_keys(num_queries: int, num_keys: int, is_causal: bool, key_mask: Tensor | None) -> Tensor:
    """Bool [B or 1, 1, N, M]."""
    valid = torch.ones(num_queries, num_keys, dtype=torch.bool)
    valid = (valid.tril(num_keys - num_queries) if is_causal else valid)[None, None]
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
@pytest.mark.parametrize("num_queries", [7, 24])
@pytest.mark.parametrize(("kv_heads", "index_heads"), [(4, 1), (4, 4), (2, 2), (1, 4)])
def test_recall_is_the_sum_of_dense_probabilities(
    kv_heads: int, index_heads: int, num_queries: int, is_causal: bool, key_mask: Tensor | None
) -> None:
    q, k = 2.0 * torch.randn(3, 4, num_queries, 8), torch.randn(3, kv_heads, 24, 8)
    valid = valid_keys(num_queries, 24, is_causal, key_mask)
    indices = some_keys(valid, 3, index_heads, 6)
    recall = attention_recall(q, k, indices, is_causal=is_causal, key_mask=key_mask)
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
@pytest.mark.parametrize("num_queries", [7, 24])
def test_best_and_chance(num_queries: int, is_causal: bool, key_mask: Tensor | None) -> None:
    q, k = torch.randn(3, 4, num_queries, 8), torch.randn(3, 2, 24, 8)
    valid = valid_keys(num_queries, 24, is_causal, key_mask)
    indices = some_keys(valid, 3, 2, 5)
    keys = LayerCall(q, k, indices, is_causal, key_mask).keys()
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
    assert list(calls) == ["encoder.self_attn", "own", "cross"]
    assert calls["own"].indices.equal(indices)

    shapes = {
        name: (call.q.shape, call.k.shape, call.indices.shape) for name, call in calls.items()
    }
    assert shapes == {
        "encoder.self_attn": ((2, 4, 9, 4), (2, 4, 9, 4), (2, 4, 9, 5)),
        "own": ((2, 4, 7, 4), (2, 2, 7, 4), (2, 2, 7, 3)),
        "cross": ((2, 4, 7, 4), (2, 4, 9, 4), (2, 4, 7, 5)),
    }
    assert [call.is_causal for call in calls.values()] == [False, True, False]
    kept = ~inputs[2]
    assert calls["encoder.self_attn"].query_mask.equal(kept)
    assert calls["own"].key_mask is None
    assert calls["cross"].key_mask.equal(kept)
    assert calls["cross"].query_mask is None
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
    call = calls[""]
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
    assert list(calls) == ["second", "first"]
    assert calls["first"].indices.equal(first(x - 1, return_indices=True)[1])


def test_a_dense_layer_is_recorded_without_indices() -> None:
    model = nn.Sequential(SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2)).eval()
    DenseWarmup(model, 1)
    x = torch.randn(2, 7, 8)
    expected = model(x)
    with record(model) as calls:
        assert model(x).equal(expected)
    assert calls["0"].indices is None
    keys = calls["0"].keys()
    for share in (keys.recall, keys.best, keys.chance):
        assert share.equal(torch.ones(2, 2, 7))


def test_training_goes_on_under_a_record() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2)
    x = torch.randn(2, 7, 8, requires_grad=True)
    with record(layer) as calls:
        layer(x).sum().backward()
    assert x.grad is not None
    assert not calls[""].q.requires_grad


def test_other_hooks_see_what_the_caller_asked_for() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3, sketch_dim=2).eval()
    seen: list[object] = []
    layer.register_forward_hook(lambda _layer, _args, output: seen.append(output))
    with record(layer):
        out = layer(torch.randn(2, 7, 8))
    assert seen[0] is out

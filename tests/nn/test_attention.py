"""SmartBirdAttention: equal to PyTorch's own layer when every key is drawn, and what it adds."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layers import (
    ROUTES,
    E,
    H,
    N,
    gradients,
    make_layer,
    padding_mask,
    start_value_route,
)
from torch import Tensor, nn

from smartbird import ops
from smartbird.functional import deal_keys, smart_bird_attention
from smartbird.nn import (
    DenseWarmup,
    RotaryEmbedding,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    seed_evaluation,
    sketch_loss,
)

# --- nn.MultiheadAttention ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_multihead_attention_when_every_key_is_drawn(batch_first: bool, bias: bool) -> None:
    expected = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first).eval()
    layer = make_layer(num_samples=N, bias=bias, batch_first=batch_first).eval()
    missing, unexpected = layer.load_state_dict(expected.state_dict(), strict=False)
    assert missing == ["sketch_proj_weight", "sketch_proj_bias"][: 1 + bias]
    assert unexpected == []
    query, key, value = torch.randn(3, 2, N, E).unbind()
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    padding = padding_mask()
    for arguments in ((query, query, query), (query, key, key), (query, key, value)):
        out = layer(*arguments, key_mask=~padding)
        dense = expected(*arguments, key_padding_mask=padding, need_weights=False)[0]
        if arguments[1] is query:  # the queries are padded as well
            dense = dense.masked_fill((padding if batch_first else padding.T).unsqueeze(-1), 0)
        torch.testing.assert_close(out, dense)


def test_cross_attention_of_another_length() -> None:
    expected = nn.MultiheadAttention(E, H, batch_first=True).eval()
    layer = make_layer(num_samples=N).eval()
    layer.load_state_dict(expected.state_dict(), strict=False)
    query, key = torch.randn(2, 5, E), torch.randn(2, N, E)
    torch.testing.assert_close(layer(query, key), expected(query, key, key)[0])


def test_initial_weights_are_those_of_multihead_attention() -> None:
    torch.manual_seed(1)
    expected = nn.MultiheadAttention(64, 4).state_dict()
    drawn = SmartBirdAttention(64, 4).state_dict()
    for name, weight in expected.items():
        # Uniform weights: equal ranges up to what the extremes of thousands of draws leave.
        torch.testing.assert_close(drawn[name].abs().max(), weight.abs().max(), rtol=0.01, atol=0)


# --- Layouts and sizes ---


def test_layouts_agree() -> None:
    layer = make_layer().eval()
    x = torch.randn(2, N, E)
    mask = ~padding_mask()
    expected, indices = layer(x, key_mask=mask, return_indices=True)
    assert indices.shape == (2, H, N, 4)
    alone, alone_indices = layer(x[0], key_mask=mask[0], return_indices=True)
    torch.testing.assert_close(alone, expected[0])
    assert alone_indices.equal(indices[:1])
    layer.batch_first = False
    torch.testing.assert_close(layer(x.transpose(0, 1), key_mask=mask), expected.transpose(0, 1))


@pytest.mark.parametrize("learning", [(), ROUTES])
@pytest.mark.parametrize(("num_kv_heads", "num_index_heads"), [(1, 1), (2, 4), (4, 2)])
def test_head_ratios(num_kv_heads: int, num_index_heads: int, learning: tuple[str, ...]) -> None:
    layer = make_layer(
        num_kv_heads=num_kv_heads,
        num_index_heads=num_index_heads,
        learning=learning,
        correction=True,
    )
    x = torch.randn(2, N, E)
    out, indices = layer(x, return_indices=True)
    assert out.shape == x.shape
    assert indices.shape == (2, num_index_heads, N, 4)
    (out.sum() + sketch_loss(layer)).backward()
    for name, parameter in layer.named_parameters():
        if learning or not name.startswith("sketch"):
            assert parameter.grad is not None, name


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, dense: bool) -> None:
    layer = make_layer(dtype=dtype, learning=ROUTES, correction=True)
    layer.dense = dense
    out = layer(torch.randn(2, N, E, dtype=dtype))
    assert out.dtype == dtype
    (out.sum() + sketch_loss(layer)).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


# --- Masks ---


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("learning", [("distill",), ROUTES])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_keys_do_not_matter(is_causal: bool, learning: tuple[str, ...], dense: bool) -> None:
    layer = make_layer(learning=learning, is_causal=is_causal).eval()
    layer.dense = dense
    if "value" in learning:
        start_value_route(layer)
    x = torch.randn(2, N, E)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 2:5] = False
    changed = torch.where(mask[..., None], x, 1e3)
    out, out_changed = layer(x, key_mask=mask), layer(changed, key_mask=mask)
    assert out[mask].equal(out_changed[mask])
    assert not out[mask].equal(layer(x)[mask])


@pytest.mark.parametrize("learning", [("distill",), ROUTES])
def test_causal_layer_does_not_look_ahead(learning: tuple[str, ...]) -> None:
    layer = make_layer(learning=learning, is_causal=True).eval()
    x = torch.randn(2, N, E)
    changed = torch.cat([x[:, :5], torch.randn(2, N - 5, E)], dim=1)
    assert layer(x)[:, :5].equal(layer(changed)[:, :5])
    assert not layer(x, is_causal=False)[:, :5].equal(layer(changed, is_causal=False)[:, :5])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, N, E), (2, 0, E), (2, N, E)])
def test_masks_that_leave_little_or_nothing(
    shape: tuple[int, ...], training: bool, dense: bool
) -> None:
    layer = make_layer(learning=ROUTES).train(training)
    layer.dense = dense
    x = torch.randn(shape, requires_grad=True)
    lengths = torch.arange(shape[0])[:, None]
    for mask in (torch.arange(shape[1]) < 3 * lengths, torch.arange(shape[1]) < 0 * lengths):
        out = layer(x, key_mask=mask)
        assert out.shape == shape
        assert (out[~mask] == 0).all()
        (out.sum() + sketch_loss(layer)).backward()
        assert x.grad is None or x.grad.isfinite().all()
        if not dense:
            indices = layer(x, key_mask=mask, return_indices=True)[1]
            assert indices.shape == (shape[0], H, shape[1], 4)
            sketch_loss(layer)


# --- Evaluation and training ---


def test_evaluation_is_a_function_of_its_input() -> None:
    layer = make_layer(dropout=0.5).eval()
    x = torch.randn(2, N, E)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert layer(x).equal(out)
    assert torch.get_rng_state().equal(state)
    assert "eval_seed" not in layer.state_dict()


def test_training_draws_from_the_global_generator() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(2, N, E)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])
    assert not layer(x).equal(layer(x))


def test_seed_evaluation() -> None:
    model = nn.ModuleList([make_layer(), make_layer()]).eval()
    model[1].load_state_dict(model[0].state_dict())
    x = torch.randn(2, N, E)
    assert model[0](x).equal(model[1](x))
    first = []
    for seed in (0, 1, 0):
        seed_evaluation(model, seed)
        assert not model[0](x).equal(model[1](x))
        first.append(model[0](x))
    assert first[0].equal(first[2])
    assert not first[0].equal(first[1])


@pytest.mark.parametrize("method", ["systematic", "topk", "dealt"])
def test_eval_method_draws_in_evaluation_only(method: str) -> None:
    layer, plain = make_layer(eval_method=method), make_layer()
    plain.load_state_dict(layer.state_dict())
    same = make_layer(method=method).eval()
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, N, E)
    outs = []
    for one in (layer, plain):
        torch.manual_seed(1)
        outs.append(one(x))
    assert outs[0].equal(outs[1])
    out, indices = layer.eval()(x, return_indices=True)
    assert out.equal(same(x))
    assert indices.equal(same(x, return_indices=True)[1])
    assert not out.equal(plain.eval()(x))
    with torch.no_grad():
        assert layer(x).equal(out)


def test_dealt_evaluation() -> None:
    layer = make_layer(
        num_index_heads=2, eval_method="dealt", window=2, num_sinks=1, is_causal=True
    ).eval()
    x = torch.randn(2, N, E)
    indices = layer(x, key_mask=~padding_mask(), return_indices=True)[1]
    expected = deal_keys(
        *layer.sketch(x),
        4,
        num_index_heads=2,
        window=2,
        num_sinks=1,
        is_causal=True,
        key_mask=~padding_mask(),
    )
    assert indices[~padding_mask()[:, None].expand(-1, 2, -1)].equal(
        expected[~padding_mask()[:, None].expand(-1, 2, -1)]
    )
    assert (indices[1, :, -3:] == -1).all()


# --- Exploration ---


def test_temperature_flattens_the_draws_of_training_only() -> None:
    # Scores that leave a draw no choice, and a temperature that leaves it every choice.
    layer, plain = make_layer(temperature=1e9), make_layer()
    with torch.no_grad():
        layer.sketch_proj_weight.mul_(1e4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 50, E).expand(40, -1, -1)
    assert layer.eval()(x).equal(plain.eval()(x))
    indices = layer.train()(x, return_indices=True)[1]
    # 160 draws of 4 of 50 keys: each is drawn 12.8 times on average in a row.
    counts = torch.stack([torch.bincount(i.flatten(), minlength=50) for i in indices.unbind(2)])
    assert counts.max() < 40
    assert counts.float().mean() == 4 * 160 / 50
    counts = torch.bincount(plain.train()(x, return_indices=True)[1][:, :, 0].flatten())
    assert counts.max() == 160


def test_log_inclusion_is_that_of_the_tempered_draw() -> None:
    layer = make_layer(temperature=3.0, correction=True, num_index_heads=H)
    x = torch.randn(2, N, E)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    expected = smart_bird_attention(
        *layer._project(x, x, x),
        *layer._sketch(x, x),
        4,
        correction=True,
        sketch_scale=4**-0.5 / 3.0,
    )
    torch.testing.assert_close(out, layer.out_proj(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("num_samples", "share", "num_uniform"), [(4, 0.5, 2), (5, 0.5, 2)])
def test_uniform_keys_take_their_share_in_training(
    num_samples: int, share: float, num_uniform: int
) -> None:
    layer = make_layer(num_samples=num_samples, uniform_share=share, method="topk", learning=())
    x = torch.randn(2, 40, E)
    favoured = ops.sketch_sample(
        *layer._sketch(x, x), num_samples - num_uniform, method="topk", num_index_heads=H
    )[0]
    with torch.no_grad():
        layer(x)  # also where nothing else needs indices
        indices = layer(x, return_indices=True)[1]
    assert indices.shape == (2, H, 40, num_samples)
    among = (indices.unsqueeze(-1) == favoured.unsqueeze(-2)).any(-1)
    assert (among.sum(-1) == num_samples - num_uniform).all()
    assert among.logical_not().logical_and(indices >= 0).sum(-1).max() == num_uniform
    plain = make_layer(num_samples=num_samples, method="topk", learning=()).eval()
    plain.load_state_dict(layer.state_dict())
    assert layer.eval()(x).equal(plain(x))


def test_uniform_keys_are_drawn_anew_and_follow_the_seed() -> None:
    layer = make_layer(uniform_share=0.5, method="topk")
    x = torch.randn(2, 40, E)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])


# --- Keys of another layer ---


@pytest.mark.parametrize("learning", [("distill",), ROUTES])
def test_given_indices_are_attended_to(learning: tuple[str, ...]) -> None:
    layer = make_layer(learning=learning).eval()
    x = torch.randn(2, N, E)
    expected, indices = layer(x, return_indices=True)
    seed_evaluation(layer, 1)
    assert not layer(x).equal(expected)
    out, same = layer(x, indices=indices, return_indices=True)
    assert out.equal(expected)
    assert same is indices
    layer.train()(x, indices=indices)
    assert sketch_loss(layer).item() == 0.0


def test_given_indices_may_be_fewer_and_shared() -> None:
    layer = make_layer()
    x = torch.randn(2, N, E)
    own = torch.arange(N, dtype=torch.int32).view(1, 1, N, 1).expand(2, 1, N, 1)
    torch.testing.assert_close(
        layer(x, indices=own), layer.out_proj(layer._project(x, x, x)[2].transpose(1, 2).flatten(2))
    )


def test_given_indices_that_cannot_be_used_are_refused() -> None:
    x = torch.randn(2, N, E)
    indices = make_layer()(x, return_indices=True)[1]
    with pytest.raises(ValueError, match="indices must be None with correction"):
        make_layer(correction=True)(x, indices=indices)
    dense = make_layer()
    dense.dense = True
    with pytest.raises(ValueError, match="indices must be None"):
        dense(x, indices=indices)
    with pytest.raises(ValueError, match="indices"):
        make_layer()(x, indices=indices[:, :, 1:])
    with pytest.raises(TypeError, match="indices"):
        make_layer()(x, indices=indices.long())


@pytest.mark.parametrize("shape", [(2, H, N + 1, 2), (3, H, N, 4), (1, H, N, 4)])
def test_given_indices_of_a_padded_batch_are_of_its_queries(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(2, N, E), ~padding_mask()
    said = rf"indices must be .* of the query, \[2, {N}\], got \[{shape[0]}, "
    with pytest.raises(ValueError, match=said):
        make_layer()(x, key_mask=mask, indices=torch.zeros(shape).int())


# --- The sketch of another layer ---


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("learning", [("distill",), ROUTES])
def test_a_given_sketch_takes_the_place_of_its_own(
    learning: tuple[str, ...], batch_first: bool
) -> None:
    layer, other = (make_layer(learning=learning, batch_first=batch_first) for _ in range(2))
    x, y = (torch.randn(*((2, N) if batch_first else (N, 2)), E) for _ in range(2))
    layer.eval()
    out, indices = layer(x, return_indices=True)
    assert layer(x, sketch=layer.sketch(x)).equal(out)
    other_out, other_indices = layer(x, sketch=other.sketch(y), return_indices=True)
    assert not other_indices.equal(indices)
    # Its parameters have no part in it any more.
    layer.sketch_proj_weight.data.fill_(torch.nan)
    assert layer(x, sketch=other.sketch(y)).equal(other_out)


def test_layers_with_one_sketch_draw_keys_of_their_own() -> None:
    layer = make_layer()
    model = nn.ModuleList([layer, copy.deepcopy(layer)])
    seed_evaluation(model, 1)
    x = torch.randn(2, N, E)
    sketch = layer.sketch(x)
    for training in (True, False):
        model.train(training)
        first, second = (each(x, sketch=sketch, return_indices=True)[1] for each in model)
        assert not first.equal(second)


def test_a_given_sketch_learns_from_the_layer_it_is_given_to() -> None:
    layer, other = make_layer(), make_layer()
    x = torch.randn(2, N, E, requires_grad=True)
    layer.train()(x, sketch=other.sketch(x.detach()))
    sketch_loss(layer).backward()
    assert other.sketch_proj_weight.grad.abs().max() > 0
    assert layer.sketch_proj_weight.grad is None
    assert x.grad is None


def test_a_sketch_of_keys() -> None:
    layer, x, keys = make_layer().eval(), torch.randn(2, N, E), torch.randn(2, 5, E)
    q_sketch, k_sketch = layer.sketch(x, keys)
    assert q_sketch.shape == (2, N, 4)
    assert k_sketch.shape == (2, 5, 4)
    assert layer(x, keys, sketch=(q_sketch, k_sketch)).equal(layer(x, keys))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda q, k: q, TypeError, "sketch must be \\(q_sketch, k_sketch\\), got Tensor"),
        (lambda q, k: (q, k, k), TypeError, "sketch must be"),
        (lambda q, k: (q, None), TypeError, "k_sketch of sketch must be a Tensor, got NoneType"),
        (lambda q, k: (q[:1], k), ValueError, "q_sketch of sketch must be"),
        (lambda q, k: (q, k[:, 1:]), ValueError, "k_sketch of sketch must be"),
        (lambda q, k: (q[..., :2], k[..., :2]), ValueError, "q_sketch of sketch must be"),
        (lambda q, k: (q, k.double()), TypeError, "k_sketch of sketch must be torch.float32"),
        (lambda q, k: (q.to("meta"), k), ValueError, "q_sketch of sketch must be on cpu"),
    ],
)
def test_a_given_sketch_that_does_not_fit_is_refused(change: Any, error: Any, said: str) -> None:
    layer, x = make_layer(), torch.randn(2, N, E)
    with pytest.raises(error, match=said):
        layer(x, sketch=change(*layer.sketch(x)))


# --- Sketches of their own, and rotated ones ---


@pytest.mark.parametrize(
    ("num_sketches", "shapes"),
    [
        ("layer", ((2, N, 4), (2, 5, 4))),
        ("kv", ((2, 2, N, 4), (2, 2, 5, 4))),
        ("head", ((2, H, N, 4), (2, 2, 5, 4))),
    ],
)
def test_number_of_sketches(num_sketches: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    layer = make_layer(num_kv_heads=2, num_sketches=num_sketches, method="topk").eval()
    x, y = torch.randn(2, N, E), torch.randn(2, 5, E)
    sketch = layer.sketch(x, y)
    assert tuple(part.shape for part in sketch) == shapes
    assert layer.core.num_index_heads == (H if num_sketches == "head" else 2)
    out, indices = layer(x, y, return_indices=True)
    expected, _ = ops.sketch_sample(
        *sketch, 4, num_index_heads=layer.core.num_index_heads, method="topk"
    )
    assert indices.equal(expected)
    assert layer(x, y, sketch=sketch).equal(out)
    # Every sketch starts as the one of a layer does, whatever their number.
    bound = (6 / (E + 2 * 4)) ** 0.5
    assert 0.8 * bound < layer.sketch_proj_weight.abs().max() <= bound


@pytest.mark.parametrize("num_sketches", ["kv", "head"])
def test_every_sketch_learns(num_sketches: str) -> None:
    layer = make_layer(num_kv_heads=2, num_sketches=num_sketches, learning=ROUTES)
    start_value_route(layer)
    (layer(torch.randn(2, N, E)).sum() + sketch_loss(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad).any(), name
    assert layer.sketch_proj_weight.grad.any(-1).all()


def turn_by_hand(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding by complex numbers."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequency)
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


@pytest.mark.parametrize("num_sketches", ["layer", "kv", "head"])
def test_rotary_turns_queries_keys_and_sketches(num_sketches: str) -> None:
    arguments = {"num_kv_heads": 2, "num_sketches": num_sketches, "is_causal": True}
    layer = make_layer(rotary=RotaryEmbedding(), method="topk", **arguments).eval()
    x = torch.randn(2, N, E)
    positions = torch.arange(N)
    q, k, v = layer._project(x, x, x)
    turned = [turn_by_hand(part, positions) for part in (q, k)]
    sketch = [turn_by_hand(part, positions) for part in layer._sketch(x, x)]
    expected, expected_indices = smart_bird_attention(
        *(*turned, v, *sketch),
        4,
        num_index_heads=layer.core.num_index_heads,
        is_causal=True,
        method="topk",
        return_indices=True,
    )
    out, indices = layer(x, return_indices=True)
    assert indices.equal(expected_indices)
    torch.testing.assert_close(out, layer.out_proj(expected.transpose(1, 2).flatten(2)))
    # What is given is turned, too.
    assert layer(x, sketch=layer.sketch(x)).equal(out)


def test_rotary_positions_of_cross_attention_end_with_the_keys() -> None:
    layer = make_layer(rotary=RotaryEmbedding(), is_causal=True).eval()
    x = torch.randn(2, N, E)
    whole, indices = layer(x, return_indices=True)
    last, last_indices = layer(x[:, -3:], x, return_indices=True)
    assert last_indices.equal(indices[:, :, -3:])
    torch.testing.assert_close(last, whole[:, -3:])


def test_rotary_reaches_every_route() -> None:
    layer = make_layer(rotary=RotaryEmbedding(), learning=ROUTES)
    start_value_route(layer)
    x = torch.randn(2, N, E, requires_grad=True)
    moved = gradients(layer, x, layer(x).square().sum() + sketch_loss(layer))
    assert all(moved.values()), moved


def test_widths_that_cannot_be_turned_are_refused() -> None:
    with pytest.raises(ValueError, match="sketch_dim must be even with rotary, got 3"):
        make_layer(rotary=RotaryEmbedding(), sketch_dim=3)
    with pytest.raises(ValueError, match="embed_dim / num_heads must be even with rotary, got 5"):
        SmartBirdAttention(15, 3, rotary=RotaryEmbedding())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_sketches": 2}, "num_sketches must be one of"),
        ({"num_sketches": "head", "num_index_heads": 2}, "num_index_heads must be a multiple of 4"),
    ],
)
def test_sketches_that_do_not_fit_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_layer(num_kv_heads=2, **arguments)


# --- Nested tensors ---


def nest(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor(
        [torch.randn(length, E) for length in lengths], layout=torch.jagged
    )


@pytest.mark.parametrize("dense", [False, True])
def test_nested_tensors(dense: bool) -> None:
    layer = make_layer(learning=ROUTES, is_causal=True)
    start_value_route(layer)
    layer.dense = dense
    layer.eval()
    x = nest(5, 1, 9)
    out = layer(x)
    assert out.is_nested
    assert out.shape == x.shape
    for part, alone in zip(out.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(part, layer(alone))
    layer.train()
    values = x.values().detach().requires_grad_()
    out = layer(torch.nested.nested_tensor_from_jagged(values, x.offsets()))
    (out.values().sum() + sketch_loss(layer)).backward()
    assert values.grad.any()


def test_nested_indices_and_sketches_are_taken_as_they_are_given() -> None:
    layer, x = make_layer().eval(), nest(5, 1, 9)
    out, indices = layer(x, return_indices=True)
    assert indices.shape[:2] == (3, H)
    again, same = layer(x, indices=indices, return_indices=True)
    assert again.values().equal(out.values())
    assert same.values().equal(indices.values())
    assert layer(x, sketch=layer.sketch(x)).values().equal(out.values())
    wrong = torch.nested.nested_tensor_from_jagged(
        indices.values().clamp(min=5), indices.offsets(), jagged_dim=2
    )
    with pytest.raises(ValueError, match="indices"):
        layer(x, indices=wrong)


def test_nested_indices_are_of_the_query() -> None:
    layer, x = make_layer().eval(), nest(5, 1, 9)
    indices = layer(x, return_indices=True)[1]
    for plain in (torch.randn(3, 9, E), torch.randn(9, E)):
        with pytest.raises(TypeError, match="indices must be a plain Tensor, as the query is"):
            layer(plain, indices=indices)
    with pytest.raises(TypeError, match="indices must be nested, as the query is"):
        layer(x, indices=torch.zeros(3, H, 9, 4).int())
    other = layer(nest(1, 5, 9), return_indices=True)[1]
    with pytest.raises(ValueError, match=r"indices .* \[5, 1, 9\], got \[1, 5, 9\]"):
        layer(x, indices=other)
    ragged = torch.nested.nested_tensor_from_jagged(indices.values().mT, x.offsets(), jagged_dim=3)
    with pytest.raises(ValueError, match=r"indices must be \[B, H_i, j, K\]"):
        layer(x, indices=ragged.transpose(-1, -2).transpose(1, 2))
    again = torch.nested.nested_tensor_from_jagged(
        indices.values(), x.offsets().clone(), jagged_dim=2
    )
    assert layer(x, indices=again).values().equal(layer(x).values())


def test_nested_cross_attention() -> None:
    layer, x, y = make_layer().eval(), nest(3, 1), nest(5, 9)
    out = layer(x, y)
    for part, query, key in zip(out.unbind(), x.unbind(), y.unbind(), strict=True):
        torch.testing.assert_close(part, layer(query, key))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"key_mask": torch.ones(2, 9).bool()}, ValueError, "key_mask must be None with a nested"),
        ({"key": torch.randn(2, 9, E)}, TypeError, "key must be nested if and only if query is"),
        ({"key": nest(5, 9, 1)}, ValueError, "key must have the batch size of query"),
        ({"key": nest(5, 9), "value": nest(9, 5)}, ValueError, "value must have the batch size an"),
    ],
)
def test_nested_tensors_that_do_not_fit_are_refused(
    arguments: dict[str, Tensor], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        make_layer()(nest(5, 9), **arguments)


# --- What nn.MultiheadAttention has and this has not ---


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("key_padding_mask", "give key_mask=~key_padding_mask"),
        ("need_weights", "the output comes alone"),
        ("attn_mask", "give is_causal=True"),
        ("average_attn_weights", "no attention weights are made"),
        ("kye_mask", "unexpected keyword argument 'kye_mask'$"),
    ],
)
def test_arguments_of_multihead_attention_are_explained(argument: str, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make_layer()(torch.randn(2, N, E), **{argument: None})


# --- Copies ---


def test_copies_are_equal_and_leave_a_pending_loss_behind() -> None:
    layer = make_layer(learning=ROUTES)
    x = torch.randn(2, N, E)
    layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), make_layer(learning=ROUTES)]
    copies[2].load_state_dict(layer.state_dict())
    expected = layer.eval()(x)
    for other in copies:
        assert sketch_loss(other).item() == 0.0
        assert other.eval()(x).equal(expected)
    assert sketch_loss(layer) > 0


def test_layers_can_be_made_without_memory_and_drawn_later() -> None:
    with torch.device("meta"):
        layer = make_layer(learning=ROUTES)
    layer.to_empty(device="cpu").reset_parameters()
    expected = make_layer(learning=ROUTES)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, N, E)
    assert layer.eval()(x).equal(expected.eval()(x))


def test_a_layer_made_without_memory_evaluates_as_what_it_loads() -> None:
    source = make_layer().eval()
    x = torch.randn(2, N, E)
    with torch.device("meta"):
        assigned, copied = make_layer().eval(), make_layer().eval()
    assigned.load_state_dict(source.state_dict(), assign=True)
    copied.to_empty(device="cpu")
    copied.load_state_dict(source.state_dict())
    for layer in (assigned, copied):
        assert layer(x).equal(source(x))
    assert not list(source.buffers())


# --- Bad input ---


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"sketch_dim": 0}, "sketch_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_index_heads": 8}, "num_index_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"learning": "distill"}, "learning"),
        ({"learning": ("distil",)}, "learning"),
        ({"method": "best"}, "method"),
        ({"eval_method": "best"}, "eval_method"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"distill_temperature": -1.0}, "distill_temperature"),
        ({"uniform_share": 1.0}, "uniform_share"),
        ({"uniform_share": -0.1}, "uniform_share"),
        ({"uniform_share": 0.5, "correction": True}, "uniform_share"),
        ({"uniform_share": 0.5, "distill_correction": True}, "uniform_share"),
        ({"uniform_share": 0.5, "window": 3, "is_causal": True}, "num_samples"),
        ({"window": -1}, "window"),
        ({"num_sinks": -1}, "num_sinks"),
        ({"num_samples": 4, "window": 4, "num_sinks": 1, "is_causal": True}, "num_samples"),
        ({"num_samples": 4, "window": 4}, "num_samples"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_layer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_samples": 4.0}, "num_samples must be an int, got float"),
        ({"num_samples": True}, "num_samples must be an int, got bool"),
        ({"num_kv_heads": 1.0}, "num_kv_heads must be an int, got float"),
        ({"num_index_heads": "1"}, "num_index_heads must be an int, got str"),
        ({"sketch_dim": None}, "sketch_dim must be an int, got NoneType"),
        ({"window": 1.0}, "window must be an int, got float"),
        ({"temperature": None}, "temperature must be a float, got NoneType"),
        ({"distill_temperature": None}, "distill_temperature must be a float, got NoneType"),
        ({"uniform_share": "0.5"}, "uniform_share must be a float, got str"),
        ({"dropout": True}, "dropout must be a float, got bool"),
        ({"correction": 1}, "correction must be a bool, got int"),
        ({"distill_correction": "no"}, "distill_correction must be a bool, got str"),
        ({"is_causal": "no"}, "is_causal must be a bool, got str"),
        ({"bias": None}, "bias must be a bool, got NoneType"),
        ({"batch_first": 1}, "batch_first must be a bool, got int"),
        ({"learning": None}, "learning must be a collection, got NoneType"),
        ({"rotary": 3}, "rotary must be callable, got int"),
    ],
)
def test_arguments_of_another_type_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make_layer(**arguments)


@pytest.mark.parametrize("name", ["foo", "distill", "scale"])
def test_keywords_that_it_does_not_have_are_refused(name: str) -> None:
    said = rf"SmartBirdAttention\(\) got an unexpected keyword argument '{name}'"
    for make in (SmartBirdAttention, SmartBirdEncoderLayer):
        with pytest.raises(TypeError, match=said):
            make(E, H, **{name: 2.0})


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
        SmartBirdAttention(16, 3)
    with pytest.raises(ValueError, match="embed_dim"):
        SmartBirdAttention(0, 3)
    with pytest.raises(ValueError, match="activation"):
        SmartBirdEncoderLayer(16, 4, activation="selu")
    with pytest.raises(ValueError, match="steps"):
        DenseWarmup(make_layer(), -1)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"query": torch.randn(2, N, E + 1)}, ValueError, "query"),
        ({"query": torch.randn(E)}, ValueError, "query"),
        ({"query": [[0.0] * E]}, TypeError, "query must be a Tensor, got list"),
        ({"query": torch.randn(2, N, E), "is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"query": torch.randn(2, N, E), "key": torch.randn(2, N, 3)}, ValueError, "key"),
        ({"query": torch.randn(2, N, E), "key": torch.randn(3, N, E)}, ValueError, "key"),
        (
            {
                "query": torch.randn(2, N, E),
                "key": torch.randn(2, 5, E),
                "value": torch.randn(2, 6, E),
            },
            ValueError,
            "value",
        ),
        ({"query": torch.randn(2, N, E), "key_mask": torch.ones(2, N)}, TypeError, "key_mask"),
        (
            {"query": torch.randn(2, N, E), "key_mask": torch.ones(N, 2, dtype=torch.bool)},
            ValueError,
            r"key_mask must be \[B, M\]",
        ),
        ({"query": torch.randn(2, N, E).double()}, TypeError, "query must be torch.float32"),
        ({"query": torch.ones(2, N, E).long()}, TypeError, "query must be torch.float32"),
        (
            {"query": torch.ones(2, N, E, device="meta").double()},
            TypeError,
            "query must be torch.float32",
        ),
        (
            {"query": torch.randn(2, N, E), "key": torch.randn(2, N, E).double()},
            TypeError,
            "key must be torch.float32",
        ),
        (
            {"query": torch.nested.nested_tensor([torch.randn(3, E)], layout=torch.strided)},
            TypeError,
            "query must have layout torch.jagged",
        ),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_bad_input_is_named(
    arguments: dict[str, Tensor], error: type[Exception], name: str, dense: bool
) -> None:
    layer = make_layer()
    layer.dense = dense
    with pytest.raises(error, match=name):
        layer(**arguments)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(0, N, E), (2, 0, E)])
def test_empty_input(shape: tuple[int, ...], dense: bool) -> None:
    layer = make_layer()
    layer.dense = dense
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    (out.sum() + sketch_loss(layer)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

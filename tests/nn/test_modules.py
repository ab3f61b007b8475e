"""The layers: equal to PyTorch's own when every key is drawn, and a sketch that learns."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smartbird import ops
from smartbird.functional import deal_keys, smart_bird_attention
from smartbird.modules import (
    DenseWarmup,
    SampleAnneal,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    seed_evaluation,
    sketch_loss,
)

E, H, N = 16, 4, 9
ROUTES = ("distill", "bias", "value")


def make_layer(**arguments: Any) -> SmartBirdAttention:
    return SmartBirdAttention(E, H, **{"num_samples": 4, "sketch_dim": 4, **arguments})


def padding_mask() -> Tensor:
    """PyTorch's sense, True = ignored: the last three tokens of the second of two sequences."""
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[1, -3:] = True
    return mask


def causal_mask(kind: str) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    return mask if kind == "additive" else mask == -torch.inf


def start_value_route(layer: SmartBirdAttention) -> None:
    """Leave the start where the output of the value route is multiplied by zero."""
    nn.init.normal_(layer.sketch_out_weight)


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
        torch.testing.assert_close(
            layer(*arguments, key_mask=~padding),
            expected(*arguments, key_padding_mask=padding, need_weights=False)[0],
        )


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
        *layer._sketch(x, x),
        4,
        num_index_heads=2,
        window=2,
        num_sinks=1,
        is_causal=True,
        key_mask=~padding_mask(),
    )
    assert indices.equal(expected)


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
    layer.eval_seed.add_(1)
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


# --- How the sketch learns ---


def gradients(layer: SmartBirdAttention, x: Tensor, loss: Tensor) -> dict[str, bool]:
    """Which parameters, and whether the input ("x"), get a gradient other than zero."""
    names = dict(layer.named_parameters(), x=x)
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {n: g is not None and bool((g != 0).any()) for n, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize("dense", [False, True])
def test_distill_moves_the_sketch_only(dense: bool) -> None:
    layer, x = make_layer(), torch.randn(2, N, E, requires_grad=True)
    layer.dense = dense
    out = layer(x)
    of_loss = gradients(layer, x, sketch_loss(layer))
    assert {n for n, moved in of_loss.items() if moved} == {
        "sketch_proj_weight",
        "sketch_proj_bias",
    }
    of_out = gradients(layer, x, out.square().sum())
    assert {n for n, moved in of_out.items() if not moved} == {
        "sketch_proj_weight",
        "sketch_proj_bias",
    }


@pytest.mark.parametrize("route", ["bias", "value"])
def test_other_routes_learn_from_the_output(route: str) -> None:
    layer, x = make_layer(learning=(route,)), torch.randn(2, N, E, requires_grad=True)
    if route == "value":
        start_value_route(layer)
    moved = gradients(layer, x, layer(x).square().sum())
    assert all(moved.values()), moved
    assert sketch_loss(layer).item() == 0.0


def test_value_route_starts_at_zero() -> None:
    plain, layer = make_layer().eval(), make_layer(learning=("value",)).eval()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, N, E)
    assert layer(x).equal(plain(x))


@pytest.mark.parametrize("route", ["bias", "value"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_is_what_drawing_every_key_gives(is_causal: bool, route: str) -> None:
    layer = make_layer(num_samples=N, num_kv_heads=2, learning=(route,), is_causal=is_causal).eval()
    if route == "value":
        start_value_route(layer)
    x, mask = torch.randn(2, N, E), ~padding_mask()
    sampled = layer(x, key_mask=mask)
    layer.dense = True
    torch.testing.assert_close(layer(x, key_mask=mask), sampled)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("dense_steps", [0, 30])
def test_distilled_sketch_finds_what_attention_looks_at(dense_steps: int, correction: bool) -> None:
    # Attention sharp enough to have favourites, and a sketch just wide enough to know them.
    layer = make_layer(num_samples=8, sketch_dim=8, num_index_heads=1, correction=correction)
    with torch.no_grad():
        layer.in_proj_weight.mul_(3.0)
    x = torch.randn(4, 64, E)

    def mass_drawn() -> float:
        layer.eval()
        q, k, _ = layer._project(x, x, x)
        attention = (q @ k.mT * layer.head_dim**-0.5).softmax(-1).mean(1)
        indices = layer(x, return_indices=True)[1][:, 0].long()
        layer.train()
        return attention.gather(-1, indices).sum(-1).mean().item()

    before = mass_drawn()
    sketch = [layer.sketch_proj_weight, layer.sketch_proj_bias]
    optimizer = torch.optim.Adam(sketch, lr=0.03)
    warmup = DenseWarmup(layer, dense_steps)
    losses = []
    for _ in range(60):
        layer(x)
        loss = sketch_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # 8 of 64 keys hold 1/8 of the mass by chance; a sketch at random does no better.
    assert before < 0.25
    assert mass_drawn() > 2 * before


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_distill_temperature(temperature: float, dense: bool) -> None:
    layer = make_layer(distill_temperature=temperature, correction=not dense)
    layer.dense = dense
    x = torch.randn(2, N, E)
    torch.manual_seed(1)
    layer(x)
    q, k, _ = layer._project(x, x, x)
    drawn: dict[str, Any] = {}
    if not dense:
        torch.manual_seed(1)
        indices, log_inclusion = ops.sketch_sample(*layer._sketch(x, x), 4, num_index_heads=H)
        drawn = {"indices": indices, "log_inclusion": log_inclusion}
    expected = ops.distill_loss(q / temperature, k, *layer._sketch(x, x), **drawn)
    torch.testing.assert_close(sketch_loss(layer), expected)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("distill_correction", [None, False, True])
def test_distill_correction(distill_correction: bool | None, correction: bool) -> None:
    layer = make_layer(
        correction=correction, distill_correction=distill_correction, distill_temperature=1.0
    )
    x = torch.randn(2, N, E)
    torch.manual_seed(1)
    out = layer(x)
    q, k, v = layer._project(x, x, x)
    sketch = layer._sketch(x, x)
    torch.manual_seed(1)
    indices, log_inclusion = ops.sketch_sample(*sketch, 4, num_index_heads=H)
    corrected = correction if distill_correction is None else distill_correction
    expected = ops.distill_loss(
        q, k, *sketch, indices=indices, log_inclusion=log_inclusion if corrected else None
    )
    torch.testing.assert_close(sketch_loss(layer), expected)
    bias = -log_inclusion if correction else None
    attended = ops.gather_attention(q, k, v, indices, bias=bias)
    torch.testing.assert_close(out, layer.out_proj(attended.transpose(1, 2).flatten(2)))


def test_sketch_loss_sums_layers_and_clears() -> None:
    model = nn.Sequential(make_layer(), make_layer())
    x = torch.randn(2, N, E)
    model(x)
    parts = [layer._sketch_loss for layer in model]
    total = sketch_loss(model)
    assert total.shape == ()
    torch.testing.assert_close(total, parts[0] + parts[1])
    assert sketch_loss(model).item() == 0.0
    assert sketch_loss(nn.Linear(2, 2)).item() == 0.0
    assert sketch_loss(nn.ReLU()).item() == 0.0


def test_sketch_loss_without_the_private_name_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    layer = make_layer()
    layer(torch.randn(2, N, E))
    assert sketch_loss(layer).item() > 0.0


def test_evaluation_leaves_no_sketch_loss() -> None:
    layer = make_layer().eval()
    layer(torch.randn(2, N, E))
    assert sketch_loss(layer).item() == 0.0


def test_sketch_loss_warns_where_it_cannot_teach() -> None:
    layer = make_layer()
    x = torch.randn(2, N, E)
    with torch.no_grad():
        layer(x)
    with pytest.warns(UserWarning, match="without gradients"):
        sketch_loss(layer)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        assert sketch_loss(layer) > 0


def test_no_sketch_loss_without_the_distill_route() -> None:
    layer = make_layer(learning=())
    layer(torch.randn(2, N, E))
    assert sketch_loss(layer).item() == 0.0


# --- Dense warm-up ---


def test_dense_warmup() -> None:
    expected = nn.MultiheadAttention(E, H, batch_first=True)
    layer = make_layer()
    layer.load_state_dict(expected.state_dict(), strict=False)
    x = torch.randn(2, N, E)
    dense = expected(x, x, x, need_weights=False)[0]
    warmup = DenseWarmup(nn.Sequential(layer), steps=2)
    for _ in range(2):
        torch.testing.assert_close(layer(x), dense)
        torch.testing.assert_close(layer.eval()(x), dense)
        layer.train()
        warmup.step()
    assert not torch.allclose(layer(x), dense)


def test_dense_warmup_goes_on_where_it_was_saved() -> None:
    layer = make_layer()
    warmup = DenseWarmup(layer, steps=3)
    warmup.step()
    other_layer = make_layer()
    other = DenseWarmup(other_layer, steps=0)
    assert not other_layer.dense
    other.load_state_dict(pickle.loads(pickle.dumps(warmup.state_dict())))
    dense = []
    for _ in range(2):
        dense.append(other_layer.dense)
        other.step()
    assert [*dense, other_layer.dense] == [True, True, False]


def test_dense_layer_has_no_indices_to_return() -> None:
    layer = make_layer()
    DenseWarmup(layer, steps=1)
    with pytest.raises(ValueError, match="return_indices"):
        layer(torch.randn(2, N, E), return_indices=True)


# --- Annealed samples ---


def test_sample_anneal() -> None:
    model = nn.Sequential(make_layer(num_samples=4), make_layer(num_samples=1))
    anneal = SampleAnneal(model, start=64, steps=4)
    counts = []
    for _ in range(6):
        counts.append([layer.num_samples for layer in model])
        anneal.step()
    assert counts == [[64, 64], [32, 23], [16, 8], [8, 3], [4, 1], [4, 1]]


def test_sample_anneal_reaches_the_draw() -> None:
    layer = make_layer(uniform_share=0.5)
    x = torch.randn(2, 20, E)
    SampleAnneal(layer, start=10, steps=1)
    assert layer(x, return_indices=True)[1].shape[-1] == 10
    assert layer.eval()(x, return_indices=True)[1].shape[-1] == 10


def test_sample_anneal_goes_on_where_it_was_saved() -> None:
    layer = make_layer()
    anneal = SampleAnneal(layer, start=16, steps=2)
    anneal.step()
    other_layer = make_layer()
    other = SampleAnneal(other_layer, start=4, steps=0)
    assert other_layer.num_samples == 4
    other.load_state_dict(pickle.loads(pickle.dumps(anneal.state_dict())))
    assert other_layer.num_samples == layer.num_samples == 8
    other.step()
    assert other_layer.num_samples == 4


def test_sample_anneal_refuses_to_rise() -> None:
    with pytest.raises(ValueError, match="start must be at least num_samples=4, got 3"):
        SampleAnneal(make_layer(), start=3, steps=1)
    with pytest.raises(ValueError, match="steps"):
        SampleAnneal(make_layer(), start=8, steps=-1)
    with pytest.raises(TypeError, match=r"start must be an int, got float"):
        SampleAnneal(make_layer(), start=8.5, steps=1)
    with pytest.raises(TypeError, match=r"steps must be an int, got float"):
        SampleAnneal(make_layer(), start=8, steps=1.5)


# --- nn.TransformerEncoderLayer ---


def make_pair(**arguments: Any) -> tuple[nn.TransformerEncoderLayer, SmartBirdEncoderLayer]:
    expected = nn.TransformerEncoderLayer(E, H, 32, **arguments).eval()
    layer = SmartBirdEncoderLayer(E, H, 32, num_samples=N, sketch_dim=4, **arguments).eval()
    missing, unexpected = layer.load_state_dict(expected.state_dict(), strict=False)
    assert all(name.startswith("self_attn.sketch_") for name in missing)
    assert unexpected == []
    return expected, layer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder_layer_equals_pytorchs(
    bias: bool, activation: Any, batch_first: bool, norm_first: bool
) -> None:
    expected, layer = make_pair(
        activation=activation,
        batch_first=batch_first,
        norm_first=norm_first,
        bias=bias,
        layer_norm_eps=1e-3,
    )
    x = torch.randn(2, N, E) if batch_first else torch.randn(N, 2, E)
    torch.testing.assert_close(layer(x), expected(x))
    torch.testing.assert_close(layer(x[:, 0]), expected(x[:, 0]))


@pytest.mark.parametrize("causal", [None, "additive", "boolean"])
@pytest.mark.parametrize("padding", [None, "additive", "boolean"])
@pytest.mark.parametrize("hint", [False, True])
def test_encoder_layer_masks(causal: str | None, padding: str | None, hint: bool) -> None:
    expected, layer = make_pair(batch_first=True)
    masks: dict[str, Any] = {}
    if causal is not None:
        masks = {"src_mask": causal_mask(causal), "is_causal": hint}
    if padding == "boolean":
        masks["src_key_padding_mask"] = padding_mask()
    elif padding == "additive":
        masks["src_key_padding_mask"] = torch.zeros(2, N).masked_fill(padding_mask(), -torch.inf)
    x = torch.randn(2, N, E)
    # PyTorch's fast path leaves the padded positions at zero; no one reads them.
    kept = ~padding_mask()
    with warnings.catch_warnings():
        # PyTorch deprecates a float mask beside a boolean one; callers still give it both.
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)
        torch.testing.assert_close(layer(x, **masks)[kept], expected(x, **masks)[kept])


def test_encoder_layer_is_causal_without_a_mask() -> None:
    expected, layer = make_pair(batch_first=True)
    x = torch.randn(2, N, E)
    causal = expected(x, src_mask=causal_mask("additive"), is_causal=True)
    torch.testing.assert_close(layer(x, is_causal=True), causal)
    layer.self_attn.is_causal = True
    torch.testing.assert_close(layer(x), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_inside_transformer_encoder(training: bool, padded: bool, causal: bool) -> None:
    layers = make_pair(batch_first=True, dropout=0.0)
    expected, model = (nn.TransformerEncoder(x, 2, enable_nested_tensor=False) for x in layers)
    expected.train(training)
    model.train(training)
    masks = {
        "mask": causal_mask("additive") if causal else None,
        "src_key_padding_mask": padding_mask() if padded else None,
    }
    x = torch.randn(2, N, E)
    kept = ~padding_mask()
    with warnings.catch_warnings():
        # PyTorch deprecates a float mask beside a boolean one; callers still give it both.
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)
        torch.testing.assert_close(model(x, **masks)[kept], expected(x, **masks)[kept])


def test_encoder_layer_dropout_is_active_in_training_only() -> None:
    layer = SmartBirdEncoderLayer(E, H, 32, dropout=0.5, num_samples=N, batch_first=True)
    x = torch.randn(2, N, E)
    assert not layer(x).equal(layer(x))
    layer.eval()
    assert layer(x).equal(layer(x))


@pytest.mark.parametrize(
    "masks",
    [
        {"src_mask": torch.zeros(N, N)},
        {"src_mask": torch.zeros(N, N, dtype=torch.bool)},
        {"src_mask": causal_mask("boolean").T},
        {"src_mask": 0.5 * torch.ones(N, N) + causal_mask("additive")},
        {"src_mask": causal_mask("boolean").expand(2 * H, N, N)},
        {"src_mask": nn.Transformer.generate_square_subsequent_mask(N - 1)},
        {"src_key_padding_mask": torch.full((2, N), 0.5)},
        {"src_key_padding_mask": torch.zeros(2, N - 1, dtype=torch.bool)},
    ],
)
def test_masks_that_cannot_be_honoured_are_refused(masks: dict[str, Tensor]) -> None:
    layer = SmartBirdEncoderLayer(E, H, batch_first=True)
    # A padding mask reaches the attention as its key_mask.
    name = "src_mask" if "src_mask" in masks else "src_key_padding_mask|key_mask"
    with pytest.raises(ValueError, match=name):
        layer(torch.randn(2, N, E), **masks)


def test_transformer_encoder_leaves_nested_tensors_out_by_itself() -> None:
    _, layer = make_pair(batch_first=True)
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, N, E)
    assert model(x, src_key_padding_mask=padding_mask()).shape == x.shape


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


def test_encoder_layer_copies() -> None:
    layer = SmartBirdEncoderLayer(E, H, num_samples=4, activation="gelu")
    x = torch.randn(N, 2, E)
    layer(x)
    expected = layer.eval()(x)
    assert copy.deepcopy(layer)(x).equal(expected)
    assert pickle.loads(pickle.dumps(layer))(x).equal(expected)


def test_layers_can_be_made_without_memory_and_drawn_later() -> None:
    with torch.device("meta"):
        layer = make_layer(learning=ROUTES)
    layer.to_empty(device="cpu").reset_parameters()
    expected = make_layer(learning=ROUTES)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, N, E)
    assert layer.eval()(x).equal(expected.eval()(x))


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
    ],
)
def test_arguments_of_another_type_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make_layer(**arguments)


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
            "key_mask",
        ),
        (
            {"query": torch.nested.nested_tensor([torch.randn(3, E)], layout=torch.jagged)},
            TypeError,
            "query",
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


def test_a_call_with_given_indices_leaves_no_sketch_loss() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3).train()
    tokens = torch.randn(1, 7, 8)
    _, indices = layer(tokens, return_indices=True)
    assert sketch_loss(layer) > 0
    layer(tokens, indices=indices)
    assert sketch_loss(layer) == 0

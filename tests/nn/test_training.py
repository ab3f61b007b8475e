"""A sketch that learns: its loss, the schedules of a training, and how far it is."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import ROUTES, E, H, N, gradients, make_layer, padding_mask, start_value_route
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartbird import ops
from smartbird.nn import (
    DenseWarmup,
    SampleAnneal,
    SampledAttention,
    SmartBirdAttention,
    sketch_loss,
    sketch_stats,
)

# --- How the sketch learns ---


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
    parts = [layer.core._loss for layer in model]
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


def test_a_call_with_given_indices_leaves_no_sketch_loss() -> None:
    layer = SmartBirdAttention(8, 2, num_samples=3).train()
    tokens = torch.randn(1, 7, 8)
    _, indices = layer(tokens, return_indices=True)
    assert sketch_loss(layer) > 0
    layer(tokens, indices=indices)
    assert sketch_loss(layer) == 0


def test_a_loss_that_nobody_collects_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartbird.nn.sampled._told", set())
    layer, other = make_layer(), make_layer()
    x = torch.randn(2, N, E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            layer(x)
            sketch_loss(layer)
        with torch.no_grad():
            layer(x)
            layer(x)
        layer(x)
    with pytest.warns(UserWarning, match="add smartbird.sketch_loss"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        for _ in range(2):
            other(x)
            make_layer(loss_weight=1.0)(x)
            make_layer(learning=())(x)


# --- A loss that rides on the output ---


def by_riding(model: nn.Module, out: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradients of one step whose loss is of the output alone."""
    model.zero_grad()
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    out(x).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"x": x.grad, **grads}


def make_pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model whose losses ride with weight 0.5, and the same one without."""
    rides, plain = (
        nn.Sequential(make_layer(loss_weight=weight, **options), nn.Linear(E, E))
        for weight in (0.5, None)
    )
    plain.load_state_dict(rides.state_dict())
    return rides, plain


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("learning", [("distill",), ROUTES])
def test_a_riding_loss_has_the_gradients_of_a_collected_one(
    learning: tuple[str, ...], dense: bool
) -> None:
    rides, plain = make_pair(learning=learning)
    for model in (rides, plain):
        model[0].dense = dense
    x, y = torch.randn(2, 2, N, E).unbind()
    expected_out = []
    for model in (rides, plain):
        torch.manual_seed(0)
        expected_out.append(model(x))
    assert expected_out[0].equal(expected_out[1])
    sketch_loss(plain)
    grads = by_riding(rides, rides, y)
    plain.zero_grad()
    torch.manual_seed(0)
    y.requires_grad_()
    (plain(y).square().mean() + 0.5 * sketch_loss(plain)).backward()
    assert grads["x"].equal(y.grad)
    for name, parameter in plain.named_parameters():
        assert grads[name].equal(parameter.grad), name


def test_a_riding_loss_is_reported_without_a_gradient() -> None:
    rides, plain = make_pair()
    x = torch.randn(2, N, E)
    losses = []
    for model in (rides, plain):
        torch.manual_seed(0)
        model(x)
        losses.append(sketch_loss(model))
    assert losses[0].equal(losses[1])
    assert not losses[0].requires_grad
    assert losses[1].requires_grad
    assert sketch_loss(rides).item() == 0.0


def test_the_weight_of_a_riding_loss_may_change() -> None:
    rides, _ = make_pair()
    x = torch.randn(2, N, E)
    one = by_riding(rides, rides, x)["0.sketch_proj_weight"]
    rides[0].core.loss_weight *= 8
    assert by_riding(rides, rides, x)["0.sketch_proj_weight"].equal(8 * one)


@pytest.mark.parametrize("loss_weight", [None, 0.5])
def test_an_output_with_a_riding_loss_can_be_changed_in_place(loss_weight: float | None) -> None:
    core = SampledAttention(H, num_samples=4, loss_weight=loss_weight)
    x = [torch.randn(2, heads, N, 4, requires_grad=True) for heads in (H, H, H, 1, 1)]
    grads = []
    for double in (lambda out: out.mul_(2), lambda out: out * 2):
        torch.manual_seed(0)
        (double(core(*x)).square().sum() + sketch_loss(core)).backward()
        grads.append([each.grad for each in x])
        for each in x:
            each.grad = None
    for in_place, expected in zip(*grads, strict=True):
        assert in_place.equal(expected)


def test_a_riding_loss_needs_no_trunk_that_learns() -> None:
    rides, _ = make_pair()
    x = torch.randn(2, N, E)
    expected = by_riding(rides, rides, x)
    for name, parameter in rides.named_parameters():
        parameter.requires_grad_("sketch" in name)
    rides.zero_grad()
    torch.manual_seed(0)
    rides(x).square().mean().backward()
    assert rides[0].sketch_proj_weight.grad.equal(expected["0.sketch_proj_weight"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_riding_loss_under_checkpointing(use_reentrant: bool) -> None:
    rides, _ = make_pair()
    x = torch.randn(2, N, E)
    expected = by_riding(rides, rides, x)
    actual = by_riding(rides, lambda x: checkpoint(rides, x, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- Dense warm-up once more, of a pack ---


def test_dense_warmup_of_a_padded_batch() -> None:
    layer, mask = make_layer(is_causal=True), ~padding_mask()
    x = torch.randn(2, N, E)
    DenseWarmup(layer, steps=1)
    out = layer(x, key_mask=mask)
    loss = sketch_loss(layer)
    total = 0.0
    for b in range(2):
        alone = layer(x[b][mask[b]])
        torch.testing.assert_close(out[b][mask[b]], alone)
        total += sketch_loss(layer) * mask[b].sum()
    torch.testing.assert_close(loss, total / mask.sum())


# --- Weights trained otherwise ---


def test_weights_of_another_number_of_keys_or_method_are_told() -> None:
    trained = nn.Sequential(make_layer(num_samples=4), make_layer(method="systematic"))
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.load_state_dict(state)
    other = nn.Sequential(make_layer(num_samples=8), make_layer())
    with pytest.warns(UserWarning, match="come from") as said:
        other.load_state_dict(state)
    assert [str(warning.message) for warning in said] == [
        "the weights of 0.core come from num_samples=4 and are loaded into a layer with "
        "num_samples=8",
        "the weights of 1.core come from method='systematic' and are loaded into a layer with "
        "method='gumbel'",
    ]


def test_annealing_does_not_change_what_weights_were_trained_with() -> None:
    layer, other = make_layer(), make_layer()
    SampleAnneal(layer, start=16, steps=2)
    assert layer.num_samples == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(layer.state_dict())


@pytest.mark.filterwarnings("error")
def test_weights_without_metadata_are_loaded() -> None:
    layer = make_layer()
    layer.load_state_dict(dict(make_layer(num_samples=8).state_dict()))


# --- How far a sketch is ---


@pytest.mark.parametrize("num_sketches", ["layer", "kv", "head"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sketch_stats(is_causal: bool, num_sketches: str) -> None:
    layer = make_layer(
        num_kv_heads=2,
        num_sketches=num_sketches,
        is_causal=is_causal,
        num_sinks=1,
        window=1,
        method="multinomial",
        distill_temperature=0.7,
    )
    x, mask = torch.randn(2, N, E), ~padding_mask()
    with sketch_stats(layer) as stats:
        _, indices = layer(x, key_mask=mask, return_indices=True)
    sketch_loss(layer)
    (judged,) = stats.values()
    assert judged.calls == 1
    assert judged.excess == judged.loss - judged.floor > 0
    losses, floors, masses = [], [], []
    for b in range(2):
        tokens = x[b][mask[b]]
        q, k, _ = layer._project(tokens[None], tokens[None], tokens[None])
        q_sketch, k_sketch = layer._sketch(tokens[None], tokens[None])
        length = len(tokens)
        seen = torch.ones(length, length, dtype=torch.bool)
        seen = seen.tril() if is_causal else seen
        forced = torch.eye(length, dtype=torch.bool)
        forced[:, 0] = True
        logits = (q @ k.repeat_interleave(2, 1).mT)[0] * layer.head_dim**-0.5
        held = torch.zeros(layer.core.num_index_heads, length, length + 1)
        held = held.scatter(-1, indices[b][:, mask[b]].long() % (length + 1), 1.0)[..., :-1]
        held = held.repeat_interleave(H // len(held), 0)
        masses.append((logits.masked_fill(~seen, -torch.inf).softmax(-1) * held).sum(-1).mean(0))
        for row in range(length):
            free = seen[row] & ~forced[row]
            if not free.any():
                continue
            target = (logits[:, row, free] / 0.7).softmax(-1)
            target = target.unflatten(0, (q_sketch.shape[1], -1)).mean(1)
            keys = k_sketch[0].repeat_interleave(q_sketch.shape[1] // k_sketch.shape[1], 0)
            scores = (q_sketch[0, :, row, None] * keys[:, free]).sum(-1) * 4**-0.5
            losses.append(-(target * scores.log_softmax(-1)).sum(-1).mean())
            floors.append(-(target * target.log()).sum(-1).mean())
    torch.testing.assert_close(judged.loss, torch.stack(losses).mean().item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(judged.floor, torch.stack(floors).mean().item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(judged.mass, torch.cat(masses).mean().item(), rtol=1e-4, atol=0)


def test_sketch_stats_of_the_dense_loss() -> None:
    layer = make_layer(num_sinks=1, distill_temperature=0.7)
    x = torch.randn(2, N, E)
    DenseWarmup(layer, 1)
    with sketch_stats(nn.Sequential(layer)) as stats:
        layer(x)
        loss = sketch_loss(layer)
    assert stats["0.core"].loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats["0.core"].mass == 1.0
    assert 0 < stats["0.core"].floor < stats["0.core"].loss


def test_sketch_stats_are_means_over_calls_and_cost_nothing_afterwards() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, N, E)
    alone = []
    for each in x:
        with sketch_stats(layer, rows=4) as stats:
            layer(each)
        alone.append(stats["core"])
    with sketch_stats(layer, rows=4) as stats:
        for each in x:
            layer(each)
    assert stats["core"].loss == pytest.approx(sum(s.loss for s in alone) / 3)
    assert stats["core"].mass == pytest.approx(sum(s.mass for s in alone) / 3)
    assert layer.core.observer is None
    with pytest.raises(ValueError, match="rows"), sketch_stats(layer, rows=0):
        pass


def test_sketch_stats_look_into_compiled_models() -> None:
    layer = make_layer().eval()
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, N, E)
    compiled(x)
    with sketch_stats(layer) as expected:
        layer(x)
    with sketch_stats(compiled) as stats:
        compiled(x)
    assert list(stats.values()) == list(expected.values())

"""The layers under torch.compile, torch.export, torch.vmap, autocast, checkpoints, the profiler."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import at_night
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from smartbird import ops
from smartbird.functional import smart_bird_attention
from smartbird.nn import (
    DenseWarmup,
    RotaryEmbedding,
    SampleAnneal,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    sketch_loss,
)

E, H = 16, 4
ROUTES = ("distill", "bias", "value")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(**arguments: Any) -> SmartBirdAttention:
    return SmartBirdAttention(E, H, **{"num_samples": 4, "sketch_dim": 4, **arguments})


def make_model(num_layers: int = 2, **arguments: Any) -> nn.Sequential:
    layers = [
        SmartBirdEncoderLayer(
            E, H, 32, dropout=0.2, batch_first=True, num_samples=4, sketch_dim=4, **arguments
        )
        for _ in range(num_layers)
    ]
    return nn.Sequential(*layers)


def step(model: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, losses and gradients of one training step with a fixed seed."""
    torch.manual_seed(0)
    owner.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x)
    distill = sketch_loss(owner)
    (out.square().sum() + distill).backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "distill": distill.detach(), "x": x.grad, **grads}


# --- torch.compile ---


# Compilers take long: in the quick suite one value stands for both.


@pytest.mark.parametrize("is_causal", [at_night(False, "slow"), True])
def test_compiled_step_equals_eager_for_any_length_without_recompiling(is_causal: bool) -> None:
    model = make_model(1, is_causal=is_causal)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for length in (17, 9, 64, 33):
        x = torch.randn(2, length, E)
        # aot_eager runs the operators that eager runs, in the same order.
        torch.testing.assert_close(step(compiled, model, x), step(model, model, x))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize("training", [False, True])
def test_lengths_become_dynamic_by_themselves(training: bool) -> None:
    model = make_model().train(training)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for length in (17, 9, 64, 33, 12):
            compiled(torch.randn(2, length, E))
            sketch_loss(model)
    # Once for the first length, once for all others.
    assert counter.frame_count == 2


@pytest.mark.parametrize("dense", [False, at_night(True, "slow")])
def test_compiled_layer_with_every_option(dense: bool) -> None:
    layer = make_layer(
        num_kv_heads=2,
        num_index_heads=2,
        learning=ROUTES,
        correction=True,
        dropout=0.0 if dense else 0.2,
        window=1,
        num_sinks=1,
    )
    DenseWarmup(layer, int(dense))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (17, 33):
        mask = torch.rand(2, length) < 0.7
        x = torch.randn(2, length, E)
        torch.testing.assert_close(
            step(lambda x, mask=mask: compiled(x, key_mask=mask), layer, x),
            step(lambda x, mask=mask: layer(x, key_mask=mask), layer, x),
        )


@pytest.mark.parametrize("training", [at_night(False, "slow"), True])
def test_compiled_layer_that_explores_and_deals(training: bool) -> None:
    layer = make_layer(
        num_index_heads=2, eval_method="dealt", temperature=2.0, uniform_share=0.5, num_sinks=1
    ).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (17, 33, 5):
            mask = torch.rand(2, length) < 0.7
            x = torch.randn(2, length, E)
            torch.testing.assert_close(
                step(lambda x, mask=mask: compiled(x, key_mask=mask), layer, x),
                step(lambda x, mask=mask: layer(x, key_mask=mask), layer, x),
            )


def test_compiled_cross_attention_and_indices() -> None:
    layer, other = make_layer(num_samples=3).eval(), make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_queries, num_keys in ((5, 9), (7, 30), (30, 7)):
        query, key = torch.randn(2, num_queries, E), torch.randn(2, num_keys, E)
        sketch = other.sketch(query, key)
        for given in ({}, {"sketch": sketch}):
            out, indices = compiled(query, key, return_indices=True, **given)
            expected, expected_indices = layer(query, key, return_indices=True, **given)
            torch.testing.assert_close(out, expected)
            assert indices.equal(expected_indices)


def test_compiled_functional_form_draws_anew_each_call() -> None:
    compiled = torch.compile(smart_bird_attention, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, H, 20, 4).unbind()
    q_sketch, k_sketch = torch.randn(2, 2, 20, 4).unbind()
    out = compiled(q, k, v, q_sketch, k_sketch, 5, correction=True, dropout_p=0.1)
    again = compiled(q, k, v, q_sketch, k_sketch, 5, correction=True, dropout_p=0.1)
    assert not out.equal(again)
    seed = torch.tensor([1, 2])
    torch.testing.assert_close(
        compiled(q, k, v, q_sketch, k_sketch, 5, seed=seed),
        smart_bird_attention(q, k, v, q_sketch, k_sketch, 5, seed=seed),
    )


def test_compiled_encoder_layer_asks_for_is_causal_beside_a_mask() -> None:
    layer = make_model(1).eval()[0]
    x, mask = torch.randn(2, 9, E), nn.Transformer.generate_square_subsequent_mask(9)
    expected = layer(x, src_mask=mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_mask=mask, is_causal=True), expected)
    # Dynamo reports what a traced function raises as an error of its own.
    with pytest.raises(torch._dynamo.exc.Unsupported, match="src_mask must come with is_causal"):
        compiled(x, src_mask=mask)
    with pytest.raises(ValueError, match="src_mask must come with is_causal=True"):
        torch.export.export(layer, (x, mask), strict=False)


def test_graph_breaks_leave_the_mask_to_be_checked_in_eager() -> None:
    layer = make_model(1).eval()[0]
    x, mask = torch.randn(2, 9, E), nn.Transformer.generate_square_subsequent_mask(9)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_mask=mask), layer(x, src_mask=mask))
    with pytest.raises(ValueError, match="src_mask must be None or the causal mask"):
        compiled(x, src_mask=mask.T)


def test_default_backend() -> None:
    layer = make_layer(num_samples=32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    # Every key is drawn: inductor's random numbers, hence its seeds, are other than eager's.
    for length in (17, 32):
        x = torch.randn(2, length, E)
        torch.testing.assert_close(step(compiled, layer, x), step(layer, layer, x))


def test_a_riding_loss_leaves_no_side_effect_in_a_graph() -> None:
    model = make_model(1, loss_weight=0.5)
    x = torch.randn(2, 20, E)
    expected = step(model, model, x)
    compiled = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(step(compiled, model, x), {**expected, "distill": torch.zeros(())})


@pytest.mark.parametrize("learning", [(), ("distill",)])
def test_annealing_compiles_three_times(learning: tuple[str, ...]) -> None:
    model = make_model(1, learning=learning)
    anneal = SampleAnneal(model, start=32, steps=20)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 40, E)
    for _ in range(23):
        torch.manual_seed(0)
        out = compiled(x)
        sketch_loss(model)
        torch.manual_seed(0)
        torch.testing.assert_close(out, model(x))
        sketch_loss(model)
        anneal.step()
    # The first number of keys, any number, and the last.
    assert counter.frame_count == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_padding_masks_are_refused_in_graphs(dtype: torch.dtype) -> None:
    layer = make_model(1).eval()[0]
    x, mask = torch.randn(2, 9, E), torch.ones(2, 9, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="src_key_padding_mask must be"):
        compiled(x, src_key_padding_mask=mask)
    with pytest.raises(ValueError, match="src_key_padding_mask must be"):
        torch.export.export(layer, (x,), {"src_key_padding_mask": mask}, strict=False)


def test_graphs_check_what_a_padding_mask_of_floats_holds() -> None:
    layer = make_model(1).eval()[0]
    x = torch.randn(2, 9, E)
    mask = torch.zeros(2, 9).masked_fill(torch.rand(2, 9) < 0.3, -torch.inf)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,), {"src_key_padding_mask": mask}).module()
    for graph in (compiled, exported):
        out = graph(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out, layer(x, src_key_padding_mask=mask))
        with pytest.raises(RuntimeError, match="src_key_padding_mask must be boolean, or hold 0"):
            graph(x, src_key_padding_mask=torch.ones(2, 9))


def test_compiled_nested_tensors() -> None:
    layer = make_layer(rotary=RotaryEmbedding()).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 9), (1, 20)):
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)
        torch.testing.assert_close(compiled(x).values(), layer(x).values())


# --- torch.export ---


@pytest.mark.parametrize("is_causal", [False, True])
def test_export_with_dynamic_length(is_causal: bool) -> None:
    model = make_model(is_causal=is_causal).eval()
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        model, (torch.randn(2, 17, E),), dynamic_shapes=({1: length},), strict=False
    )
    for n in (17, 9, 64):
        x = torch.randn(2, n, E)
        torch.testing.assert_close(exported.module()(x), model(x))


# --- torch.vmap ---


# The ops have no batching rule of their own: vmap says that its loop is slower, which is known.
@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("training", [False, True])
def test_an_ensemble_by_vmap_has_the_gradients_of_a_loop(training: bool) -> None:
    """In training the loss rides: a loss kept within vmap could not be collected outside."""
    # Every key is drawn: within vmap random numbers are others.
    layers = [make_layer(num_samples=9, loss_weight=0.5).train(training) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 9, E)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    out = torch.vmap(call, randomness="different")(parameters, buffers)
    out.square().sum().backward()
    expected = torch.stack([layer(x) for layer in layers])
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for name, stacked in parameters.items():
        if training or not name.startswith("sketch"):
            of_loop = [layer.get_parameter(name).grad for layer in layers]
            torch.testing.assert_close(stacked.grad, torch.stack(of_loop))


# The ops have no batching rule of their own: vmap says that its loop is slower, which is known.
@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_a_loss_kept_within_vmap_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartbird.nn.sampled._told", set())
    layer, x = make_layer(), torch.randn(3, 2, 9, E)
    with pytest.warns(UserWarning, match=r"cannot be collected outside .* loss_weight"):
        torch.vmap(layer, randomness="different")(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*loss_weight")
        torch.vmap(make_layer(), randomness="different")(x)
        monkeypatch.setattr("smartbird.nn.sampled._told", set())
        torch.vmap(make_layer(loss_weight=1.0), randomness="different")(x)
        torch.vmap(make_layer().eval(), randomness="different")(x)


# --- autocast ---


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("learning", [("distill",), ROUTES])
def test_autocast(learning: tuple[str, ...], dense: bool) -> None:
    # Every key is drawn: what is compared is arithmetic, not draws.
    layer = make_layer(num_samples=20, learning=learning, correction=True)
    layer.dense = dense
    x = torch.randn(2, 20, E)
    expected = step(layer, layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        assert layer(x, return_indices=not dense)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(layer, layer, x)
    assert actual["distill"].dtype == torch.float32
    for name, tensor in expected.items():
        # bfloat16 keeps 8 bits; a handful of roundings of numbers as large as the largest.
        atol = 8 * 2.0**-8 * tensor.abs().max().item()
        torch.testing.assert_close(actual[name].float(), tensor, atol=atol, rtol=0)


# --- Activation checkpointing ---


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def test_checkpointing_replays_the_draws() -> None:
    model = make_model()
    x = torch.randn(2, 30, E)
    expected = step(model, model, x)
    actual = step(Checkpointed(model, use_reentrant=False), model, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert sketch_loss(model).item() == 0.0


# That warning is right here: the layers do run without gradients.
@pytest.mark.filterwarnings("ignore:.*ran without gradients")
def test_reentrant_checkpointing_replays_the_draws_without_a_sketch_loss() -> None:
    model = make_model()
    x = torch.randn(2, 30, E)
    expected = step(model, model, x)
    actual = step(Checkpointed(model, use_reentrant=True), model, x)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    assert {name.rsplit(".")[-1] for name in expected.keys() - actual.keys()} == {
        "sketch_proj_weight",
        "sketch_proj_bias",
    }


def test_reentrant_checkpointing_warns_that_the_sketch_cannot_learn() -> None:
    model = make_model()
    Checkpointed(model, use_reentrant=True)(torch.randn(2, 30, E, requires_grad=True))
    with pytest.warns(UserWarning, match="use_reentrant"):
        sketch_loss(model)


# --- Profiler, copies, function transforms ---


def test_profiler_names_the_steps() -> None:
    layer = make_layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(2, 9, E)).sum().backward()
    names = {event.name for event in profile.events()}
    assert {
        "smartbird::sketch_sample",
        "smartbird::gather_attention",
        "smartbird::gather_attention_backward",
        "smartbird::sampled_distill",
    } <= names


def test_compiled_layer_can_be_copied_and_its_weights_loaded() -> None:
    layer = make_layer().eval()
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 9, E)
    expected = compiled(x)
    assert copy.deepcopy(layer)(x).equal(expected)
    other = make_layer().eval()
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(expected)


def test_changing_scale() -> None:
    """A float that changes becomes symbolic; checks must not stop the graph at it."""
    x = torch.randn(1, 1, 16, 8)
    indices = torch.randint(16, (1, 1, 16, 4), dtype=torch.int32)

    def attend(x: Tensor, scale: float) -> Tensor:
        return ops.gather_attention(x, x, x, indices, scale=scale)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(x, scale), attend(x, scale))


def test_distillation_is_not_narrowed_by_autocast() -> None:
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    q_sketch, k_sketch = torch.randn(1, 16, 4), torch.randn(1, 16, 4)
    indices, _ = ops.sketch_sample(q_sketch, k_sketch, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, indices=indices)
    halves = (x.bfloat16() for x in (q, k, q_sketch, k_sketch))
    assert torch.equal(loss, ops.distill_loss(*halves, indices=indices))

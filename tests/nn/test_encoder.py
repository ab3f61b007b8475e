"""SmartBirdEncoderLayer: equal to PyTorch's own when every key is drawn."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from layers import (
    E,
    H,
    N,
    causal_mask,
    padding_mask,
)
from torch import Tensor, nn

from smartbird.nn import (
    SmartBirdEncoderLayer,
)

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
    with pytest.raises(ValueError, match=next(iter(masks))):
        layer(torch.randn(2, N, E), **masks)


def test_transformer_encoder_leaves_nested_tensors_out_by_itself() -> None:
    _, layer = make_pair(batch_first=True)
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, N, E)
    assert model(x, src_key_padding_mask=padding_mask()).shape == x.shape


def test_encoder_layer_copies() -> None:
    layer = SmartBirdEncoderLayer(E, H, num_samples=4, activation="gelu")
    x = torch.randn(N, 2, E)
    layer(x)
    expected = layer.eval()(x)
    assert copy.deepcopy(layer)(x).equal(expected)
    assert pickle.loads(pickle.dumps(layer))(x).equal(expected)


def test_nested_tensors() -> None:
    layer = SmartBirdEncoderLayer(E, H, 32, dropout=0.0, num_samples=4, sketch_dim=4).eval()
    x = torch.nested.nested_tensor([torch.randn(5, E), torch.randn(N, E)], layout=torch.jagged)
    out = layer(x, is_causal=True)
    assert out.is_nested
    for part, alone in zip(out.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(part, layer(alone, is_causal=True))
    for name in ("src_mask", "src_key_padding_mask"):
        with pytest.raises(ValueError, match=f"{name} must be None with a nested src"):
            layer(x, **{name: torch.zeros(2, N, dtype=torch.bool)})


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_changes_nothing_and_gives_zeros(norm_first: bool, batch_first: bool) -> None:
    layer = SmartBirdEncoderLayer(
        E, H, 32, batch_first=batch_first, norm_first=norm_first, num_samples=N, sketch_dim=4
    ).eval()
    x, padding = torch.randn(2, N, E), padding_mask()
    changed = x.masked_fill(padding.unsqueeze(-1), torch.nan)
    outs = []
    for tokens in (x, changed):
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        out = layer(tokens, src_key_padding_mask=padding)
        outs.append(out if batch_first else out.transpose(0, 1))
    assert outs[0].equal(outs[1])
    assert (outs[0][padding] == 0).all()
    torch.testing.assert_close(outs[0][1, :-3], layer(x[1, :-3]))


@pytest.mark.parametrize(
    ("src", "error", "said"),
    [
        ([[0.0] * E], TypeError, "src must be a Tensor, got list"),
        (torch.randn(2, N, E + 1), ValueError, "src must be"),
        (torch.randn(E), ValueError, "src must be"),
        (torch.randn(2, N, E).double(), TypeError, "src must be torch.float32"),
    ],
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_bad_tokens_are_named(
    src: Any, error: type[Exception], said: str, norm_first: bool
) -> None:
    layer = SmartBirdEncoderLayer(E, H, norm_first=norm_first)
    with pytest.raises(error, match=said):
        layer(src)
    with pytest.raises(error, match=said):
        layer(src, src_key_padding_mask=padding_mask())


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="nhead must divide d_model 16, got 5"):
        SmartBirdEncoderLayer(16, 5)
    with pytest.raises(ValueError, match="dim_feedforward must be at least 1"):
        SmartBirdEncoderLayer(E, H, -1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_integer_padding_masks_are_refused(dtype: torch.dtype) -> None:
    """Of which nobody knows whether 1 is a token or padding."""
    layer = SmartBirdEncoderLayer(E, H, batch_first=True)
    x = torch.randn(2, N, E)
    for mask in (torch.zeros(2, N, dtype=dtype), padding_mask().to(dtype)):
        with pytest.raises(ValueError, match=f"src_key_padding_mask .*, got {dtype}"):
            layer(x, src_key_padding_mask=mask)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"src_mask": causal_mask("boolean").byte()}, "src_mask must be .*torch.uint8"),
        ({"src_mask": causal_mask("boolean").long()}, "src_mask must be .*torch.int64"),
        ({"src_mask": [[0.0]]}, "src_mask must be .*got list"),
        (
            {"src_key_padding_mask": torch.zeros(2, 1, 1, N, dtype=torch.bool)},
            "src_key_padding_mask must be \\[2, 9\\], got \\[2, 1, 1, 9\\]",
        ),
        ({"src_key_padding_mask": [True]}, "src_key_padding_mask must be .*got list"),
    ],
)
def test_masks_are_named_as_the_caller_names_them(masks: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SmartBirdEncoderLayer(E, H, batch_first=True)(torch.randn(2, N, E), **masks)

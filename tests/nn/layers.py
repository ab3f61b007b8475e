"""What the tests of the layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smartbird.nn import SmartBirdAttention

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


def gradients(layer: SmartBirdAttention, x: Tensor, loss: Tensor) -> dict[str, bool]:
    """Which parameters, and whether the input ("x"), get a gradient other than zero."""
    names = dict(layer.named_parameters(), x=x)
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {n: g is not None and bool((g != 0).any()) for n, g in zip(names, grads, strict=True)}

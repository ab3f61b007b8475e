"""Whole layers and models: what attention is a part of, with PyTorch's own and with Smart Bird's.

A *layer* is ``torch.nn.TransformerEncoderLayer`` or ``smartbird.SmartBirdEncoderLayer`` of the same
sizes: width H D, a feed-forward of four times that, GELU, norms first. A *model* is four of them
between an embedding of 1024 tokens and N positions and a linear head that names the token at each
position. Dropout is 0, with which PyTorch's layer has its fused attention in training too. The fast
path of that layer is off: it is for nested tensors, makes all N x N scores and, as measured at
N = 1024 and 4096, takes longer than the layer's ordinary way through SDPA.

Forward passes are of a model in evaluation mode. Forward and backward is a training step without
the optimizer: gradients of all parameters (of a layer also of the tokens), and of Smart Bird the
loss that teaches the sketch. Sketches are scaled so that their scores have the deviation of the
case, as the weights they begin with would be those of no trained model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import smartbird
from benchmarks.speed.contenders import GUMBEL, SDPA, SYSTEMATIC, Unavailable, Widths
from benchmarks.speed.results import MODEL, Case

MODEL_LAYERS, VOCABULARY = 4, 1024


class Model(nn.Module):
    """Logits [B, N, vocabulary] of tokens [B, N]."""

    def __init__(self, layers: list[nn.Module], width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(length, width))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build_whole(
    attention: str, case: Case, widths: Widths, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """A pass through the layer or the model of ``case``, with the backward pass if it asks for one.

    Its gradients are dropped before each pass.

    Raises:
        Unavailable: there is no layer of that attention.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(attention, case, widths, dtype, device)


def _build(
    attention: str, case: Case, widths: Widths, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    width = widths.heads * widths.head_dim
    count = MODEL_LAYERS if case.part == MODEL else 1
    layers = [_layer(attention, case, widths) for _ in range(count)]
    module = Model(layers, width, case.length) if case.part == MODEL else layers[0]
    module = module.to(device, dtype).train(case.backward)
    tokens = torch.randint(VOCABULARY, (case.batch, case.length), device=device)
    x = torch.randn(case.batch, case.length, width, device=device, dtype=dtype)

    if not case.backward:

        def forward() -> Tensor:
            with _no_fast_path():
                out: Tensor = module(tokens if case.part == MODEL else x)
            return out

        return forward

    dout = torch.randn_like(x)
    x.requires_grad_()

    def step() -> None:
        module.zero_grad()
        x.grad = None
        if case.part == MODEL:
            logits = module(tokens)
            outputs = [cross_entropy(logits.flatten(0, 1), tokens.flatten())]
            gradients: list[Tensor | None] = [None]
        else:
            outputs, gradients = [module(x)], [dout]
        if attention != SDPA:
            outputs.append(smartbird.sketch_loss(module))
            gradients.append(None)
        torch.autograd.backward(outputs, gradients)

    return step


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _layer(attention: str, case: Case, widths: Widths) -> nn.Module:
    width = widths.heads * widths.head_dim
    sizes = width, widths.heads, 4 * width
    options: dict[str, Any] = {
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }
    if attention == SDPA:
        return nn.TransformerEncoderLayer(*sizes, **options)
    if attention not in (GUMBEL, SYSTEMATIC):
        raise Unavailable("not an attention of the layers that are compared")
    layer = smartbird.SmartBirdEncoderLayer(
        *sizes,
        **options,
        num_samples=widths.num_samples,
        sketch_dim=widths.sketch_dim,
        method=attention,
    )
    with torch.no_grad():
        x = torch.randn(1, 256, width)
        q_sketch, k_sketch = layer.self_attn.sketch(layer.norm1(x))
        deviation = (q_sketch @ k_sketch.mT * widths.sketch_dim**-0.5).std()
        layer.self_attn.sketch_proj_weight.mul_((case.score_std / deviation) ** 0.5)
    return layer

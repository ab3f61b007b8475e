"""How the model attends: as it was, by sampled keys, and by the keys of two rivals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionMaskInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smartbird.hf import SketchCache, convert, dense
from smartbird.nn import seed_evaluation

DENSE, OURS, ORACLE, WINDOW = "dense", "smartbird", "exact top-k", "sinks and window"
# With one sketch of the queries for each key/value head, or for all heads, as OURS has one for each
# head.
OURS_KV, OURS_LAYER = "smartbird, shared sketches", "smartbird, one sketch a layer"
# As OURS, but positions that have fewer than DENSE_BELOW times K keys before them attend to all.
OURS_LATE = "smartbird, dense at first"
DENSE_BELOW = 16
SKETCHES = {OURS: "head", OURS_KV: "kv", OURS_LAYER: "layer", OURS_LATE: "head"}
NUM_SINKS = 4  # as StreamingLLM has, arXiv 2309.17453
_ROWS = 256  # queries at a time, so that scores take little memory
_RIVAL = "benchmark_rival"  # the name in transformers' interface, while a rival is used


@contextmanager
def attending(
    model: Any, attention: str, num_samples: int | None = None, *, seed: int | None = None
) -> Iterator[None]:
    """Let a converted model attend in this way for a while.

    Args:
        model: converted by ``smartbird.hf.convert``, which is left with the settings of ours. Its
            sketches are kept, so that ``OURS_LAYER`` takes a model that has one for each layer.
        attention: ``DENSE``, a name of ``SKETCHES``, ``ORACLE`` or ``WINDOW``.
        num_samples: K, keys per query; ``DENSE`` takes none.
        seed: of the draws of ours. None: 0, which ``convert`` begins with.
    """
    if attention == DENSE:
        with dense(model):
            yield
        return
    if num_samples is None:
        raise ValueError(f"{attention} must have a num_samples, got None")
    if attention in SKETCHES:
        min_length = DENSE_BELOW * num_samples if attention == OURS_LATE else None
        sketches = SKETCHES[attention]
        convert(model, num_samples=num_samples, num_sketches=sketches, min_length=min_length)
        seed_evaluation(model, seed or 0)
        yield
        return
    function = {ORACLE: exact_topk, WINDOW: sinks_and_window}[attention]
    ALL_ATTENTION_FUNCTIONS[_RIVAL] = partial(function, num_samples=num_samples)
    try:
        with dense(model):
            model.set_attn_implementation(_RIVAL)
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_RIVAL]


def new_cache(model: Any, attention: str) -> Any:
    """What keeps keys and values: SketchCache for ours, else transformers' DynamicCache."""
    return SketchCache(model) if attention in SKETCHES else DynamicCache(config=model.config)


def exact_topk(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: None,
    *,
    num_samples: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each head to its K keys of the largest q . k, found by computing all.

    Args:
        q: [B, H, N, D], the last query at the last key.
        k: [B, H_kv, M, D].
        v: [B, H_kv, M, D].

    Returns:
        [B, N, H, D].
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    grouped = torch.unflatten(q, 1, (kv_heads, group))
    before = k.shape[2] - q.shape[2]
    parts = []
    for rows in _blocks(q.shape[2]):
        seen = before + rows.stop
        queries = grouped[..., rows, :].flatten(2, 3)
        scores = torch.unflatten(queries @ k[:, :, :seen].mT * scaling, 2, (group, -1))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(before + rows.start + 1)
        scores.masked_fill_(future, -torch.inf)
        if num_samples < seen:
            scores.masked_fill_(scores < _largest(scores, num_samples), -torch.inf)
        out = scores.softmax(-1).flatten(2, 3) @ v[:, :, :seen]
        parts.append(torch.unflatten(out, 2, (group, -1)).flatten(1, 2))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def sinks_and_window(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: None,
    *,
    num_samples: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention to the first keys and the nearest ones, K together, as StreamingLLM's.

    Keys keep their positions; StreamingLLM counts them anew, which lets a text go on beyond the
    length that a model was trained for.

    Args:
        q: [B, H, N, D], the last query at the last key.
        k: [B, H_kv, M, D].
        v: [B, H_kv, M, D].

    Returns:
        [B, N, H, D].
    """
    window = num_samples - NUM_SINKS
    if window < 1:
        raise ValueError(f"num_samples must be more than {NUM_SINKS} sinks, got {num_samples}")
    before = k.shape[2] - q.shape[2]
    parts = []
    for rows in _blocks(q.shape[2]):
        position = torch.arange(before + rows.start, before + rows.stop)[:, None]
        key = torch.arange(before + rows.stop)
        key = key[(key < NUM_SINKS) | (key > position[0] - window)]
        part = scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, key],
            v[:, :, key],
            attn_mask=(key <= position) & ((key > position - window) | (key < NUM_SINKS)),
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _largest(scores: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest of each row of [..., M]: [..., 1]."""
    place = scores.shape[-1] - rank
    # Several times faster than torch.topk.
    return torch.from_numpy(np.partition(scores.numpy(), place, axis=-1)[..., place : place + 1])


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS):
        yield slice(start, min(start + _ROWS, length))


def _no_mask(**arguments: Any) -> None:
    """The rivals see one sequence without padding, and know where they are."""
    mask = arguments.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("attention_mask must have no padding")


AttentionMaskInterface.register(_RIVAL, _no_mask)

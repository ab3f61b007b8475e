"""Which keys the attention layers of a model choose, and how much of dense attention they hold.

For any model with :class:`smartbird.SmartBirdAttention` in it::

    with record(model) as calls:
        model(tokens)
    for name, call in calls.items():
        print(name, call.recall().nanmean())

No N x M tensor is made.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smartbird import ops, patterns
from smartbird.nn import SmartBirdAttention

__all__ = ["LayerCall", "LayerKeys", "attention_recall", "record"]


@dataclasses.dataclass(frozen=True)
class LayerKeys:
    """The keys that one layer chose in one call, and the shares of dense attention they hold.

    Dense attention is the softmax of the layer's own q . k over all valid keys. Its shares are NaN
    for queries that are padding or have no valid key.

    Attributes:
        indices: int32 [B, H_i, N, K]; None where the layer attended to every valid key.
        is_causal: whether query i saw keys ``j <= i + (M - N)`` only.
        recall: float32 [B, H, N], the probability of dense attention on the chosen keys.
        best: likewise, on the K keys that hold most of it.
        chance: likewise, on as many random keys as were chosen, on average.
    """

    indices: Tensor | None
    is_causal: bool
    recall: Tensor
    best: Tensor
    chance: Tensor


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of an attention layer: what it looked for, and the keys it chose.

    Attributes:
        q: [B, H, N, D].
        k: [B, H_kv, M, D].
        indices: int32 [B, H_i, N, K], -1 in unused places; None where the layer was dense.
        is_causal: whether query i saw keys ``j <= i + (M - N)`` only.
        key_mask: bool [B, M], True where a key could be attended. None: everywhere.
        query_mask: bool [B, N], False for queries that are padding and do not count. None: all do.
    """

    q: Tensor
    k: Tensor
    indices: Tensor | None
    is_causal: bool = False
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None

    def recall(self) -> Tensor:
        """How much of dense attention the chosen keys hold, [B, H, N]: ``attention_recall``."""
        return self._recall(self.indices)

    def keys(self) -> LayerKeys:
        """The chosen keys, their recall, and the bounds that it lies between.

        The best keys take as long to find as dense attention.
        """
        recall = self.recall()
        if self.indices is None:
            return LayerKeys(None, self.is_causal, recall, recall, recall)
        masks: dict[str, Any] = {"is_causal": self.is_causal, "key_mask": self.key_mask}
        best = patterns.oracle_indices(self.q, self.k, self.indices.shape[-1], **masks)
        share = (_distinct(self.indices) >= 0).sum(-1) / self._num_valid()
        chance = share.repeat_interleave(self.q.shape[1] // self.indices.shape[1], dim=1)
        return LayerKeys(
            indices=self.indices,
            is_causal=self.is_causal,
            recall=recall,
            best=self._recall(best),
            chance=chance.masked_fill(recall.isnan(), torch.nan),
        )

    def _recall(self, indices: Tensor | None) -> Tensor:
        return attention_recall(
            self.q,
            self.k,
            indices,
            is_causal=self.is_causal,
            key_mask=self.key_mask,
            query_mask=self.query_mask,
        )

    def _num_valid(self) -> Tensor:
        """How many keys each query sees, broadcastable to [B, H, N]."""
        num_queries, num_keys = self.q.shape[2], self.k.shape[2]
        kept = self.key_mask
        if kept is None:
            kept = torch.ones(1, num_keys, dtype=torch.bool, device=self.k.device)
        if not self.is_causal:
            return kept.sum(-1)[:, None, None]
        last = torch.arange(num_keys - num_queries, num_keys, device=self.k.device)
        seen = kept.cumsum(-1)[:, last.clamp(min=0)]
        return seen.masked_fill(last < 0, 0)[:, None]


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, LayerCall]]:
    """Record what the attention layers of ``model`` choose while the context is open.

    Args:
        model: any module that holds :class:`smartbird.SmartBirdAttention`, or is one. What it
            computes stays the same.

    Yields:
        the last call of each layer, by its name in ``model`` and in the order of the calls. It has
        no part in gradients.
    """
    calls: dict[str, LayerCall] = {}
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, SmartBirdAttention):
                recorder = _Recorder(calls, name)
                hooks.enter_context(
                    layer.register_forward_pre_hook(recorder.before, with_kwargs=True)
                )
                # The first of the hooks, so that others see what the caller asked for.
                hooks.enter_context(
                    layer.register_forward_hook(recorder.after, with_kwargs=True, prepend=True)
                )
        yield calls


class _Recorder:
    """The hooks of one layer: its call returns the indices as well, which only its caller sees."""

    def __init__(self, calls: dict[str, LayerCall], name: str) -> None:
        self.calls, self.name = calls, name
        self.asked = False

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.asked = kwargs.get("return_indices", False)
        return args, {**kwargs, "return_indices": self.asked or not layer.dense}

    def after(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        out, indices = output if kwargs["return_indices"] else (output, None)
        self.calls.pop(self.name, None)  # so that the order is that of the last calls
        self.calls[self.name] = _layer_call(layer, args, kwargs, indices)
        return output if self.asked else out


@torch.no_grad()
def _layer_call(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], indices: Tensor | None
) -> LayerCall:
    """The record of a call of a layer: the one place that knows how a layer is made."""
    assert isinstance(layer, SmartBirdAttention)
    given = inspect.signature(layer.forward).bind(*args, **kwargs)
    given.apply_defaults()
    query, key, value, key_mask, is_causal = (
        given.arguments[name] for name in ("query", "key", "value", "key_mask", "is_causal")
    )
    tokens, keys, values, key_mask = layer._inputs(query, key, value, key_mask)
    q, k, _ = layer._project(tokens, keys, values)
    return LayerCall(
        q=q,
        k=k,
        indices=indices,
        is_causal=layer.is_causal if is_causal is None else is_causal,
        key_mask=key_mask,
        query_mask=key_mask if keys is tokens else None,
    )


@torch.no_grad()
def attention_recall(
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """The probability that dense attention gives to chosen keys: the sum of its softmax over them.

    The normaliser of dense attention is streamed, and of the scores only those of the chosen keys
    are kept.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        indices: valid keys, int32 [B, H_i, N, K], H a multiple of H_i, -1 in unused places; a
            repeated key counts once. None: every valid key.
        is_causal: query i sees keys ``j <= i + (M - N)``.
        key_mask: bool [B, M], True = valid. None: every key.
        query_mask: bool [B, N], False for queries that are padding. None: all count.

    Returns:
        float32 (float64 for float64) [B, H, N] in [0, 1], NaN for queries that are padding or have
        no valid key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    batch, heads, num_queries, _ = q.shape
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    lse = ops.sketch_lse(
        q.flatten(0, 1),
        k.repeat_interleave(heads // k.shape[1], dim=1).flatten(0, 1),
        is_causal=is_causal,
        key_mask=None if key_mask is None else key_mask.repeat_interleave(heads, dim=0),
    ).view(batch, heads, num_queries)
    counts = lse > -torch.inf
    if query_mask is not None:
        counts = counts & query_mask[:, None]
    if indices is None:
        recall = torch.ones_like(lse)
    else:
        scores = ops.gather_scores(q, k, _distinct(indices))
        # Rounding may put the sum of all keys a little above 1.
        recall = (scores.logsumexp(-1) - lse).exp().clamp(max=1.0)
    return recall.masked_fill(~counts, torch.nan)


def _distinct(indices: Tensor) -> Tensor:
    """Indices in another order, with -1 in place of all but the first of equal ones."""
    indices = indices.sort(-1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[..., 1:] = indices[..., 1:] == indices[..., :-1]
    return indices.masked_fill(repeated, -1)

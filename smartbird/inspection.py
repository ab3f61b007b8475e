"""Which keys the attention layers of a model choose, and how much of dense attention they hold.

For any model with :class:`smartbird.SampledAttention` in it, as the layers of smartbird have::

    with record(model) as calls:
        model(tokens)
    for name, call in calls.items():
        print(name, call.recall().nanmean())

No N x M tensor is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartbird import ops, patterns
from smartbird._visible import Visible
from smartbird.nn.sampled import SampledAttention
from smartbird.nn.training import observed

__all__ = ["LayerCall", "LayerKeys", "attention_recall", "record"]


@dataclasses.dataclass(frozen=True)
class LayerKeys:
    """The keys that one layer chose in one call, and the shares of dense attention they hold.

    Dense attention is the softmax of the layer's own q . k over all valid keys. Its shares are NaN
    for queries that are padding or have no valid key.

    Attributes:
        indices: int32 [B, H_i, N, K]; None where the layer attended to every valid key.
        is_causal: whether a query saw the keys up to its position only.
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

    Sequences that the layer had packed, as every batch whose padding is masked is, stand one below
    the other here: each begins at the first place, what is left of its line is padding by
    ``key_mask`` and ``query_mask``, and ``indices`` are places in the sequence.

    Attributes:
        q: [B, H, N, D].
        k: [B, H_kv, M, D].
        indices: int32 [B, H_i, N, K], -1 in unused places; None where the layer was dense.
        is_causal: whether a query saw the keys up to its position only.
        key_mask: bool [B, M], True where a key could be attended. None: everywhere.
        query_mask: bool [B, N], False for queries that are padding and do not count. None: all do.
        query_offset: position of query 0, int or int64 [B]. None: M - N.
        scale: of q . k in the layer's attention. None: ``D ** -0.5``.
    """

    q: Tensor
    k: Tensor
    indices: Tensor | None
    is_causal: bool = False
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    query_offset: int | Tensor | None = None
    scale: float | None = None

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
        best = patterns.oracle_indices(
            self.q if self.scale is None else self.q * self.scale,
            self.k,
            self.indices.shape[-1],
            is_causal=self.is_causal,
            key_mask=self.key_mask,
            query_offset=self.query_offset,
        )
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
            query_offset=self.query_offset,
            scale=self.scale,
        )

    def _num_valid(self) -> Tensor:
        """How many keys each query sees, broadcastable to [B, H, N]."""
        (batch, _, num_queries, _), num_keys = self.q.shape, self.k.shape[2]
        kept = self.key_mask
        if kept is None:
            kept = torch.ones(1, num_keys, dtype=torch.bool, device=self.k.device)
        if not self.is_causal:
            return kept.sum(-1)[:, None, None]
        offset = num_keys - num_queries if self.query_offset is None else self.query_offset
        offset = torch.as_tensor(offset, device=self.q.device).reshape(-1, 1)
        position = offset + torch.arange(num_queries, device=self.q.device)
        seen = F.pad(kept.cumsum(-1), (1, 0)).expand(batch, -1)
        return seen.gather(1, (position + 1).clamp(0, num_keys).expand(batch, -1))[:, None]


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, LayerCall]]:
    """Record what the attention layers of ``model`` choose while the context is open.

    Args:
        model: any module that holds :class:`smartbird.SampledAttention`, or is one. What it
            computes stays the same; compiled models run without their graphs meanwhile.

    Yields:
        the last call of each :class:`smartbird.SampledAttention`, by its name in ``model`` (which
        in :class:`smartbird.SmartBirdAttention` ends with ``core``) and in the order of the calls.
        It has no part in gradients.
    """
    calls: dict[str, LayerCall] = {}
    with observed(model, lambda name, layer: partial(_note, calls, name, layer)):
        yield calls


@torch.no_grad()
def _note(
    calls: dict[str, LayerCall],
    name: str,
    layer: SampledAttention,
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    visible: Visible,
    indices: Tensor | None,
) -> None:
    calls.pop(name, None)  # so that the order is that of the last calls
    calls[name] = _layer_call(layer, q.detach(), k.detach(), visible, indices)


def _layer_call(
    layer: SampledAttention, q: Tensor, k: Tensor, visible: Visible, indices: Tensor | None
) -> LayerCall:
    """The record of a call of a layer: the one place that knows how a layer is made."""
    key_mask, query_mask = visible.key_mask, None
    query_offset: int | Tensor | None = visible.query_offset
    if visible.cu_seqlens_q is not None and visible.cu_seqlens_k is not None:
        query_row, query_mask = _lines(visible.cu_seqlens_q)
        key_row, is_key = _lines(visible.cu_seqlens_k)
        # Of a sequence without queries it does not matter.
        query_offset = F.pad(visible.query_positions()[0], (0, 1))[visible.cu_seqlens_q[:-1].long()]
        if indices is not None:
            indices = visible.places(indices)[0, :, query_row].transpose(0, 1)
            indices = indices.masked_fill(~query_mask[:, None, :, None], -1)
        q, k = q[0, :, query_row].transpose(0, 1), k[0, :, key_row].transpose(0, 1)
        key_mask = is_key if key_mask is None else is_key & key_mask[0, key_row]
    elif visible.positions is not None:
        query_offset = F.pad(visible.positions, (0, 1))[:, 0]
    return LayerCall(
        q=q,
        k=k,
        indices=indices,
        is_causal=visible.is_causal,
        key_mask=key_mask,
        query_mask=query_mask,
        query_offset=query_offset,
        scale=layer.scale,
    )


def _lines(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed sequences one below the other: the rows [n, length], and where there is one."""
    lengths = cu_seqlens.diff().long()
    length = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(length, device=cu_seqlens.device)
    exists = place < lengths[:, None]
    return (cu_seqlens[:-1, None].long() + place).masked_fill(~exists, 0), exists


@torch.no_grad()
def attention_recall(
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The probability that dense attention gives to chosen keys: the sum of its softmax over them.

    The normaliser of dense attention is streamed, and of the scores only those of the chosen keys
    are kept.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        indices: valid keys, int32 [B, H_i, N, K], H a multiple of H_i, -1 in unused places; a
            repeated key counts once. None: every valid key.
        is_causal: query i sees the keys up to position ``query_offset + i``.
        key_mask: bool [B, M], True = valid. None: every key.
        query_mask: bool [B, N], False for queries that are padding. None: all count.
        query_offset: int or int64 [B]. None: M - N.
        scale: factor of q . k. None: ``D ** -0.5``.

    Returns:
        float32 (float64 for float64) [B, H, N] in [0, 1], NaN for queries that are padding or have
        no valid key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    lse = ops.sketch_lse(
        q, k, scale=scale, is_causal=is_causal, key_mask=key_mask, query_offset=query_offset
    )
    counts = lse > -torch.inf
    if query_mask is not None:
        counts = counts & query_mask[:, None]
    if indices is None:
        recall = torch.ones_like(lse)
    else:
        scores = ops.gather_scores(q, k, _distinct(indices), scale=scale)
        # Rounding may put the sum of all keys a little above 1.
        recall = (scores.logsumexp(-1) - lse).exp().clamp(max=1.0)
    return recall.masked_fill(~counts, torch.nan)


def _distinct(indices: Tensor) -> Tensor:
    """Indices in another order, with -1 in place of all but the first of equal ones."""
    indices = indices.sort(-1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[..., 1:] = indices[..., 1:] == indices[..., :-1]
    return indices.masked_fill(repeated, -1)

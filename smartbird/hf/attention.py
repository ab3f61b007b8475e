"""The attention function: which modules sample their keys, and how they are called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smartbird.functional import dense_attention
from smartbird.hf.mask import RowMask, Rows, row_mask
from smartbird.nn import SampledAttention

CHILD = "smartbird"  # the name of SketchedAttention in an attention module
# What models that use another implementation for the modules that stay as they are register as.
# transformers reads meaning into names: none may hold "sdpa", "flash" or a slash.
NAMES = {"sdpa": "smartbird", "eager": "smartbird_eager"}

# Keywords that change nothing about which keys count how much. Others, if not None, might.
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)

# Called with the module and the arguments of attention that no SketchedAttention serves.
Observer = Callable[[nn.Module, Tensor, Tensor, Any, dict[str, Any]], None]
observers: list[Observer] = []


class SketchedAttention(nn.Module):
    """Attention over sampled keys in a converted attention module, by sketches of its own q and k.

    The sketches are linear maps of the queries and keys that the model computes, whatever it did to
    make them (rotary embedding, norms, biases), so that a cache of keys is enough to make them
    again.

    Args:
        q_weight: [H, D, S], from the queries of each head to its sketch.
        k_weight: [H_kv, D, S], from the keys of each key/value head to its sketch.
        attention: draws keys and attends to them.
        sketch_per_head: each head has a query sketch of its own; False: heads that share keys share
            the mean of theirs.
        min_length: positions below it attend to all their keys; without causality the sequences
            that are shorter do.
    """

    def __init__(
        self,
        q_weight: Tensor,
        k_weight: Tensor,
        attention: SampledAttention,
        *,
        sketch_per_head: bool,
        min_length: int,
    ) -> None:
        super().__init__()
        # Nothing but distillation makes a gradient for them, and a parameter that waits for one in
        # vain is an error where gradients are gathered from many processes.
        self.q_weight = nn.Parameter(q_weight, requires_grad=False)
        self.k_weight = nn.Parameter(k_weight, requires_grad=False)
        self.attention = attention
        self.sketch_per_head = sketch_per_head
        self.min_length = min_length

    def sketch_queries(self, q: Tensor) -> Tensor:
        """q [B, H, N, D] to [B, H_s, N, S]; the gradient of the sketch does not reach q."""
        sketch = q.detach() @ self.q_weight.to(q.dtype)
        if self.sketch_per_head:
            return sketch
        return torch.unflatten(sketch, 1, (self.k_weight.shape[0], -1)).mean(2)

    def sketch_keys(self, k: Tensor) -> Tensor:
        """k [B, H_kv, M, D] to [B, H_kv, M, S]; the gradient of the sketch does not reach k."""
        return k.detach() @ self.k_weight.to(k.dtype)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: RowMask,
        *,
        k_sketch: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``q`` to ``k`` and ``v``.

        Args:
            q: [B, H, N, D].
            k: [B, H_kv, M, D]; keys beyond ``mask.num_keys`` are empty places of a static cache.
            v: [B, H_kv, M, Dv].
            mask: of this call, without a reason.
            k_sketch: [B, H_kv, M, S]. None: made from ``k``.
            cu_seqlens: int32 [n + 1], where packed sequences begin and end. None: the mask says it.

        Returns:
            [B, N, H, Dv], zero in padding.
        """
        if k_sketch is None:
            k_sketch = self.sketch_keys(k[:, :, : mask.num_keys])
        q_sketch = self.sketch_queries(q)
        runs = mask.runs if cu_seqlens is None else mask.packed_runs(cu_seqlens)
        parts = []
        for run in runs:
            queries = [select_rows(x[run.batch], run.queries) for x in (q, q_sketch)]
            keys = [select_rows(x[run.batch], run.keys) for x in (k, v, k_sketch)]
            parts.append(self._attend(*queries, *keys, is_causal=mask.is_causal).transpose(1, 2))
        if len(parts) == 1 and parts[0].shape[:2] == (q.shape[0], q.shape[2]):
            return parts[0].contiguous()
        out = q.new_zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
        for run, part in zip(runs, parts, strict=True):
            out[run.batch, run.queries] = part.to(out.dtype)
        return out

    def _attend(
        self,
        q: Tensor,
        q_sketch: Tensor,
        k: Tensor,
        v: Tensor,
        k_sketch: Tensor,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Of sequences without padding, the last query at the last key: [B, H, N, Dv]."""
        num_queries, num_keys = q.shape[2], k.shape[2]
        before = num_keys - num_queries
        num_dense = num_queries if num_keys < self.min_length else 0
        if is_causal:
            num_dense = min(max(self.min_length - before, 0), num_queries)
        if self.attention.dense:
            num_dense = 0  # the rest would be dense as well, and all in one call is faster
        parts = []
        if num_dense > 0:
            attention = self.attention
            seen = before + num_dense
            part = dense_attention(
                q[:, :, :num_dense],
                k[:, :, :seen],
                v[:, :, :seen],
                is_causal=is_causal,
                dropout_p=attention.dropout if self.training else 0.0,
                scale=attention.scale,
            )
            parts.append(part)
        if num_dense < num_queries:
            rest = q[:, :, num_dense:], k, v, q_sketch[:, :, num_dense:], k_sketch
            parts.append(self.attention(*rest, is_causal=is_causal))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def extra_repr(self) -> str:
        heads, width, features = self.q_weight.shape
        return (
            f"{heads} x {width} -> {features}, sketch_per_head={self.sketch_per_head}, "
            f"min_length={self.min_length}"
        )


def select_rows(x: Tensor, rows: Rows) -> Tensor:
    """Some rows of x [B, H, N, D]."""
    return x[:, :, rows] if isinstance(rows, slice) else x.index_select(2, rows)


def sketched(module: nn.Module) -> SketchedAttention | None:
    """What samples the keys of an attention module, if it was converted."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, SketchedAttention) else None


def unknown_keywords(keywords: dict[str, Any]) -> list[str]:
    """Those that might mean something that attention over sampled keys does not do."""
    return sorted(
        name
        for name, value in keywords.items()
        if value is not None and value is not False and name not in HARMLESS
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    native: str,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    k_sketch: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' AttentionInterface, in the names of ``NAMES``.

    Modules without a :class:`SketchedAttention` get the implementation ``native`` and its mask.

    Raises:
        ValueError: what a converted module is called with cannot be honoured.
    """
    converted = sketched(module)
    if converted is None:
        for observer in observers:
            observer(module, query, key, attention_mask, {**keywords, "scaling": scaling})
        if isinstance(attention_mask, RowMask):
            attention_mask = attention_mask.native(native)
        given = {
            "is_causal": is_causal,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
        }
        keywords |= {name: x for name, x in given.items() if x is not None}
        # "eager" is no entry there, but a function beside the module's class.
        function = ALL_ATTENTION_FUNCTIONS.get(native) or beside(module, "eager_attention_forward")
        output: tuple[Tensor, Tensor | None] = function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
        return output

    if not isinstance(attention_mask, RowMask):
        got = "None" if attention_mask is None else f"a {type(attention_mask).__name__}"
        shape = f" {list(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else ""
        raise ValueError(
            "attention_mask must come from the mask function of smartbird, which takes padding "
            f"[B, M] and no mask of pairs, got {got}{shape}: see smartbird.hf.dense and revert"
        )
    if attention_mask.reason is not None:
        raise ValueError(
            f"attention over sampled keys cannot serve this call: {attention_mask.reason}"
        )
    if is_causal is not None and is_causal != attention_mask.is_causal:
        raise ValueError(
            f"is_causal must be what the mask says, {attention_mask.is_causal}, got {is_causal}"
        )
    if unknown := unknown_keywords(keywords):
        raise ValueError(f"attention over sampled keys does not know the arguments {unknown}")
    if cu_seq_lens_k is not None and (
        cu_seq_lens_q is None or not torch.equal(cu_seq_lens_k, cu_seq_lens_q)
    ):
        raise ValueError(
            "cu_seq_lens_k must be cu_seq_lens_q, as queries and keys are one sequence"
        )
    core = converted.attention
    if scaling is not None and scaling != core.scale:
        raise ValueError(
            f"scaling must be {core.scale}, as it was when the model was converted, got {scaling}"
        )
    if converted.training and dropout != core.dropout:
        core.dropout = dropout
    out = converted(query, key, value, attention_mask, k_sketch=k_sketch, cu_seqlens=cu_seq_lens_q)
    return out, None


def beside(module: nn.Module, name: str) -> Any:
    """What stands by this name in the file of the module's class, or of one that it inherits."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    return None


for _native, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attention, native=_native))
    AttentionMaskInterface.register(_name, row_mask)

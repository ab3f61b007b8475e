"""The attention function: which modules sample their keys, and how they are called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
        num_sketches: ``"head"``, each head has a query sketch of its own; ``"kv"``, heads that
            share keys share the mean of theirs; ``"layer"``, all heads do, and the sketches of all
            key/value heads are added, which have features of their own.
        min_length: positions below it attend to all their keys; without causality the sequences
            that are shorter do.
    """

    def __init__(
        self,
        q_weight: Tensor,
        k_weight: Tensor,
        attention: SampledAttention,
        *,
        num_sketches: str,
        min_length: int,
    ) -> None:
        super().__init__()
        # Nothing but distillation makes a gradient for them, and a parameter that waits for one in
        # vain is an error where gradients are gathered from many processes.
        self.q_weight = nn.Parameter(q_weight, requires_grad=False)
        self.k_weight = nn.Parameter(k_weight, requires_grad=False)
        self.attention = attention
        self.num_sketches = num_sketches
        self.min_length = min_length

    @staticmethod
    def core(
        num_heads: int,
        num_kv_heads: int,
        *,
        is_causal: bool,
        scale: float,
        sampling: dict[str, Any],
        dropout: float = 0.0,
    ) -> SampledAttention:
        """What draws and attends by such settings, for sketches that stand for q . k."""
        return SampledAttention(
            num_heads,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
            dropout=dropout,
            scale=scale,
            sketch_scale=scale,
            distill=False,
            distill_temperature=1.0,  # as distil teaches
            **sampling,
        )

    def set_sampling(self, sampling: dict[str, Any], *, num_sketches: str, min_length: int) -> None:
        """Attend by other settings of :class:`smartbird.nn.SampledAttention`, by the same seed."""
        before = self.attention
        assert before.scale is not None
        self.attention = self.core(
            before.num_heads,
            before.num_kv_heads,
            is_causal=before.is_causal,
            scale=before.scale,
            sampling=sampling,
            dropout=before.dropout,
        ).train(before.training)
        for name in ("eval_seed", "dense", "observer"):
            setattr(self.attention, name, getattr(before, name))
        self.num_sketches = num_sketches
        self.min_length = min_length

    def sketch_queries(self, q: Tensor) -> Tensor:
        """q [B, H, N, D] to [B, H_s, N, S]; the gradient of the sketch does not reach q."""
        sketch = q.detach() @ self.q_weight.to(q.dtype)
        if self.num_sketches == "head":
            return sketch
        if self.num_sketches == "layer":
            return sketch.mean(1, keepdim=True)
        return torch.unflatten(sketch, 1, (self.k_weight.shape[0], -1)).mean(2)

    def sketch_keys(self, k: Tensor) -> Tensor:
        """k [B, H_kv, M, D] to [B, H_ks, M, S]; the gradient of the sketch does not reach k."""
        sketch = k.detach() @ self.k_weight.to(k.dtype)
        return sketch.sum(1, keepdim=True) if self.num_sketches == "layer" else sketch

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
            k_sketch: [B, H_ks, M, S]. None: made from ``k``.
            cu_seqlens: int32 [n + 1], where packed sequences begin and end. None: the mask says it.

        Returns:
            [B, N, H, Dv], zero in padding.
        """
        if self.attention.context is not None:
            raise ValueError("ContextParallel does not serve the modules of pretrained models yet")
        if mask.start is not None and cu_seqlens is None and torch.compiler.is_compiling():
            return self._attend_in_graph(q, k, v, mask, mask.start).transpose(1, 2).contiguous()
        if k_sketch is None:
            k_sketch = self.sketch_keys(k[:, :, : mask.num_keys])
        q_sketch = self.sketch_queries(q)
        runs = mask.runs if cu_seqlens is None else mask.packed_runs(cu_seqlens)
        parts = []
        for run in runs:
            queries = [select_rows(x, run.batch, run.queries) for x in (q, q_sketch)]
            keys = [select_rows(x, run.batch, run.keys) for x in (k, v, k_sketch)]
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
        if num_dense == 0:
            out: Tensor = self.attention(q, k, v, q_sketch, k_sketch, is_causal=is_causal)
            return out
        seen = before + num_dense
        full = self._attend_densely(
            q[:, :, :num_dense], k[:, :, :seen], v[:, :, :seen], is_causal=is_causal
        )
        if num_dense == num_queries:
            return full
        rest = q[:, :, num_dense:], k, v, q_sketch[:, :, num_dense:], k_sketch
        return torch.cat([full, self.attention(*rest, is_causal=is_causal)], dim=2)

    def _attend_densely(self, q: Tensor, k: Tensor, v: Tensor, **rows: Any) -> Tensor:
        dropout_p = self.attention.dropout if self.training else 0.0
        scale = self.attention.scale
        return dense_attention(q, k, v, dropout_p=dropout_p, scale=scale, **rows)

    def _attend_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, mask: RowMask, start: Tensor
    ) -> Tensor:
        """Where no data may decide shapes: of all places of a cache, [B, H, N, Dv].

        Causality hides the empty ones. A batch with padding is packed, which copies all of the
        cache; where rows may sample and not hold all they see, both are computed for all of them.
        """
        batch, length = k.shape[0], k.shape[2]
        rows = start + torch.arange(q.shape[2], device=q.device)
        visible: dict[str, Any] = {"query_offset": start.expand(batch)}
        position = rows.expand(batch, -1)
        if mask.key_mask is not None:
            real = F.pad(mask.key_mask, (0, length - mask.key_mask.shape[1]))
            real = real & (torch.arange(length, device=q.device) <= rows[-1])
            # Not of the padded one: a mask that is too short must not hide queries.
            visible = {"query_mask": mask.key_mask.index_select(1, rows), "key_mask": real}
            position = real.cumsum(1).index_select(1, rows) - 1
        sketches = self.sketch_queries(q), self.sketch_keys(k)
        out: Tensor = self.attention(q, k, v, *sketches, is_causal=True, **visible)
        if self.min_length <= self.attention.num_samples:
            return out  # rows below it hold all their keys anyhow
        key_mask, offset = visible.get("key_mask"), start.expand(batch)
        full = self._attend_densely(q, k, v, is_causal=True, key_mask=key_mask, query_offset=offset)
        out = torch.where((position < self.min_length)[:, None, :, None], full, out)
        if mask.key_mask is not None:
            out = out.masked_fill(~visible["query_mask"][:, None, :, None], 0)
        return out

    def extra_repr(self) -> str:
        heads, width, features = self.q_weight.shape
        return (
            f"{heads} x {width} -> {features}, num_sketches={self.num_sketches!r}, "
            f"min_length={self.min_length}"
        )


def select_rows(x: Tensor, batch: slice, rows: Rows) -> Tensor:
    """Some elements and rows of x [B, H, N, D], itself where they are all."""
    if isinstance(rows, Tensor):
        return x[batch].index_select(2, rows)
    every = batch.stop - batch.start == x.shape[0] and rows.stop - rows.start == x.shape[2]
    return x if every else x[batch, :, rows]


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
    k_weight: Tensor | None = None,
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
    if (
        k_weight is not None
        and k_weight is not converted.k_weight  # but in a copy of a cache
        and not torch.equal(k_weight, converted.k_weight)
    ):
        raise ValueError(
            "past_key_values must be a SketchCache that the sketches of this model made, got one "
            "that others made: the model was converted anew since"
        )
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

"""Attention as functions: the sampled one, and the dense one it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird._checks import (
    check_attention,
    check_count,
    check_dropout,
    check_flag,
    check_floats,
    check_index_heads,
    check_indices,
    check_inputs,
    check_keywords,
    check_scale,
    check_seed,
    check_sketches,
    check_tensor,
    default_index_heads,
    shape_of,
)
from smartbird._packing import Packing, packing
from smartbird._visible import Visible, check_visible
from smartbird.ops._call import acc_dtype
from smartbird.ops.gather import attend_to, gather_scores
from smartbird.ops.sample import METHODS as DRAWN_METHODS
from smartbird.ops.sample import ascending, check_method, check_num_samples, draw
from smartbird.ops.sampled import sampled_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "METHODS",
    "add_uniform_keys",
    "deal_keys",
    "dense_attention",
    "smart_bird_attention",
    "smart_bird_attention_varlen",
]

METHODS = (*DRAWN_METHODS, "dealt")

# smartbird.ops.gather.attend_to or what stands for it, whose second result is not used.
AttendKeys = Callable[..., tuple[Tensor, Tensor | None]]


# ---- the composition ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attended:
    """What :func:`attend` gives.

    Attributes:
        out: [B, H, N, Dv].
        indices: int32 [B, H_i, N, K], the keys attended to; None where nobody needed them.
        log_inclusion: float32 [B, H_i, N, K] of ``indices``; None where nobody needed it.
    """

    out: Tensor
    indices: Tensor | None
    log_inclusion: Tensor | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    visible: Visible,
    *,
    num_index_heads: int,
    method: str,
    correction: bool = False,
    scale: float | None = None,
    sketch_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    indices: Tensor | None = None,
    num_uniform: int = 0,
    bias_sketch: tuple[Tensor, Tensor] | None = None,
    need_indices: bool = False,
    need_log_inclusion: bool = False,
    attend_keys: AttendKeys | None = None,
) -> Attended:
    """Draw keys and attend to them: the only place where the two are put together.

    Whether one op does both or two do changes speed and memory, not a bit of the result, and no
    gradient.

    Args:
        q, k, v, q_sketch, k_sketch: as ``smartbird._checks.check_inputs`` gives them.
        num_samples, num_index_heads, method, correction, scale, sketch_scale, dropout_p: as in
            :func:`smart_bird_attention`; checked here.
        visible: of these tensors.
        seed: int64 [2]; None: drawn from PyTorch's generator.
        indices: keys to attend to; None: they are drawn.
        num_uniform: how many of the K places keys take that are drawn uniformly.
        bias_sketch: sketches as ``check_sketches`` gives them whose scores join the logits of the
            pairs attended to, with their gradient.
        need_indices, need_log_inclusion: they are to be returned.
        attend_keys: what attends to the keys drawn, in place of ``smartbird.ops.gather.attend_to``,
            where ``k`` and ``v`` are not those of all tokens.
    """
    num_index_heads = check_index_heads(num_index_heads, q_sketch.shape[1], q.shape[1])
    method = check_method(method, METHODS)
    correction = check_flag("correction", correction)
    scale = check_scale("scale", scale, q.shape[3])
    sketch_scale = check_scale("sketch_scale", sketch_scale, q_sketch.shape[3])
    dropout_p = check_dropout(dropout_p)
    seed = check_seed(seed, q.device)
    drawing: dict[str, Any] = {"num_index_heads": num_index_heads, "method": method, "seed": seed}

    separate = need_indices or need_log_inclusion or num_uniform > 0 or bias_sketch is not None
    separate = separate or attend_keys is not None
    if indices is None and not separate and method != "dealt" and not _records(q, k, v):
        out = sampled_attention(
            q,
            k,
            v,
            q_sketch,
            k_sketch,
            check_num_samples(num_samples, visible),
            visible,
            **drawing,
            correction=correction,
            scale=scale,
            sketch_scale=sketch_scale,
            dropout_p=dropout_p,
        )
        return Attended(out, None, None)

    log_inclusion = None
    if indices is not None:
        check_indices(indices, q)
    else:
        num_drawn = check_num_samples(num_samples - num_uniform, visible)
        if method == "dealt":
            indices = _deal(q_sketch, k_sketch, num_drawn, visible, num_index_heads, sketch_scale)
        else:
            needed = correction or need_log_inclusion
            indices, log_inclusion = draw(
                q_sketch,
                k_sketch,
                num_drawn,
                visible,
                **drawing,
                scale=sketch_scale,
                need_log_inclusion=needed,
            )
            log_inclusion = log_inclusion if needed else None
        if num_uniform > 0:
            # Another stream than that of the other keys, or the two draws would go together.
            indices = _add_uniform(indices, num_uniform, visible, ~seed)

    bias = None
    if correction and log_inclusion is not None:
        bias = -log_inclusion.to(acc_dtype(q))
    if bias_sketch is not None:
        scores = _sketch_scores(*bias_sketch, indices).to(acc_dtype(q))
        bias = scores if bias is None else bias + scores
    attend_by: AttendKeys = attend_to if attend_keys is None else attend_keys
    out, _ = attend_by(
        q, k, v, indices, visible, bias=bias, scale=scale, dropout_p=dropout_p, seed=seed
    )
    return Attended(out, indices, log_inclusion)


def _records(*tensors: Tensor) -> bool:
    """Whether autograd is seen to record (within torch.vmap it is not)."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _sketch_scores(q_sketch: Tensor, k_sketch: Tensor, indices: Tensor) -> Tensor:
    """The sketches' scores of the indexed pairs, [B, H_i, N, K]."""
    group = indices.shape[1] // q_sketch.shape[1]
    q_sketch = q_sketch.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)
    return gather_scores(q_sketch, k_sketch, indices)


# ---- public functions ---------------------------------------------------------------------------


class AttentionOptions(TypedDict, total=False):
    """Keywords of :func:`smart_bird_attention` and :func:`smart_bird_attention_varlen`."""

    num_index_heads: int | None
    method: str
    correction: bool
    is_causal: bool
    key_mask: Tensor | None
    window: int
    num_sinks: int
    global_mask: Tensor | None
    query_offset: int | Tensor | None
    sequence_ids: Tensor | None
    first_head: int
    dropout_p: float
    scale: float | None
    sketch_scale: float | None
    seed: Tensor | None
    generator: torch.Generator | None


_VARLEN_OPTIONS = frozenset(AttentionOptions.__annotations__)


class PaddedAttentionOptions(AttentionOptions, total=False):
    """Keywords of :func:`smart_bird_attention` alone."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    query_mask: Tensor | None


@overload
def smart_bird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    return_indices: Literal[False] = ...,
    **options: Unpack[PaddedAttentionOptions],
) -> Tensor: ...
@overload
def smart_bird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    return_indices: Literal[True],
    **options: Unpack[PaddedAttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def smart_bird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    return_indices: bool,
    **options: Unpack[PaddedAttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def smart_bird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    num_index_heads: int | None = None,
    method: str = "gumbel",
    correction: bool = False,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    window: int = 0,
    num_sinks: int = 0,
    global_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_head: int = 0,
    query_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    sketch_scale: float | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over keys sampled from its sketch row (arXiv 2108.09193).

    Row i of the sketch gives ``p_i = softmax_j(q_sketch_i . k_sketch_j * sketch_scale)``; every
    index head draws its own ``num_samples`` keys from ``p_i``, and head h attends over the keys of
    index head ``h // (H / H_i)``. No tensor of size N x M is made.

    The tensors may be nested ones of ``torch.jagged`` layout, with the lengths of their sequences
    in the place of N and M (j in ``torch.nested``); then so are the results, and the masks must be
    None.

    Args:
        q: [B, H, N, D], floating point.
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        v: [B, H_kv, M, Dv], dtype of ``q``.
        q_sketch: [B, N, S], or [B, H_s, N, S], one for each group of heads. Drawing has no
            gradient; ``smartbird.ops.distill_loss`` has.
        k_sketch: [B, M, S], or [B, H_ks, M, S] with H_ks a divisor of H_s.
        num_samples: K, the number of keys per query and index head.
        num_index_heads: H_i, how many sets of keys a query draws; divides H, a multiple of H_s.
            None: the least common multiple of H_kv and H_s, so that heads which share keys and
            sketch share draws.
        method: ``"gumbel"``, ``"systematic"``, ``"multinomial"`` or ``"topk"``, see
            ``smartbird.ops.sketch_sample``, or ``"dealt"``, see :func:`deal_keys`.
        correction: subtract ``log_inclusion`` from the logits, which makes the result the
            self-normalised Horvitz-Thompson estimate of dense attention. Of keys that are not
            drawn at random there is nothing to correct: ``"topk"``, ``"dealt"``.
        is_causal, key_mask, window, num_sinks, global_mask: as in ``smartbird.ops.sketch_sample``.
        query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: likewise.
        query_mask: bool [B, N], True where a query is real. The others, and the keys that
            ``key_mask`` hides, are taken out before anything is computed: they cost nothing and
            give zeros, and the rest is what it would be without padding, wherever that is.
            Positions count real queries and keys only. For self-attention of a padded batch, give
            the same mask as ``key_mask`` and ``query_mask``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        scale: of the logits; None: ``D ** -0.5``.
        sketch_scale: of the sketch scores; None: ``S ** -0.5``.
        seed: int64 [2], (seed, offset), of sampling and dropout, which use separate streams of it.
            None: drawn from ``generator``.
        generator: source of a seed that is not given; None: PyTorch's global one.
        return_indices: also return the sampled keys.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``, zero in a row without a valid key; with
        ``return_indices`` also the indices, int32 [B, H_i, N, K], ascending, -1 in unused places.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    tensors = (q, k, v, q_sketch, k_sketch)
    rows: dict[str, Any] = {
        "is_causal": is_causal,
        "window": window,
        "num_sinks": num_sinks,
        "query_offset": query_offset,
        "sequence_ids": sequence_ids,
        "first_head": first_head,
    }
    options: dict[str, Any] = {
        "num_index_heads": num_index_heads,
        "method": method,
        "correction": correction,
        "dropout_p": dropout_p,
        "scale": scale,
        "sketch_scale": sketch_scale,
        "need_indices": check_flag("return_indices", return_indices),
    }
    nested = any(isinstance(x, Tensor) and x.is_nested for x in tensors)
    if nested or query_mask is not None:
        for name, other in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if other is not None:
                with_ = "nested tensors" if nested else "query_mask"
                raise ValueError(f"{name} must be None with {with_}, got a Tensor")
    if nested:
        for name, mask in {
            "key_mask": key_mask,
            "global_mask": global_mask,
            "query_mask": query_mask,
        }.items():
            if mask is not None:
                raise ValueError(f"{name} must be None with nested tensors, got a Tensor")
        out, indices = _attend_nested(tensors, num_samples, rows, options, seed, generator)
    elif query_mask is not None:
        out, indices = _attend_padded(
            tensors,
            num_samples,
            (query_mask, key_mask, global_mask),
            rows,
            options,
            seed,
            generator,
        )
    else:
        rows |= {"key_mask": key_mask, "global_mask": global_mask}
        rows |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        out, indices = _attend(check_inputs(*tensors), num_samples, rows, options, seed, generator)
    if indices is None or not return_indices:
        return out
    return out, indices


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v and the sketches


def _attend(
    tensors: _Tensors,
    num_samples: int,
    rows: dict[str, Any],
    options: dict[str, Any],
    seed: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """Of checked tensors: the result and, where they were asked for, the indices."""
    q, k, _, q_sketch, _ = tensors
    if options["num_index_heads"] is None:
        heads = default_index_heads(k.shape[1], q_sketch.shape[1])
        options = options | {"num_index_heads": heads}
    visible = check_visible(q.shape[0], q.shape[2], k.shape[2], q.device, **rows)
    seed = check_seed(seed, q.device, generator)
    attended = attend(*tensors, num_samples, visible, seed=seed, **options)
    return attended.out, attended.indices


def _attend_padded(
    tensors: tuple[Tensor, ...],
    num_samples: int,
    masks: tuple[Tensor, Tensor | None, Tensor | None],
    rows: dict[str, Any],
    options: dict[str, Any],
    seed: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """The same of a padded batch, whose padding is taken out."""
    q, k, v, q_sketch, k_sketch = check_inputs(*tensors)
    query_mask, key_mask, global_mask = masks
    queries, keys = _pack_tokens(q, k, query_mask, key_mask)
    if global_mask is not None:
        shape = (k.shape[0], k.shape[2])
        check_tensor("global_mask", global_mask, torch.bool, shape, "[B, M]", k.device)
        global_mask = keys.pack_rows(global_mask)
    rows = rows | {
        "global_mask": global_mask,
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
    }
    packed = (
        queries.pack(q),
        keys.pack(k),
        keys.pack(v),
        queries.pack(q_sketch),
        keys.pack(k_sketch),
    )
    out, indices = _attend(packed, num_samples, rows, options, seed, generator)
    if indices is not None:
        indices = queries.unpack(keys.places(indices), fill=-1)
    return queries.unpack(out), indices


def _pack_tokens(
    q: Tensor, k: Tensor, query_mask: Tensor, key_mask: Tensor | None
) -> tuple[Packing, Packing]:
    """The packing of queries and that of keys, one object where the masks are."""
    shape = (q.shape[0], q.shape[2])
    check_tensor("query_mask", query_mask, torch.bool, shape, "[B, N]", q.device)
    queries = packing(query_mask)
    if key_mask is query_mask and q.shape[2] == k.shape[2]:
        return queries, queries
    shape = (k.shape[0], k.shape[2])
    if key_mask is None:
        key_mask = torch.ones(shape, dtype=torch.bool, device=k.device)
    check_tensor("key_mask", key_mask, torch.bool, shape, "[B, M]", k.device)
    return queries, packing(key_mask)


def _attend_nested(
    tensors: tuple[Tensor, ...],
    num_samples: int,
    rows: dict[str, Any],
    options: dict[str, Any],
    seed: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """The same of nested tensors, which are packed already."""
    names = ("q", "k", "v", "q_sketch", "k_sketch")
    parts = {name: _jagged(name, x) for name, x in zip(names, tensors, strict=True)}
    packed = [values for values, _ in parts.values()]
    offsets = {name: offsets for name, (_, offsets) in parts.items()}
    for name, like in (("v", "k"), ("q_sketch", "q"), ("k_sketch", "k")):
        ours, theirs = offsets[name], offsets[like]
        if ours is not theirs and not torch.equal(ours, theirs):
            raise ValueError(
                f"{name} must have the lengths of {like} {theirs.diff().tolist()}, "
                f"got {ours.diff().tolist()}"
            )
    cu_seqlens_q = offsets["q"].int()
    cu_seqlens_k = cu_seqlens_q if offsets["k"] is offsets["q"] else offsets["k"].int()
    rows = rows | {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    out, indices = _attend(check_inputs(*packed), num_samples, rows, options, seed, generator)

    def nest(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x.squeeze(0), offsets["q"], jagged_dim=2)

    if indices is not None:
        visible = check_visible(1, out.shape[2], packed[1].shape[-2], out.device, **rows)
        indices = nest(visible.places(indices))
    return nest(out), indices


def _jagged(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """[1, C, T, F] of a nested [B, C, j, F] or [1, T, F] of a nested [B, j, F], and its offsets."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, as the others are")
    nested: Any = x
    if nested._ragged_idx != x.dim() - 2 or nested.lengths() is not None:
        raise ValueError(
            f"{name} must be ragged in its next to last dimension and without holes, got {x.shape}"
        )
    return nested.values().unsqueeze(0), nested.offsets()


@overload
def smart_bird_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_indices: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def smart_bird_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_indices: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def smart_bird_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_indices: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def smart_bird_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_indices: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`smart_bird_attention` of packed sequences, in the layout of flash_attn_varlen_func.

    Args:
        q: [T_q, H, D], floating point.
        k: [T_k, H_kv, D], dtype of ``q``.
        v: [T_k, H_kv, Dv], dtype of ``q``.
        q_sketch: [T_q, S] or [T_q, H_s, S].
        k_sketch: [T_k, S] or [T_k, H_ks, S].
        num_samples: K.
        cu_seqlens_q, cu_seqlens_k: int32 [n + 1] from 0, where each sequence begins and ends.
        return_indices: also return the sampled keys.
        options: the other keywords of :func:`smart_bird_attention`; query_offset and sequence_ids
            are those of n sequences, masks are [1, T_k].

    Returns:
        [T_q, H, Dv]; with ``return_indices`` also the indices, int32 [H_i, T_q, K], rows of ``k``.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    check_keywords("smart_bird_attention_varlen", options, _VARLEN_OPTIONS)
    named = {"q": q, "k": k, "v": v, "q_sketch": q_sketch, "k_sketch": k_sketch}
    for name, x in named.items():
        check_floats(name, x, (2, 3) if name.endswith("sketch") else (3,))
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be [T_k, H_kv, D] with D of q {shape_of(q)}, got {shape_of(k)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must be [T_k, H_kv, Dv] with T_k and H_kv of k {shape_of(k)}, got {shape_of(v)}"
        )
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is None:
            raise TypeError(f"{name} must be an int32 Tensor, got NoneType")
    # Rows of one head side by side are faster to gather.
    q, k, v, q_sketch, k_sketch = (
        x.unsqueeze(0) if x.dim() == 2 else x.transpose(0, 1).contiguous().unsqueeze(0)
        for x in named.values()
    )
    result = smart_bird_attention(
        q,
        k,
        v,
        q_sketch,
        k_sketch,
        num_samples,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        return_indices=return_indices,
        **options,
    )
    out, indices = result if isinstance(result, tuple) else (result, None)
    out = out.squeeze(0).transpose(0, 1).contiguous()
    return out if indices is None else (out, indices.squeeze(0))


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` with the masks of :func:`smart_bird_attention`.

    Shapes and keywords are those of that function. An N x M mask is made of all but ``key_mask``
    alone and causal attention from the first key on. A row without a valid key gives zeros.
    """
    q, k, v = check_attention(q, k, v)
    visible = check_visible(
        q.shape[0],
        q.shape[2],
        k.shape[2],
        q.device,
        is_causal=is_causal,
        key_mask=key_mask,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return attend_densely(q, k, v, visible, dropout_p=dropout_p, scale=scale)


def attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`dense_attention` of checked tensors."""
    mask, is_causal = visible.dense_mask()
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask.unsqueeze(1),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def deal_keys(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    num_index_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    window: int = 0,
    num_sinks: int = 0,
    global_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """The keys with the largest sketch scores, dealt out over index heads by rank.

    The method ``"topk"`` gives every index head of a sketch the same keys. Here forced keys go to
    every head, and of the others the one of rank r (from 0; of equal scores the lower index first)
    goes to head ``r mod G`` of the sketch's G = H_i / H_s heads, until a head has K. Where a row is
    too short for that, a head that is left with empty places fills them with the keys of other
    heads, the highest ranks first, as far as there are any: every head has K distinct keys, or all
    of the row. No N x M tensor is made.

    Args:
        q_sketch: [B, N, S] or [B, H_s, N, S].
        k_sketch: [B, M, S] or [B, H_ks, M, S], dtype of ``q_sketch``.
        num_samples: K.
        num_index_heads: H_i, a multiple of H_s.
        is_causal, key_mask, window, num_sinks, global_mask: as in ``smartbird.ops.sketch_sample``.
        scale, query_offset, cu_seqlens_q, cu_seqlens_k: likewise.
        sequence_ids: as there; nothing is drawn here, so they change nothing.
        first_head: must be 0, as what a head is dealt depends on all heads of its sketch.

    Returns:
        int32 [B, H_i, N, K], ascending, -1 in unused places at the end. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    q_sketch, k_sketch = check_sketches(q_sketch, k_sketch)
    visible = check_visible(
        q_sketch.shape[0],
        q_sketch.shape[2],
        k_sketch.shape[2],
        q_sketch.device,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        global_mask=global_mask,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sequence_ids=sequence_ids,
        first_head=first_head,
    )
    return _deal(
        q_sketch,
        k_sketch,
        check_num_samples(num_samples, visible),
        visible,
        check_index_heads(num_index_heads, q_sketch.shape[1]),
        check_scale("scale", scale, q_sketch.shape[3]),
    )


def _deal(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    visible: Visible,
    num_index_heads: int,
    scale: float,
) -> Tensor:
    if visible.first_head != 0:
        raise ValueError(
            "first_head must be 0 with the method 'dealt', which deals to all heads of a sketch at "
            f"once, got {visible.first_head}"
        )
    num_sketches = q_sketch.shape[1]
    group = num_index_heads // num_sketches
    best, _ = draw(
        q_sketch,
        k_sketch,
        num_samples * group,
        visible,
        num_index_heads=num_sketches,
        method="topk",
        scale=scale,
        seed=torch.zeros(2, dtype=torch.int64, device=q_sketch.device),
        need_log_inclusion=False,
    )
    forced = visible.forced_slots(best, num_samples)
    # In float32 at least, as topk chose them: rounded to 16 bits, different scores would tie.
    queries, keys = (
        x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (q_sketch, k_sketch)
    )
    with torch.autocast(best.device.type, enabled=False):
        scores = gather_scores(queries, keys, best, scale=scale)
    scores = scores.masked_fill(forced, torch.inf)
    ranked = best.gather(-1, scores.sort(dim=-1, descending=True, stable=True).indices)

    # All of [B, H_s, 1 or G, N, 1 or K]. Ranks and places are counted after the forced keys.
    forced, ranked = forced.unsqueeze(2), ranked.unsqueeze(2)
    num_forced = forced.sum(-1, keepdim=True, dtype=torch.int32)
    num_free = (ranked >= 0).sum(-1, keepdim=True, dtype=torch.int32) - num_forced
    head = torch.arange(group, dtype=torch.int32, device=best.device)[:, None, None]
    place = torch.arange(num_samples, dtype=torch.int32, device=best.device) - num_forced
    num_own = (num_free - head + group - 1) // group
    # The n-th rank that is not the head's own: n counts G - 1 in each round of G ranks.
    others = max(group - 1, 1)
    full_rounds = (place - num_own) // others
    turn = place - num_own - full_rounds * others
    rank = torch.where(
        place < num_own,
        place * group + head,
        full_rounds * group + turn + (turn >= head),
    )
    rank = num_forced + torch.where(place < 0, place, rank)
    rank = rank.clamp(0, ranked.shape[-1] - 1).long()
    keys_of_heads = ranked.expand(-1, -1, group, -1, -1).gather(-1, rank).flatten(1, 2)
    dealt = (place < num_free).expand(-1, -1, group, -1, -1).flatten(1, 2)
    return ascending(keys_of_heads, dealt, visible.num_keys)


def add_uniform_keys(
    indices: Tensor,
    num_keys: int,
    count: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_head: int = 0,
    seed: Tensor | None = None,
) -> Tensor:
    """``indices`` and ``count`` more keys per row and index head, any valid one as likely.

    The new keys of a row are distinct. One that the row holds already is dropped, so that it counts
    no more than before, and leaves its place empty.

    Args:
        indices: int32 [B, H_i, N, K], ascending, -1 in unused places at the end.
        num_keys: M.
        count: keys to add, at least 1.
        is_causal, key_mask, query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: as
            in ``smartbird.ops.sketch_sample``.
        seed: int64 [2], another than that of ``indices``. None: drawn from PyTorch's global
            generator.

    Returns:
        int32 [B, H_i, N, K + count], ascending, -1 in unused places at the end.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    check_indices(indices)
    visible = check_visible(
        indices.shape[0],
        indices.shape[2],
        check_count("num_keys", num_keys, 0),
        indices.device,
        is_causal=is_causal,
        key_mask=key_mask,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sequence_ids=sequence_ids,
        first_head=first_head,
    )
    count = check_count("count", count, 1)
    return _add_uniform(indices, count, visible, check_seed(seed, indices.device))


def _add_uniform(indices: Tensor, count: int, visible: Visible, seed: Tensor) -> Tensor:
    num_keys, num_samples = visible.num_keys, indices.shape[3]
    # A sketch of zeros gives every key the same chance.
    queries, keys = (
        torch.zeros(visible.batch, 1, length, 1, device=indices.device)
        for length in (visible.num_queries, num_keys)
    )
    added, _ = draw(
        queries,
        keys,
        count,
        visible.free(),
        num_index_heads=indices.shape[1],
        method="gumbel",
        scale=1.0,
        seed=seed,
        need_log_inclusion=False,
    )
    held = indices.masked_fill(indices < 0, num_keys)
    place = torch.searchsorted(held, added).clamp(max=num_samples - 1)
    new = (added >= 0) & (held.gather(-1, place) != added)
    valid = torch.cat([indices >= 0, new], dim=-1)
    return ascending(torch.cat([indices, added], dim=-1), valid, num_keys)

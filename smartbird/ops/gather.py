"""gather_scores and gather_attention: what a query does with the keys it has."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from smartbird._checks import (
    FLOATS,
    autocast,
    check_attention,
    check_dropout,
    check_flag,
    check_heads,
    check_indices,
    check_scale,
    check_seed,
    kind_of,
    shape_of,
)
from smartbird._visible import Visible, check_visible
from smartbird.ops._call import (
    OPS,
    acc_dtype,
    call,
    refuse_gradient,
    register_autograd,
    register_fake,
    register_flops,
    save,
    saved,
)


def gather_scores(q: Tensor, k: Tensor, indices: Tensor, *, scale: float | None = None) -> Tensor:
    """Scores ``q_i . k_j * scale`` of the indexed pairs only.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        indices: int32 [B, H_i, N, K] in [-1, M), -1 = no key, H a multiple of H_i.
        scale: None: ``D ** -0.5``.

    Returns:
        [B, H, N, K] in the dtype of ``q``, -inf where the index is -1. Differentiable in q, k.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k = autocast(q, k)
    check_heads(q, k)
    check_indices(indices, q)
    scale = check_scale("scale", scale, q.shape[3])
    scores: Tensor = call(OPS.gather_scores.default, q, k, indices, scale)
    return scores


@overload
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    query_offset: int | Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    sequence_ids: Tensor | None = ...,
    first_head: int = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    query_offset: int | Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    sequence_ids: Tensor | None = ...,
    first_head: int = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    query_offset: int | Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    sequence_ids: Tensor | None = ...,
    first_head: int = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_head: int = 0,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over its indexed keys: step 3 of Smart Bird.

    ``out_i = sum_j softmax_j(q_i . k_j * scale + bias_ij) v_j`` over the slots of ``indices`` that
    hold a key. A key that is indexed twice counts twice. A row without a key gives zeros,
    lse = -inf and zero gradients.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        v: [B, H_kv, M, Dv], dtype of ``q``.
        indices: int32 [B, H_i, N, K] in [-1, M), -1 = no key, H a multiple of H_i.
        bias: floating point, added to the scaled scores: broadcastable to [B, H, N, K], or one for
            each index head, [B, H_i, N, K].
        scale: None: ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        query_offset, cu_seqlens_q, sequence_ids, first_head: as in :func:`sketch_sample`, for
            dropout only, which is drawn by who a row is. Packed queries without a query_offset
            count their positions from 0. (first_head counts index heads.)
        seed: int64 [2], for dropout only.
        generator: source of a seed that is not given.
        return_lse: also return the log-sum-exp of each row's logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; with ``return_lse`` also lse [B, H, N], float32
        (float64 for float64). Differentiable in q, k, v and bias; dropout is replayed, not stored.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k, v = check_attention(q, k, v)
    check_indices(indices, q)
    if bias is not None:
        bias = _expand_bias(bias, q, indices)
    dropout_p = check_dropout(dropout_p)
    # As the kernel has it: nothing is known of packed keys, so they are taken to be the queries.
    num_keys = k.shape[2] if cu_seqlens_q is None else q.shape[2]
    visible = check_visible(
        q.shape[0],
        q.shape[2],
        num_keys,
        q.device,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_q,
        sequence_ids=sequence_ids,
        first_head=first_head,
    )
    out, lse = attend_to(
        q,
        k,
        v,
        indices,
        visible,
        bias=bias,
        scale=check_scale("scale", scale, q.shape[3]),
        dropout_p=dropout_p,
        seed=check_seed(seed, q.device, generator) if dropout_p > 0 else None,
    )
    return (out, lse) if check_flag("return_lse", return_lse) else out


def attend_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    visible: Visible,
    *,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_attention` of checked arguments; the seed is read with dropout only."""
    dropout = dropout_arguments(visible, dropout_p, seed)
    out, lse = call(OPS.gather_attention.default, q, k, v, indices, bias, scale, *dropout)
    return out, lse


def dropout_arguments(visible: Visible, dropout_p: float, seed: Tensor | None) -> tuple[Any, ...]:
    """What the ops take for dropout: dropout_p, seed and who the rows are."""
    if dropout_p > 0:
        return (dropout_p, seed, *visible.dropout())
    return (0.0, None, None, None, None, None, 0)


def _expand_bias(bias: Tensor, q: Tensor, indices: Tensor) -> Tensor:
    """bias as [B, H, N, K] or, one for each index head, [B, H_i, N, K], in q's accumulation type"""
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        raise TypeError(f"bias must be a floating point Tensor, got {kind_of(bias)}")
    num_index_heads = indices.shape[1]
    per_index_head = bias.dim() >= 3 and bias.shape[-3] == num_index_heads
    heads = num_index_heads if per_index_head else q.shape[1]
    shape = (q.shape[0], heads, q.shape[2], indices.shape[3])
    fits = bias.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(bias.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias must be broadcastable to [B, H, N, K] = {[*q.shape[:3], indices.shape[3]]} "
            f"or [B, H_i, N, K] with H_i = {num_index_heads}, got {shape_of(bias)}"
        )
    if bias.device != q.device:
        raise ValueError(f"bias must be on {q.device}, got {bias.device}")
    return bias.to(acc_dtype(q)).expand(shape)


# ---- fake kernels -------------------------------------------------------------------------------


@register_fake("gather_scores")
def _(q: Tensor, k: Tensor, indices: Tensor, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:3], indices.shape[3]))


@register_fake("gather_scores_backward")
def _(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@register_fake("gather_attention")
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


@register_fake("gather_attention_backward")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    query_offset: int | None,
    positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    sequence_ids: Tensor | None,
    first_head: int,
    need_dqk: bool,
    need_dv: bool,
    need_dbias: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_dqk else (0,)),
        q.new_empty(k.shape if need_dqk else (0,)),
        q.new_empty(v.shape if need_dv else (0,)),
        q.new_empty((*q.shape[:3], indices.shape[3]) if need_dbias else (0,), dtype=acc_dtype(q)),
    )


# ---- gradients ----------------------------------------------------------------------------------


def _save_gather_scores(ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, *inputs)


def _gather_scores_backward(ctx: Any, dscores: Tensor) -> Any:
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk = OPS.gather_scores_backward(dscores, *saved(ctx), deterministic)
    return dq, dk, None, None


def _save_gather_attention(ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, *inputs)
    ctx.set_materialize_grads(False)


def _gather_attention_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    q, k, v, indices, bias, scale, *dropout = saved(ctx)
    need_dq, need_dk, need_dv, _, need_dbias = ctx.needs_input_grad[:5]
    dq, dk, dv, dbias = OPS.gather_attention_backward(
        q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout,
        dlse,
        q,
        k,
        v,
        indices,
        bias,
        scale,
        *dropout,
        need_dq or need_dk,
        need_dv,
        need_dbias,
        torch.are_deterministic_algorithms_enabled(),
    )
    if need_dbias and bias.shape[1] != q.shape[1]:
        dbias = dbias.unflatten(1, (bias.shape[1], -1)).sum(2)
    return (
        dq if need_dq else None,
        dk if need_dk else None,
        dv if need_dv else None,
        None,
        dbias if need_dbias else None,
        *[None] * 8,
    )


register_autograd("gather_scores", _gather_scores_backward, _save_gather_scores)
register_autograd("gather_attention", _gather_attention_backward, _save_gather_attention)
register_autograd("gather_scores_backward", refuse_gradient)
register_autograd("gather_attention_backward", refuse_gradient)


# ---- floating point operations ------------------------------------------------------------------


def gathered_pairs(q: Tensor, indices: Tensor) -> int:
    """Query-key pairs, summed over the heads of q [B, H, N, D]."""
    return q.shape[:3].numel() * indices.shape[3]


@register_flops("gather_scores")
def _(q: Tensor, k: Tensor, indices: Tensor, *_: Any) -> int:
    return 2 * gathered_pairs(q, indices) * q.shape[3]


@register_flops("gather_scores_backward")
def _(dscores: Tensor, q: Tensor, k: Tensor, indices: Tensor, *_: Any) -> int:
    return 4 * gathered_pairs(q, indices) * q.shape[3]


@register_flops("gather_attention")
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *_: Any) -> int:
    return 2 * gathered_pairs(q, indices) * (q.shape[3] + v.shape[3])


@register_flops("gather_attention_backward")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *_: Any,
) -> int:
    # scores, dq and dk of D features; the gradient of the weights and dv of Dv.
    return 2 * gathered_pairs(q, indices) * (3 * q.shape[3] + 2 * v.shape[3])

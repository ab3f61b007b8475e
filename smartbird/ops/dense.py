"""sketch_lse and summed_attention: softmax over all free keys, streamed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartbird._checks import can_look, check_scale, check_sketches, check_tensor, kind_of
from smartbird._visible import Visible, check_visible
from smartbird.ops._call import (
    OPS,
    acc_dtype,
    call,
    pairs,
    refuse_gradient,
    register_autograd,
    register_fake,
    register_flops,
    save,
    saved,
)


def sketch_lse(
    q_sketch: Tensor,
    k_sketch: Tensor,
    *,
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
    rows: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of each row's sketch scores over its free keys; streamed, no N x M tensor.

    Free keys are the valid ones that the row is not forced to hold: with ``window``, ``num_sinks``
    and ``global_mask`` left at their defaults, all of them.

    Args:
        q_sketch: [B, N, S] or [B, H_s, N, S].
        k_sketch: [B, M, S] or [B, H_ks, M, S], dtype of ``q_sketch``, H_s a multiple of H_ks.
        scale: factor of the scores; None: ``S ** -0.5``.
        is_causal, key_mask, window, num_sinks, global_mask: as in :func:`sketch_sample`.
        query_offset, cu_seqlens_q, cu_seqlens_k: likewise.
        sequence_ids, first_head: as there; nothing is drawn here, so they change nothing.
        rows: int64 [R], the queries to look at, of every batch element; None: all.

    Returns:
        [B, N], or [B, H_s, N] of 4-D sketches, with R in the place of N where ``rows`` are given:
        float32 (float64 for float64), -inf for a row without a free key. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    one_sketch = isinstance(q_sketch, Tensor) and q_sketch.dim() == 3
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
    ).residual()
    scale = check_scale("scale", scale, q_sketch.shape[3])
    if rows is None:
        lse = log_sum_exp(q_sketch, k_sketch, visible, scale)
    else:
        check_rows(rows, visible)
        ascending, place = rows.sort()
        chosen = q_sketch.index_select(2, ascending)
        lse = log_sum_exp(chosen, k_sketch, visible.at_rows(ascending), scale)
        lse = lse.index_select(2, place.argsort())
    return lse.squeeze(1) if one_sketch else lse


def log_sum_exp(q_sketch: Tensor, k_sketch: Tensor, visible: Visible, scale: float) -> Tensor:
    """:func:`sketch_lse` of checked arguments: [B, H_s, N]."""
    lse: Tensor = call(OPS.sketch_lse.default, q_sketch, k_sketch, scale, *visible.dense())
    return lse


def check_rows(rows: Tensor, visible: Visible) -> None:
    """int64 [R] in [0, N)."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows must be an int64 Tensor, got {kind_of(rows)}")
    if rows.dim() != 1:
        raise ValueError(f"rows must be [R], got {list(rows.shape)}")
    check_tensor("rows", rows, torch.int64, rows.shape, "[R]", visible.device)
    if rows.numel() > 0 and can_look(rows):
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= visible.num_queries:
            raise ValueError(
                f"rows must be in [0, N) = [0, {visible.num_queries}), got {least} to {most}"
            )


# ---- fake kernels -------------------------------------------------------------------------------


@register_fake("sketch_lse")
def _(q_sketch: Tensor, k_sketch: Tensor, *_: Any) -> Tensor:
    return q_sketch.new_empty(q_sketch.shape[:3], dtype=acc_dtype(q_sketch))


@register_fake("sketch_lse_backward")
def _(dlse: Tensor, q_sketch: Tensor, k_sketch: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(q_sketch)
    return (
        q_sketch.new_empty(q_sketch.shape, dtype=dtype),
        k_sketch.new_empty(k_sketch.shape, dtype=dtype),
    )


@register_fake("summed_attention")
def _(q: Tensor, k: Tensor, v: Tensor, num_sums: int, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(q)
    out = q.new_empty((q.shape[0], num_sums, q.shape[2], v.shape[3]), dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=dtype)


@register_fake("summed_attention_backward")
def _(dout: Tensor, q: Tensor, k: Tensor, lse: Tensor, num_values: int, *_: Any) -> Tensor:
    shape = (q.shape[0], num_values, k.shape[2], dout.shape[3])
    return q.new_empty(shape, dtype=acc_dtype(q))


# ---- gradients ----------------------------------------------------------------------------------


def _save_sketch_lse(ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, output, *inputs)


def _sketch_lse_backward(ctx: Any, dlse: Tensor) -> Any:
    lse, q_sketch, k_sketch, scale, *rows = saved(ctx)
    dlse = dlse.masked_fill(lse == -torch.inf, 0)
    expected_key, weighted_query = OPS.sketch_lse_backward(
        dlse, q_sketch, k_sketch, lse, scale, *rows
    )
    dq = (expected_key * (dlse * scale).unsqueeze(-1)).to(q_sketch.dtype)
    dk = (weighted_query * scale).to(k_sketch.dtype)
    return dq, dk, *[None] * 8


def _save_summed_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, _, *rest = inputs
    ctx.v_dtype = v.dtype
    save(ctx, q, k, output[1], v.shape[1], *rest)


def _summed_attention_backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
    dv = OPS.summed_attention_backward(dout, *saved(ctx))
    return None, None, dv.to(ctx.v_dtype), *[None] * 9


register_autograd("sketch_lse", _sketch_lse_backward, _save_sketch_lse)
register_autograd("summed_attention", _summed_attention_backward, _save_summed_attention)
register_autograd("sketch_lse_backward", refuse_gradient)
register_autograd("summed_attention_backward", refuse_gradient)


# ---- floating point operations ------------------------------------------------------------------


@register_flops("sketch_lse")
def _(q_sketch: Tensor, k_sketch: Tensor, scale: float, *rows: Any) -> int:
    return 2 * pairs(q_sketch, k_sketch, *rows[5:7]) * q_sketch.shape[3]


@register_flops("sketch_lse_backward")
def _(
    dlse: Tensor, q_sketch: Tensor, k_sketch: Tensor, lse: Tensor, scale: float, *rows: Any
) -> int:
    return 6 * pairs(q_sketch, k_sketch, *rows[5:7]) * q_sketch.shape[3]


@register_flops("summed_attention")
def _(q: Tensor, k: Tensor, v: Tensor, num_sums: int, scale: float, *rows: Any) -> int:
    return 2 * pairs(q, k, *rows[5:7]) * (q.shape[3] + v.shape[3])


@register_flops("summed_attention_backward")
def _(
    dout: Tensor, q: Tensor, k: Tensor, lse: Tensor, num_values: int, scale: float, *rows: Any
) -> int:
    return 2 * pairs(q, k, *rows[5:7]) * (q.shape[3] + dout.shape[3])

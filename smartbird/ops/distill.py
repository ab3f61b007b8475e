"""distill_loss: how the sketch learns what attention does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smartbird._checks import (
    autocast,
    check_floats,
    check_heads,
    check_indices,
    check_same_tokens,
    check_scale,
    check_sketches,
    check_tensor,
)
from smartbird._visible import Visible, check_visible
from smartbird.ops._call import (
    OPS,
    acc_dtype,
    call,
    constants,
    pairs,
    refuse_gradient,
    register_autograd,
    register_fake,
    register_flops,
    save,
    saved,
)
from smartbird.ops.dense import check_rows, log_sum_exp


def distill_loss(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    *,
    indices: Tensor | None = None,
    log_inclusion: Tensor | None = None,
    scale: float | None = None,
    sketch_scale: float | None = None,
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
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the sketch against what attention does: how the sketch learns.

    Of a row and a sketch it is ``-sum_j t_j log p_j`` over the row's free keys, the valid ones that
    it is not forced to hold. p is the softmax of the scaled sketch scores over **all** free keys,
    and t, a constant, the mean of the attention probabilities over the heads of the sketch:

    - ``indices=None``: softmax over all free keys, streamed (O(N M D) work, no N x M tensor);
    - with ``indices``: softmax over each head's own sampled entries that are free, of the logits
      minus ``log_inclusion`` where given; duplicates add up. O(N K D) work beside p's O(N M S).

    As ``sum_j t_ij s_ij = sketch_scale q_sketch_i . (sum_j t_ij k_sketch_j)``, t itself is never
    made: attention with the key sketches as values gives the sum.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``.
        q_sketch: [B, N, S], or [B, H_s, N, S], one for each group of H / H_s heads; dtype of ``q``.
        k_sketch: [B, M, S], or [B, H_ks, M, S] with H_ks a divisor of H_s; dtype of ``q``.
        indices: int32 [B, H_i, N, K], H_i a multiple of H_s: see :func:`sketch_sample`.
        log_inclusion: float32 [B, H_i, N, K]; needs ``indices``.
        scale: of the attention logits; None: ``D ** -0.5``.
        sketch_scale: of the sketch scores; None: ``S ** -0.5``.
        is_causal, key_mask, window, num_sinks, global_mask: as in :func:`sketch_sample`.
        query_offset, cu_seqlens_q, cu_seqlens_k: likewise.
        sequence_ids, first_head: as there; nothing is drawn here, so they change nothing.
        rows: int64 [R], the queries to judge, of every batch element; None: all. Work falls as R.
        reduction: "mean" over rows with a free key and over sketches, or their "sum".

    Returns:
        scalar, float32 (float64 for float64); 0 where no row has a free key. Differentiable in
        q_sketch and k_sketch only.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k, q_sketch, k_sketch = autocast(q, k, q_sketch, k_sketch)
    check_heads(q, k)
    check_floats("q_sketch", q_sketch, (3, 4), q)
    q_sketch, k_sketch = check_sketches(q_sketch, k_sketch)
    check_same_tokens(q_sketch, k_sketch, q, k)
    visible = check_visible(
        q.shape[0],
        q.shape[2],
        k.shape[2],
        q.device,
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
    return distill(
        q,
        k,
        q_sketch,
        k_sketch,
        visible,
        indices=indices,
        log_inclusion=log_inclusion,
        scale=scale,
        sketch_scale=sketch_scale,
        rows=rows,
        reduction=reduction,
    )


def distill(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    visible: Visible,
    *,
    indices: Tensor | None = None,
    log_inclusion: Tensor | None = None,
    scale: float | None = None,
    sketch_scale: float | None = None,
    rows: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`distill_loss` of checked tensors, sketches [B, H_s, N, S] and [B, H_ks, M, S]."""
    num_sketches = q_sketch.shape[1]
    if q.shape[1] % num_sketches:
        raise ValueError(
            f"the heads of q must be a multiple of the sketches of q_sketch, {num_sketches}, "
            f"got {q.shape[1]}"
        )
    scale = check_scale("scale", scale, q.shape[3])
    sketch_scale = check_scale("sketch_scale", sketch_scale, q_sketch.shape[3])
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if indices is not None:
        check_indices(indices, q)
        if indices.shape[1] % num_sketches:
            raise ValueError(
                "the heads of indices must be a multiple of the sketches of q_sketch, "
                f"{num_sketches}, got {indices.shape[1]}"
            )
    if log_inclusion is not None:
        if indices is None:
            raise ValueError("log_inclusion must be None where indices is None")
        check_tensor(
            "log_inclusion",
            log_inclusion,
            torch.float32,
            indices.shape,
            "[B, H_i, N, K] of indices",
            q.device,
        )
    visible = visible.residual()
    if rows is not None:
        check_rows(rows, visible)
        rows = rows.sort().values
        visible = visible.at_rows(rows)
        q, q_sketch = q.index_select(2, rows), q_sketch.index_select(2, rows)
        indices = None if indices is None else indices.index_select(2, rows)
        log_inclusion = None if log_inclusion is None else log_inclusion.index_select(2, rows)

    mean = reduction == "mean"
    if indices is not None:
        op = OPS.sampled_distill.default
        q, k = constants(op, q, k)
        loss: Tensor = call(
            op,
            q,
            k,
            q_sketch,
            k_sketch,
            indices,
            None if log_inclusion is None else -log_inclusion.to(acc_dtype(q)),
            scale,
            sketch_scale,
            *visible.dense(),
            mean,
            # Where autograd is seen to need them, gradients come at little cost with the loss.
            torch.is_grad_enabled() and (q_sketch.requires_grad or k_sketch.requires_grad),
        )[0]
        return loss
    op = OPS.summed_attention.default
    q, k = constants(op, q, k)
    lse = log_sum_exp(q_sketch, k_sketch, visible, sketch_scale)
    summed, _ = call(op, q, k, k_sketch, num_sketches, scale, *visible.dense())
    agreement = (q_sketch.to(summed.dtype) * summed).sum(-1)
    agreement = agreement * (sketch_scale * num_sketches / q.shape[1])
    judged = lse != -torch.inf
    loss = (lse - agreement).masked_fill(~judged, 0).sum()
    return loss / judged.sum().clamp(min=1) if mean else loss


# ---- the op on sampled keys ---------------------------------------------------------------------


@register_fake("sampled_distill")
def _(
    q: Tensor, k: Tensor, q_sketch: Tensor, k_sketch: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_grads = options
    dtype = acc_dtype(q)
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty(q_sketch.shape if need_grads else (0,), dtype=dtype),
        q.new_empty(k_sketch.shape if need_grads else (0,), dtype=dtype),
    )


def _free_entries(indices: Tensor, visible: Visible) -> Tensor:
    """The entries that are free keys of their rows, else -1; those out of range as they are."""
    last = max(visible.num_keys - 1, 0)
    taken = (indices <= last) & ~visible.free_slots(indices.clamp(max=last))
    return indices.masked_fill(taken & (indices >= 0), -1)


def compose_sampled_distill(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    sketch_scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
    window: int,
    query_offset: int | None,
    positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mean: bool,
    need_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``sampled_distill`` made of the other ops, for devices without a kernel of its own.

    ``sum_j t_ij k_sketch_j`` is attention with the key sketches as values, and the gradient of the
    key sketches that of the values.
    """
    acc = acc_dtype(q)
    num_heads, num_sketches, num_key_sketches = q.shape[1], q_sketch.shape[1], k_sketch.shape[1]
    visible = Visible(
        *(is_causal, key_mask, window, 0, None, query_offset, positions),
        *(cu_seqlens_q, cu_seqlens_k, None, 0),
        *(q.shape[0], q.shape[2], k.shape[2], q.device),
    )
    lse = OPS.sketch_lse(q_sketch, k_sketch, sketch_scale, *visible.dense())
    judged = lse != -torch.inf
    row_weight = judged.to(acc)
    if mean:
        row_weight = row_weight / judged.sum().clamp(min=1)
    # In the accumulation type: the loss is a difference of sums that 8 bits would not hold.
    shared = math.lcm(k.shape[1], num_key_sketches)  # heads of keys that have a sketch each
    attention = (
        q.to(acc),
        _expand_heads(k.to(acc), shared),
        _expand_heads(k_sketch.to(acc), shared),
        _free_entries(indices, visible),
        bias,
        scale,
        *(0.0, None, None, None, None, None, 0),
    )
    per_head, head_lse = OPS.gather_attention(*attention)
    by_sketch = (num_sketches, num_heads // num_sketches)
    target = torch.unflatten(per_head, 1, by_sketch).mean(2)
    mass = torch.unflatten((head_lse != -torch.inf).to(acc), 1, by_sketch).mean(2)
    query = q_sketch.to(acc).masked_fill(~judged.unsqueeze(-1), 0)
    agreement = sketch_scale * (query * target).sum(-1)
    loss = (row_weight * (mass * lse.masked_fill(~judged, 0) - agreement)).sum()
    if not need_grads:
        return loss, q.new_empty(0, dtype=acc), q.new_empty(0, dtype=acc)
    dlse = row_weight * mass
    expected_key, weighted_query = OPS.sketch_lse_backward(
        dlse, q_sketch, k_sketch, lse, sketch_scale, *visible.dense()
    )
    dout = query * (row_weight / by_sketch[1]).unsqueeze(-1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    dvalues = OPS.gather_attention_backward(
        _expand_heads(dout, num_heads), None, *attention, False, True, False, deterministic
    )[2]
    dq = expected_key * dlse.unsqueeze(-1) - target * row_weight.unsqueeze(-1)
    dk = weighted_query - torch.unflatten(dvalues, 1, (num_key_sketches, -1)).sum(2)
    return loss, dq * sketch_scale, dk * sketch_scale


def _expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, H_x, ...] to [B, H, ...]: head h has that of h // (H / H_x)."""
    groups = (-1, -1, num_heads // x.shape[1], *[-1] * (x.dim() - 2))
    return x.unsqueeze(2).expand(groups).flatten(1, 2)


torch.library.impl("smartbird::sampled_distill", "CUDA")(compose_sampled_distill)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *arguments, need_grads = inputs
    _, dq, dk = output
    ctx.mark_non_differentiable(dq, dk)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[2].dtype
    ctx.has_grads = need_grads
    save(ctx, *((dq, dk) if need_grads else arguments))


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
    if torch.is_grad_enabled():  # of create_graph=True
        refuse_gradient(ctx)
    gradients: list[Tensor | None] = [None, None]
    if dloss is not None:
        dq, dk = saved(ctx) if ctx.has_grads else OPS.sampled_distill(*saved(ctx), True)[1:]
        gradients = [(gradient * dloss).to(ctx.dtype) for gradient in (dq, dk)]
    return None, None, *gradients, *[None] * 13


register_autograd("sampled_distill", _backward, _save)


@register_flops("sampled_distill")
def _(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    sketch_scale: float,
    *options: Any,
) -> int:
    *rows, _, need_grads = options
    sketch_dim = q_sketch.shape[3]
    normaliser = pairs(q_sketch, k_sketch, *rows[5:7]) * sketch_dim
    attended = q.shape[:3].numel() * indices.shape[3]
    if need_grads:
        return 2 * (3 * normaliser + attended * (q.shape[3] + 2 * sketch_dim))
    return 2 * (normaliser + attended * (q.shape[3] + sketch_dim))

"""sampled_attention: sketch_sample and gather_attention in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartbird._visible import Visible
from smartbird.ops._call import (
    OPS,
    acc_dtype,
    call,
    pairs,
    register_autograd,
    register_fake,
    register_flops,
    save,
    saved,
)


def sampled_attention(
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
    correction: bool,
    scale: float,
    sketch_scale: float,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """Attention over drawn keys, of checked arguments.

    The result is that of the two ops with the same seed, to the last bit, but on a CPU indices
    exist for a block of queries at a time only. The backward pass draws them again, all at once:
    where there will be one, the two ops are faster.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``. Differentiable in q, k and v.
    """
    out: Tensor = call(
        OPS.sampled_attention.default,
        q,
        k,
        v,
        q_sketch,
        k_sketch,
        num_samples,
        num_index_heads,
        method,
        correction,
        scale,
        sketch_scale,
        *visible.sampling(),
        dropout_p,
        seed,
    )
    return out


@register_fake("sampled_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, *inputs)


def _backward(ctx: Any, dout: Tensor) -> Any:
    q, k, v, q_sketch, k_sketch, num_samples, *rest = saved(ctx)
    num_index_heads, method, correction, scale, sketch_scale, *rows, dropout_p, seed = rest
    indices, log_inclusion = OPS.sketch_sample(
        q_sketch.detach(),
        k_sketch.detach(),
        num_samples,
        num_index_heads,
        method,
        sketch_scale,
        *rows,
        seed,
        correction,
    )
    fields: Any = (*rows, q.shape[0], q.shape[2], k.shape[2], q.device)
    visible = Visible(*fields)
    need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
    dq, dk, dv, _ = OPS.gather_attention_backward(
        dout,
        None,
        q,
        k,
        v,
        indices,
        -log_inclusion.to(acc_dtype(q)) if correction else None,
        scale,
        dropout_p,
        seed,
        *visible.dropout(),
        need_dq or need_dk,
        need_dv,
        False,
        torch.are_deterministic_algorithms_enabled(),
    )
    gradients = (dq if need_dq else None, dk if need_dk else None, dv if need_dv else None)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 3)


register_autograd("sampled_attention", _backward, _save)


@register_flops("sampled_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *options: Any,
) -> int:
    _, _, _, _, _, *rows, _, _ = options
    drawing = pairs(q_sketch, k_sketch, *rows[7:9]) * q_sketch.shape[3]
    attending = q.shape[:3].numel() * num_samples * (q.shape[3] + v.shape[3])
    return 2 * (drawing + attending)

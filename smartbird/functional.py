"""Attention as functions: the sampled one, and the dense one it stands in for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird import ops
from smartbird.ops import check_key_mask

__all__ = [
    "dense_attention",
    "needs_grad",
    "sample_keys",
    "smart_bird_attention",
]


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

    Args:
        q: [B, H, N, D], floating point.
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        v: [B, H_kv, M, Dv], dtype of ``q``.
        q_sketch: [B, N, S]. Drawing has no gradient; ``smartbird.ops.distill_loss`` has.
        k_sketch: [B, M, S].
        num_samples: K, the number of keys per query and index head.
        num_index_heads: H_i, how many sets of keys a query draws; divides H. None: H.
        method: ``"gumbel"``, ``"systematic"``, ``"multinomial"`` or ``"topk"``.
        correction: subtract ``log_inclusion`` from the logits, which makes the result the
            self-normalised Horvitz-Thompson estimate of dense attention.
        is_causal: key j is seen by query i if ``j <= i + (M - N)``.
        key_mask: bool [B, M], True where a key may be attended.
        window: keys nearest the query that are always among its K.
        num_sinks: leading valid keys that are always among the K.
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
    ops.check_same_tokens(q_sketch, k_sketch, q, k)
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise ValueError(f"q must be a Tensor [B, H, N, D], got {getattr(q, 'shape', type(q))}")
    if num_index_heads is None:
        num_index_heads = q.shape[1]
    ops.check_index_heads(num_index_heads, q)
    if seed is None:
        seed = ops.draw_seed(q.device, generator)
    sampling: dict[str, Any] = {
        "correction": correction,
        "num_index_heads": num_index_heads,
        "method": method,
        "is_causal": is_causal,
        "key_mask": key_mask,
        "window": window,
        "num_sinks": num_sinks,
        "seed": seed,
    }
    if not return_indices and not needs_grad(q, k, v):
        return ops.sampled_attention(
            q,
            k,
            v,
            q_sketch,
            k_sketch,
            num_samples,
            scale=scale,
            sketch_scale=sketch_scale,
            dropout_p=dropout_p,
            **sampling,
        )
    indices, log_inclusion = sample_keys(
        q_sketch, k_sketch, num_samples, scale=sketch_scale, **sampling
    )
    out: Tensor = ops.gather_attention(
        q,
        k,
        v,
        indices,
        bias=None if log_inclusion is None else -log_inclusion,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )
    return (out, indices) if return_indices else out


def sample_keys(
    q_sketch: Tensor, k_sketch: Tensor, num_samples: int, *, correction: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """``smartbird.ops.sketch_sample``, with ``log_inclusion`` only where a correction needs it."""
    if correction:
        return ops.sketch_sample(q_sketch, k_sketch, num_samples, **options)
    return ops.sample_indices(q_sketch, k_sketch, num_samples, **options), None


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` with the masks of :func:`smart_bird_attention`.

    Causal is aligned at the bottom right, and ``key_mask`` is bool [B, M], True where a key may be
    attended; with both, or causal with N != M, an N x M mask is made. Shapes are those of
    :func:`smart_bird_attention`; a row without a valid key gives zeros.
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    mask = None
    if key_mask is not None:
        check_key_mask(key_mask, (k.shape[0], num_keys))
        mask = key_mask[:, None, None, :]
    if is_causal and (mask is not None or num_queries != num_keys):
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        causal = causal.tril(num_keys - num_queries)
        mask = causal if mask is None else mask & causal
        is_causal = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )

"""Attention as functions: the sampled one, and the dense one it stands in for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird import ops
from smartbird.ops import ascending, check_key_mask

__all__ = [
    "METHODS",
    "add_uniform_keys",
    "deal_keys",
    "dense_attention",
    "needs_grad",
    "sample_keys",
    "smart_bird_attention",
]

METHODS = (*ops.METHODS, "dealt")


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
        method: ``"gumbel"``, ``"systematic"``, ``"multinomial"`` or ``"topk"``, see
            ``smartbird.ops.sketch_sample``, or ``"dealt"``, see :func:`deal_keys`.
        correction: subtract ``log_inclusion`` from the logits, which makes the result the
            self-normalised Horvitz-Thompson estimate of dense attention. Of keys that are not
            drawn at random there is nothing to correct: ``"topk"``, ``"dealt"``.
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
    q, k, v = ops.autocast(q, k, v)
    q_sketch, k_sketch = ops.autocast(q_sketch, k_sketch)
    ops.check_attention(q, k, v)
    ops.check_sketches(q_sketch, k_sketch)
    ops.check_same_tokens(q_sketch, k_sketch, q, k)
    if num_index_heads is None:
        num_index_heads = q.shape[1]
    ops.check_index_heads(num_index_heads, q)
    ops.check_flag("correction", correction)
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
    if method != "dealt" and not return_indices and not needs_grad(q, k, v):
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
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    correction: bool,
    method: str = "gumbel",
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Indices by any of ``METHODS``, and ``log_inclusion`` only where a correction needs it.

    ``options`` are those of ``smartbird.ops.sketch_sample``.
    """
    if method == "dealt":
        return deal_keys(q_sketch, k_sketch, num_samples, **options), None
    options |= {"method": method, "seed": seed}
    if correction:
        return ops.sketch_sample(q_sketch, k_sketch, num_samples, **options)
    return ops.sample_indices(q_sketch, k_sketch, num_samples, **options), None


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
) -> Tensor:
    """The keys with the largest sketch scores, dealt out over index heads by rank.

    The method ``"topk"`` gives every index head the same keys. Here forced keys go to every head,
    and of the others the one of rank r (from 0; of equal scores the lower index first) goes to head
    ``r mod H_i``, until a head has K. Where a row is too short for that, a head that is left with
    empty places fills them with the keys of other heads, the highest ranks first, as far as there
    are any: every head has K distinct keys, or all of the row. No N x M tensor is made.

    Args:
        q_sketch: [B, N, S].
        k_sketch: [B, M, S], dtype of ``q_sketch``.
        num_samples: K.
        num_index_heads: H_i.
        scale, is_causal, key_mask, window, num_sinks: as in ``smartbird.ops.sketch_sample``.

    Returns:
        int32 [B, H_i, N, K], ascending, -1 in unused places at the end. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "key_mask": key_mask,
        "window": window,
        "num_sinks": num_sinks,
    }
    ops.check_count("num_samples", num_samples, 1)
    ops.check_count("num_index_heads", num_index_heads, 1)
    ops.check_room(num_samples, window, num_sinks, is_causal)
    q_sketch, k_sketch = ops.autocast(q_sketch, k_sketch)
    ops.check_sketches(q_sketch, k_sketch)
    q_sketch, k_sketch = q_sketch.detach(), k_sketch.detach()
    device, num_keys = k_sketch.device, k_sketch.shape[1]
    best = ops.sample_indices(
        q_sketch,
        k_sketch,
        num_samples * num_index_heads,
        method="topk",
        scale=scale,
        seed=torch.zeros(2, dtype=torch.int64, device=device),
        **options,
    )
    forced = _forced_keys(best, num_keys, **options)
    # In float32 at least, as topk chose them: rounded to 16 bits, different scores would tie.
    queries, key_rows = (
        x.unsqueeze(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (q_sketch, k_sketch)
    )
    with torch.autocast(device.type, enabled=False):
        scores = ops.gather_scores(queries, key_rows, best, scale=scale)
    scores = scores.masked_fill(forced, torch.inf)
    ranked = best.gather(-1, scores.sort(dim=-1, descending=True, stable=True).indices)

    # All of [B, 1 or H_i, N, 1 or K]. Ranks and places are counted after the forced keys.
    num_forced = forced.sum(-1, keepdim=True, dtype=torch.int32)
    num_free = (best >= 0).sum(-1, keepdim=True, dtype=torch.int32) - num_forced
    head = torch.arange(num_index_heads, dtype=torch.int32, device=device)[:, None, None]
    place = torch.arange(num_samples, dtype=torch.int32, device=device) - num_forced
    num_own = (num_free - head + num_index_heads - 1) // num_index_heads
    # The n-th rank that is not the head's own: n counts H_i - 1 in each round of H_i ranks.
    others = max(num_index_heads - 1, 1)
    full_rounds = (place - num_own) // others
    turn = place - num_own - full_rounds * others
    rank = torch.where(
        place < num_own,
        place * num_index_heads + head,
        full_rounds * num_index_heads + turn + (turn >= head),
    )
    rank = num_forced + torch.where(place < 0, place, rank)
    rank = rank.clamp(0, best.shape[-1] - 1).long()
    keys = ranked.expand(-1, num_index_heads, -1, -1).gather(-1, rank)
    return ascending(keys, place < num_free, num_keys)


def _forced_keys(
    indices: Tensor,
    num_keys: int,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    window: int,
    num_sinks: int,
) -> Tensor:
    """Which keys of ``indices`` [B, 1, N, K], valid ones or -1, window or sinks force."""
    num_queries = indices.shape[2]
    position = torch.arange(num_queries, device=indices.device) + (num_keys - num_queries)
    offset = indices - position[:, None]
    if is_causal:
        forced = (offset > -window) & (offset <= 0)
    else:
        forced = offset.abs() <= (window // 2 if window else -1)
    if key_mask is None:
        forced = forced | (indices < num_sinks)
    else:
        # How many valid keys there are up to and with each key; 0 for -1.
        order = F.pad(key_mask.cumsum(-1), (1, 0))
        order = order.gather(-1, indices.flatten(1).long() + 1).view(indices.shape)
        forced = forced | (order <= num_sinks)
    return forced & (indices >= 0)


def add_uniform_keys(
    indices: Tensor,
    num_keys: int,
    count: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """``indices`` and ``count`` more keys per row and index head, any valid one as likely.

    The new keys of a row are distinct. One that the row holds already is dropped, so that it counts
    no more than before, and leaves its place empty.

    Args:
        indices: int32 [B, H_i, N, K], ascending, -1 in unused places at the end.
        num_keys: M.
        count: keys to add, at least 1.
        is_causal: key j is seen by query i if ``j <= i + (M - N)``.
        key_mask: bool [B, M], True where a key may be attended.
        seed: int64 [2]. None: drawn from PyTorch's global generator.

    Returns:
        int32 [B, H_i, N, K + count], ascending, -1 in unused places at the end.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    ops.check_indices(indices)
    ops.check_count("num_keys", num_keys, 0)
    ops.check_count("count", count, 1)
    batch, num_index_heads, num_queries, num_samples = indices.shape
    # A sketch of zeros gives every key the same chance.
    added = ops.sample_indices(
        torch.zeros(batch, num_queries, 1, device=indices.device),
        torch.zeros(batch, num_keys, 1, device=indices.device),
        count,
        num_index_heads=num_index_heads,
        is_causal=is_causal,
        key_mask=key_mask,
        seed=seed,
    )
    held = indices.masked_fill(indices < 0, num_keys)
    place = torch.searchsorted(held, added).clamp(max=num_samples - 1)
    new = (added >= 0) & (held.gather(-1, place) != added)
    valid = torch.cat([indices >= 0, new], dim=-1)
    return ascending(torch.cat([indices, added], dim=-1), valid, num_keys)


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

"""The definition of every operation, in plain PyTorch.

These functions have the signatures of :mod:`smartbird.ops` and :mod:`smartbird.functional`, need no
compiled extension and allocate what the definition needs (N x M scores, gathered copies of keys).
They are meant to be read, and to be what the kernels are tested against. Both give the same
numbers; random draws follow the same law, from another stream.

Letters: B batch, N queries, M keys, H heads, H_kv key/value heads, H_i index heads, H_s sketches,
H_ks sketches of keys, D head dim, Dv value dim, S sketch dim, K samples, n packed sequences.
Arithmetic is float64 for float64 inputs and float32 for all others.

Which keys a row sees and holds, the same everywhere:

- Queries and keys are counted from the first of their sequence. Sequences are the batch elements
  or, with ``cu_seqlens_q`` and ``cu_seqlens_k``, int32 [n + 1], the parts [cu[s], cu[s + 1]) of one
  batch element. What lies beyond cu[n] sees nothing and is seen by nothing.
- Query i stands at position ``query_offset + i``: an int or int64 [B or n]; None: M - N.
- A key is *valid* for a row of its sequence if ``key_mask`` (bool [B, M]) is True there and, where
  ``is_causal``, it is at or before the position.
- Of a row's valid keys, *forced* are the first ``num_sinks``; those of the ``window``: at distances
  0 to window - 1 before the position if causal, else at most window // 2 around it; and those of
  ``global_mask`` (bool [B, M]), from the lowest on, as long as all forced keys are at most K.
- The valid keys that are not forced (by all of ``global_mask``) are *free*.

``sequence_ids`` (int64 [B or n]) and ``first_head`` say who the rows are. They choose which numbers
are drawn, not their law, and change nothing here.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The two uses of one seed; each has its own stream.
_SAMPLING_STREAM = 0
_DROPOUT_STREAM = 1


def sketch_sample(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    num_index_heads: int = 1,
    method: str = "gumbel",
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
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw ``num_samples`` keys per row and index head from the softmax of the sketch scores.

    The sampling step of Smart Bird (arXiv 2108.09193). Every index head draws its own set. With p
    the softmax over the keys that can be drawn, and k the places left after forced keys:

    - ``gumbel``: k distinct keys by successive sampling, as the k largest of log p + Gumbel noise;
      log_inclusion is log(1 - exp(-exp(log p - kappa))), kappa the (k+1)-th largest.
    - ``systematic``: k distinct keys with inclusion probabilities pi = min(1, c p); log_inclusion
      is log pi.
    - ``multinomial``: k draws with replacement, duplicates kept; log_inclusion is log(k p).
    - ``topk``: the k largest p, ties to the lower index; log_inclusion is 0.

    Args:
        q_sketch: [B, N, S] or [B, H_s, N, S].
        k_sketch: [B, M, S] or [B, H_ks, M, S]; index head h draws by sketch h // (H_i / H_s), which
            scores keys by k_sketch of s // (H_s / H_ks).
        num_samples: K, at least 1.
        num_index_heads: H_i.
        method: one of the four above.
        scale: factor of the scores, 1/sqrt(S) if None.
        is_causal, key_mask, window, num_sinks, global_mask: see above.
        query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: likewise.
        seed: int64 [2]; drawn from ``generator`` if None.
        generator: source of ``seed``; torch's default if None.

    Returns:
        indices int32 [B, H_i, N, K], ascending, -1 in unused slots at the end; log_inclusion
        float32 [B, H_i, N, K], 0 for forced keys and in rows with at most K valid keys, -inf in
        unused slots.

    Raises:
        ValueError: unknown method, more forced keys than ``num_samples``, or a NaN score of a
            valid pair.
    """
    if method not in ("gumbel", "systematic", "multinomial", "topk"):
        raise ValueError(
            f"method is {method!r}, must be 'gumbel', 'systematic', 'multinomial' or 'topk'"
        )
    num_window = window if is_causal or window == 0 else 2 * (window // 2) + 1
    if num_sinks + num_window > num_samples:
        raise ValueError(
            f"num_sinks and window force {num_sinks} + {num_window} keys, "
            f"must be at most num_samples = {num_samples}"
        )
    q_sketch, k_sketch = _sketches(q_sketch, k_sketch)
    (B, _, N, _), M = q_sketch.shape, k_sketch.shape[2]
    shape = (B, num_index_heads, N, num_samples)
    device = q_sketch.device
    rng = _generator(seed, generator, _SAMPLING_STREAM, device)
    if M == 0:
        return (
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.full(shape, -math.inf, device=device),
        )

    with torch.no_grad():
        valid, forced = _valid_and_forced(
            (B, N, M),
            device,
            is_causal,
            key_mask,
            window,
            num_sinks,
            global_mask,
            query_offset,
            cu_seqlens_q,
            cu_seqlens_k,
            num_samples,
        )
        # float64 from here on: rounding of running sums would blur the law that the draws follow.
        scores = _sketch_scores(q_sketch, k_sketch, scale, valid).double()
        if scores.isnan().any():
            raise ValueError("q_sketch or k_sketch gives NaN scores, must be finite at valid keys")
        # One head dimension: [B, H_i, N, M], and [B, 1, N, M] of what all heads have in common.
        scores = _per_head(scores, num_index_heads)
        valid, forced = valid[:, None], forced[:, None]
        take_all = valid.sum(-1, keepdim=True) <= num_samples
        certain = forced | (valid & take_all)
        drawable = valid & ~certain
        # k < number of drawable keys, or both are 0. All draws below rely on it.
        k = (num_samples - forced.sum(-1, keepdim=True)).masked_fill(take_all, 0)
        k = k.expand(B, num_index_heads, N, 1)
        log_p = scores.masked_fill(~drawable, -math.inf).log_softmax(-1)
        log_p = log_p.masked_fill(~drawable, -math.inf)
        if method == "gumbel":
            counts, log_inclusion = _draw_gumbel(log_p, k, rng)
        elif method == "systematic":
            u = torch.rand(k.shape, generator=rng, device=device)
            counts, log_inclusion = _draw_systematic(log_p, k, u)
        elif method == "multinomial":
            counts, log_inclusion = _draw_multinomial(log_p, k, num_samples, rng)
        else:
            counts, log_inclusion = _draw_topk(log_p, k)
        counts = counts + certain
        log_inclusion = log_inclusion.masked_fill(certain, 0.0)

        # Slot r holds the key at which the running count passes r.
        slots = torch.arange(num_samples, device=device).expand(shape).contiguous()
        indices = torch.searchsorted(counts.cumsum(-1), slots, right=True)
        unused = indices == M
        log_inclusion = log_inclusion.gather(-1, indices.clamp(max=M - 1))
        return (
            indices.masked_fill(unused, -1).int(),
            log_inclusion.masked_fill(unused, -math.inf).float(),
        )


def gather_scores(q: Tensor, k: Tensor, indices: Tensor, *, scale: float | None = None) -> Tensor:
    """Scaled scores of each query against its own gathered keys.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        indices: integers [B, H_i, N, K] in [-1, M), H a multiple of H_i; -1 is an unused slot.
        scale: factor of the scores, 1/sqrt(D) if None.

    Returns:
        [B, H, N, K] in q's dtype, -inf in unused slots.

    Raises:
        ValueError: an index outside [-1, M).
    """
    return _gathered_scores(q, k, indices, scale).to(q.dtype)


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
    """Softmax attention of each query over its own gathered keys and values.

    Duplicate indices are separate entries, so they add up. A row without a used slot gives zeros,
    lse -inf and zero gradients.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        v: [B, H_kv, M, Dv].
        indices: integers [B, H_i, N, K] in [-1, M), H a multiple of H_i; -1 is an unused slot.
        bias: added to the scaled scores, broadcastable to [B, H, N, K] or [B, H_i, N, K]; ignored
            in unused slots.
        scale: factor of the scores, 1/sqrt(D) if None.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the others are scaled
            by 1 / (1 - dropout_p).
        query_offset, cu_seqlens_q, sequence_ids, first_head: who the rows are; they choose which
            weights are dropped, not the law, and change nothing here.
        seed: int64 [2] for dropout; drawn from ``generator`` if None.
        generator: source of ``seed``; torch's default if None.
        return_lse: also return the log-sum-exp of each row's logits, before dropout.

    Returns:
        out [B, H, N, Dv] in q's dtype, and with ``return_lse`` lse [B, H, N] float32 (float64 for
        float64).

    Raises:
        ValueError: an index outside [-1, M).
    """
    logits = _gathered_scores(q, k, indices, scale)
    if bias is not None:
        if bias.dim() >= 3 and bias.shape[-3] == indices.shape[1]:
            bias = bias.repeat_interleave(q.shape[1] // indices.shape[1], dim=-3)
        unused = _per_head(indices, q.shape[1]) == -1
        logits = (logits + bias.to(logits.dtype)).masked_fill(unused, -math.inf)
    weights, lse = _softmax_lse(logits)
    if dropout_p > 0.0:
        rng = _generator(seed, generator, _DROPOUT_STREAM, q.device)
        kept = torch.rand(weights.shape, generator=rng, device=q.device) >= dropout_p
        weights = weights * kept / (1.0 - dropout_p)
    out = torch.einsum("bhnk,bhnkd->bhnd", weights, _gather(v, indices, q.shape[1])).to(q.dtype)
    return (out, lse) if return_lse else out


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
    """Log-sum-exp of each row's sketch scores over its free keys.

    Args:
        q_sketch: [B, N, S] or [B, H_s, N, S].
        k_sketch: [B, M, S] or [B, H_ks, M, S].
        scale: factor of the scores, 1/sqrt(S) if None.
        is_causal, key_mask, window, num_sinks, global_mask: see above.
        query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: likewise.
        rows: int64 [R], the queries whose result is wanted; None: all.

    Returns:
        [B, N], or [B, H_s, N] of 4-D sketches, with R in the place of N where ``rows`` are given:
        float32 (float64 for float64), -inf where no key is free.
    """
    one_sketch = q_sketch.dim() == 3
    q_sketch, k_sketch = _sketches(q_sketch, k_sketch)
    valid, forced = _valid_and_forced(
        (q_sketch.shape[0], q_sketch.shape[2], k_sketch.shape[2]),
        q_sketch.device,
        is_causal,
        key_mask,
        window,
        num_sinks,
        global_mask,
        query_offset,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    lse = _softmax_lse(_sketch_scores(q_sketch, k_sketch, scale, valid & ~forced))[1]
    lse = lse if rows is None else lse[..., rows]
    return lse.squeeze(1) if one_sketch else lse


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
    """Cross-entropy of the sketch's distribution against what attention does.

    Of a row and a sketch it is -sum_j t_j log p_j. p is the softmax of the sketch scores over all
    free keys. t is the mean, over the heads of the sketch, of the attention probabilities: over all
    free keys, or with ``indices`` over each head's own sampled entries that are free (duplicates
    add). t is a constant: gradients reach ``q_sketch`` and ``k_sketch`` only.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        q_sketch: [B, N, S] or [B, H_s, N, S]; head h belongs to sketch h // (H / H_s).
        k_sketch: [B, M, S] or [B, H_ks, M, S].
        indices: integers [B, H_i, N, K] in [-1, M); None for a dense target.
        log_inclusion: [B, H_i, N, K], subtracted from the sampled logits; ignored in unused slots.
        scale: factor of the attention scores, 1/sqrt(D) if None.
        sketch_scale: factor of the sketch scores, 1/sqrt(S) if None.
        is_causal, key_mask, window, num_sinks, global_mask: see above.
        query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: likewise.
        rows: int64 [R], the queries that count; None: all.
        reduction: "mean" over rows with a free key and over sketches, or their "sum".

    Returns:
        Scalar float32 (float64 for float64), 0 if no row has a free key.

    Raises:
        ValueError: an index outside [-1, M), ``log_inclusion`` without ``indices``, or an unknown
            ``reduction``.
    """
    if log_inclusion is not None and indices is None:
        raise ValueError("log_inclusion is given without indices, must come with them")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean' or 'sum'")
    q_sketch, k_sketch = _sketches(q_sketch, k_sketch)
    (B, H, N, D), M, H_s = q.shape, k.shape[2], q_sketch.shape[1]
    valid, forced = _valid_and_forced(
        (B, N, M),
        q.device,
        is_causal,
        key_mask,
        window,
        num_sinks,
        global_mask,
        query_offset,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    free = valid & ~forced
    with torch.no_grad():
        if indices is None:
            scale = 1.0 / math.sqrt(D) if scale is None else scale
            dtype = _compute_dtype(q)
            logits = q.to(dtype) @ _per_head(k, H).to(dtype).mT * scale
            target = _softmax_lse(logits.masked_fill(~free[:, None], -math.inf))[0]
        else:
            logits = _gathered_scores(q, k, indices, scale)
            # One more column at the end takes the unused slots, whose weight is 0.
            entries = _per_head(indices, H).long().remainder(M + 1)
            used = F.pad(free, (0, 1))[:, None].expand(B, H, N, M + 1).gather(-1, entries)
            if log_inclusion is not None:
                logits = logits - _per_head(log_inclusion, H)
            weights = _softmax_lse(torch.where(used, logits, -math.inf))[0]
            target = weights.new_zeros(B, H, N, M + 1).scatter_add(-1, entries, weights)[..., :M]
        target = torch.unflatten(target, 1, (H_s, H // H_s)).mean(2)
    scores = _sketch_scores(q_sketch, k_sketch, sketch_scale, free)
    lse = _softmax_lse(scores)[1]
    log_p = torch.where(free[:, None], scores - lse[..., None], 0.0)
    losses = -(target * log_p).sum(-1)  # [B, H_s, N]
    counted = free.any(-1)[:, None].expand(B, H_s, N)
    if rows is not None:
        losses, counted = losses[..., rows], counted[..., rows]
    total: Tensor = losses.sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total


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
    """Smart Bird attention (arXiv 2108.09193): draw keys by the sketch, attend over the keys drawn.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        v: [B, H_kv, M, Dv].
        q_sketch: [B, N, S] or [B, H_s, N, S].
        k_sketch: [B, M, S] or [B, H_ks, M, S].
        num_samples: K.
        num_index_heads: H_i; None: the least common multiple of H_kv and H_s.
        correction: subtract log_inclusion from the logits: the self-normalised Horvitz-Thompson
            estimate of dense attention. Without it: attention restricted to the sample.
        query_mask: bool [B, N]. Queries where it is False, and keys where ``key_mask`` is, are
            taken out of their sequences before anything else; rows become 0, indices -1.
        scale: factor of the attention scores, 1/sqrt(D) if None.
        sketch_scale: factor of the sketch scores, 1/sqrt(S) if None.
        seed: int64 [2] for sampling and dropout; drawn from ``generator`` if None.
        generator: source of ``seed``; torch's default if None.
        return_indices: also return the keys drawn.
        method: see :func:`sketch_sample`.
        is_causal, key_mask, window, num_sinks, global_mask: see above.
        query_offset, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head: likewise.
        dropout_p: see :func:`gather_attention`.

    Returns:
        out [B, H, N, Dv] in q's dtype, and with ``return_indices`` int32 [B, H_i, N, K].

    Raises:
        ValueError: see :func:`sketch_sample`.
    """
    q_sketch, k_sketch = _sketches(q_sketch, k_sketch)
    if num_index_heads is None:
        num_index_heads = math.lcm(k.shape[1], q_sketch.shape[1])
    if seed is None:
        seed = _draw_seed(generator, q.device)
    if query_mask is not None:
        (B, H, N, _), M = q.shape, k.shape[2]
        out = q.new_zeros(B, H, N, v.shape[3])
        indices = torch.full((B, num_index_heads, N, num_samples), -1, device=q.device).int()
        for b in range(B):
            rows = query_mask[b].nonzero().squeeze(-1)
            keys = (torch.ones(M) if key_mask is None else key_mask[b]).nonzero().squeeze(-1)
            one = smart_bird_attention(
                q[b : b + 1, :, rows],
                k[b : b + 1, :, keys],
                v[b : b + 1, :, keys],
                q_sketch[b : b + 1, :, rows],
                k_sketch[b : b + 1, :, keys],
                num_samples,
                num_index_heads=num_index_heads,
                method=method,
                correction=correction,
                is_causal=is_causal,
                window=window,
                num_sinks=num_sinks,
                global_mask=None if global_mask is None else global_mask[b : b + 1, keys],
                query_offset=query_offset[b : b + 1]
                if isinstance(query_offset, Tensor)
                else query_offset,
                dropout_p=dropout_p,
                scale=scale,
                sketch_scale=sketch_scale,
                seed=seed + b,
                return_indices=True,
            )
            out[b, :, rows] = one[0][0]
            indices[b, :, rows] = F.pad(keys, (0, 1), value=-1)[one[1][0].long()].int()
        return (out, indices) if return_indices else out
    indices, log_inclusion = sketch_sample(
        q_sketch,
        k_sketch,
        num_samples,
        num_index_heads=num_index_heads,
        method=method,
        scale=sketch_scale,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        global_mask=global_mask,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seed=seed,
    )
    bias = -log_inclusion if correction else None
    result = gather_attention(
        q, k, v, indices, bias=bias, scale=scale, dropout_p=dropout_p, seed=seed
    )
    assert isinstance(result, Tensor)
    return (result, indices) if return_indices else result


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
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`smart_bird_attention` of packed sequences whose rows come first.

    Args:
        q: [T_q, H, D].
        k: [T_k, H_kv, D].
        v: [T_k, H_kv, Dv].
        q_sketch: [T_q, S] or [T_q, H_s, S].
        k_sketch: [T_k, S] or [T_k, H_ks, S].

    Returns:
        out [T_q, H, Dv], and with ``return_indices`` int32 [H_i, T_q, K].
    """
    q, k, v, q_sketch, k_sketch = (
        (x[:, None] if x.dim() == 2 else x).transpose(0, 1)[None]
        for x in (q, k, v, q_sketch, k_sketch)
    )
    out, indices = smart_bird_attention(
        q,
        k,
        v,
        q_sketch,
        k_sketch,
        num_samples,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        return_indices=True,
        **options,
    )
    out = out[0].transpose(0, 1)
    return (out, indices[0]) if return_indices else out


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_head(x: Tensor, num_heads: int) -> Tensor:
    """[B, H_x, ...] to [B, H, ...]: head h reads x's head h // (H / H_x)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _sketches(q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H_s, N, S] and [B, H_s, M, S]."""
    if q_sketch.dim() == 3:
        return q_sketch[:, None], k_sketch[:, None]
    return q_sketch, _per_head(k_sketch, q_sketch.shape[1])


def _valid_and_forced(
    shape: tuple[int, int, int],
    device: torch.device,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    window: int = 0,
    num_sinks: int = 0,
    global_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    num_samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """bool [B, N, M], twice: the valid keys of each row and, among them, the forced ones.

    Without ``num_samples`` there is room for all of ``global_mask``.
    """
    B, N, M = shape
    seen = torch.zeros(shape, dtype=torch.bool, device=device)  # of the same sequence
    distance = torch.zeros(shape, dtype=torch.int64, device=device)  # from a key to the position
    if cu_seqlens_q is None or cu_seqlens_k is None:
        sequences = [(b, slice(0, N), slice(0, M)) for b in range(B)]
    else:
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        sequences = [
            (0, slice(*q_ends[s : s + 2]), slice(*k_ends[s : s + 2]))
            for s in range(len(q_ends) - 1)
        ]
    for s, (b, queries, keys) in enumerate(sequences):
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        offset = num_keys - num_queries if query_offset is None else query_offset
        if isinstance(offset, Tensor):
            offset = int(offset[s])
        position = torch.arange(num_queries, device=device)[:, None] + offset
        seen[b, queries, keys] = True
        distance[b, queries, keys] = position - torch.arange(num_keys, device=device)

    valid = seen & (distance >= 0) if is_causal else seen
    if key_mask is not None:
        valid = valid & key_mask[:, None, :]
    forced = valid & (valid.cumsum(-1) <= num_sinks)
    if window > 0:
        near = distance < window if is_causal else distance.abs() <= window // 2
        forced = forced | (valid & near)
    if global_mask is not None:
        more = valid & global_mask[:, None, :] & ~forced
        if num_samples is not None:
            more = more & (more.cumsum(-1) <= num_samples - forced.sum(-1, keepdim=True))
        forced = forced | more
    return valid, forced


def _sketch_scores(
    q_sketch: Tensor, k_sketch: Tensor, scale: float | None, valid: Tensor
) -> Tensor:
    """[B, H_s, N, M]: scaled sketch scores, -inf at keys that are not valid [B, N, M]."""
    scale = 1.0 / math.sqrt(q_sketch.shape[-1]) if scale is None else scale
    dtype = _compute_dtype(q_sketch)
    # Rows and keys without a valid pair may hold NaN: 0 * NaN must not enter a gradient.
    q_sketch = q_sketch.to(dtype).masked_fill(~valid.any(2)[:, None, :, None], 0.0)
    k_sketch = k_sketch.to(dtype).masked_fill(~valid.any(1)[:, None, :, None], 0.0)
    return (q_sketch @ k_sketch.mT * scale).masked_fill(~valid[:, None], -math.inf)


def _softmax_lse(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension; zeros and -inf where every logit is -inf."""
    if logits.shape[-1] == 0:
        return logits, logits.sum(-1) - math.inf
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)


def _gather(x: Tensor, indices: Tensor, num_heads: int) -> Tensor:
    """[B, H_kv, M, D] at [B, H_i, N, K] -> [B, H, N, K, D] in the compute dtype, 0 at -1."""
    B, _, M, _ = x.shape
    if indices.numel() > 0 and (indices.min() < -1 or indices.max() >= M):
        raise ValueError(f"indices span [{indices.min()}, {indices.max()}], must be in [-1, {M})")
    # One row of zeros at the end is what -1 reads, so neither it nor its gradient touches a key.
    x = F.pad(_per_head(x, num_heads).to(_compute_dtype(x)), (0, 0, 0, 1))
    batch = torch.arange(B, device=x.device)[:, None, None, None]
    head = torch.arange(num_heads, device=x.device)[:, None, None]
    return x[batch, head, _per_head(indices, num_heads).long()]


def _gathered_scores(q: Tensor, k: Tensor, indices: Tensor, scale: float | None) -> Tensor:
    """[B, H, N, K] in the compute dtype, -inf in unused slots."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = _gather(k, indices, q.shape[1])
    scores = torch.einsum("bhnd,bhnkd->bhnk", q.to(keys.dtype), keys) * scale
    return scores.masked_fill(_per_head(indices, q.shape[1]) == -1, -math.inf)


def _draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)


def _generator(
    seed: Tensor | None, generator: torch.Generator | None, stream: int, device: torch.device
) -> torch.Generator:
    """A generator for one stream of ``seed``, or of a seed drawn from ``generator``."""
    if seed is None:
        seed = _draw_seed(generator, device)
    entropy = [word % 2**64 for word in seed.tolist()] + [stream]
    state = np.random.SeedSequence(entropy).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


# Draws. All take log_p [B, H_i, N, M], -inf at keys that cannot be drawn, and k [B, H_i, N, 1], and
# return how often each key is drawn and its log_inclusion if drawn, both [B, H_i, N, M].


def _draw_gumbel(log_p: Tensor, k: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = -torch.empty_like(log_p, memory_format=torch.contiguous_format)
    noise = -noise.exponential_(generator=rng).log()
    perturbed, order = (log_p + noise).sort(-1, descending=True)
    counts = _first_k(order, k, log_p.shape[-1])
    kappa = perturbed.gather(-1, k)
    x = log_p - kappa
    # log(1 - exp(-exp(x))) tends to x - exp(x) / 2, which rounds to x before exp(x) underflows.
    log_inclusion = torch.where(x < -40.0, x, (-torch.expm1(-x.exp())).log())
    return counts, log_inclusion


def _draw_systematic(log_p: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` [B, H_i, N, 1] in [0, 1), float32: so its sums with integers are exact in float64."""
    log_pi = _log_inclusion_probabilities(log_p, k)
    # Keys with pi = 1 move the running sum by a whole step, so they can be left out of it.
    certain = log_pi == 0.0
    passed = log_pi.exp().masked_fill(certain, 0.0).cumsum(-1)
    left = k - certain.sum(-1, keepdim=True)
    passed = passed / passed[..., -1:].clamp(min=torch.finfo(passed.dtype).tiny) * left
    drawn = (passed - u).ceil().diff(dim=-1, prepend=torch.zeros_like(passed[..., :1]))
    return drawn.long() + certain, log_pi


def _draw_multinomial(
    log_p: Tensor, k: Tensor, num_samples: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    # Rows with k = 0 have no p; torch.multinomial needs one, and their draws are not counted.
    p = log_p.exp().masked_fill(k == 0, 1.0)
    draws = torch.multinomial(p.flatten(0, 2), num_samples, replacement=True, generator=rng)
    draws = draws.view(*p.shape[:3], num_samples)
    return _first_k(draws, k, p.shape[-1]), k.log() + log_p


def _draw_topk(log_p: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    order = log_p.sort(dim=-1, descending=True, stable=True).indices
    return _first_k(order, k, log_p.shape[-1]), torch.zeros_like(log_p)


def _first_k(order: Tensor, k: Tensor, num_keys: int) -> Tensor:
    """How often each of ``num_keys`` keys is among the first k entries of ``order``."""
    counted = (torch.arange(order.shape[-1], device=order.device) < k).long()
    counts = counted.new_zeros(*order.shape[:-1], num_keys)
    return counts.scatter_add_(-1, order, counted)


def _log_inclusion_probabilities(log_p: Tensor, k: Tensor) -> Tensor:
    """log of pi = min(1, c p) with c such that sum pi = k."""
    ordered = log_p.sort(-1, descending=True).values
    log_tail = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    # The t largest have pi = 1: t is the first rank at which c, fitted to the rest, gives pi <= 1.
    log_left = (k - torch.arange(ordered.shape[-1], device=k.device)).clamp(min=0).log()
    t = (log_left + ordered <= log_tail).int().argmax(-1, keepdim=True)
    log_c = log_left.gather(-1, t) - log_tail.gather(-1, t)
    return (log_c + log_p).clamp(max=0.0).masked_fill(log_p == -math.inf, -math.inf)

"""Key indices that need no sketch: the fixed and exact patterns that a sampled one is held beside.

Each function returns int32 indices [B, H_i, N, K] for ``smartbird.ops.gather_attention``,
ascending, -1 in unused places at the end, B and H_i 1 where all sequences and heads share one
pattern. Causal means that query i sees keys ``j <= i + (M - N)``; ``key_mask`` is bool [B, M], True
where a key may be attended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smartbird import ops
from smartbird.ops import check_key_mask

__all__ = ["bigbird_indices", "oracle_indices", "random_indices", "window_indices"]

# Scores that oracle_indices holds at a time: 64 MiB of float32.
_MAX_SCORES = 1 << 24


def window_indices(
    num_queries: int,
    num_keys: int,
    window: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The keys nearest each query: local attention (Longformer, arXiv 2004.05150).

    Args:
        num_queries: N.
        num_keys: M.
        window: causal, the keys at or before the position ``i + (M - N)``; otherwise that position
            and ``window // 2`` keys on each side. Masked keys are left out, not replaced.
        is_causal: as above.
        key_mask: as above.
        device: of the result; that of ``key_mask`` where given.

    Returns:
        int32 [B or 1, 1, N, K], K being ``window`` or ``2 * (window // 2) + 1``.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if key_mask is not None:
        check_key_mask(key_mask, (len(key_mask), num_keys))
        device = key_mask.device
    after = 0 if is_causal else window // 2
    before = window - 1 if is_causal else window // 2
    position = torch.arange(num_queries, device=device) + (num_keys - num_queries)
    keys = position[:, None] + torch.arange(-before, after + 1, device=device)
    valid = ((keys >= 0) & (keys < num_keys))[None]
    if key_mask is not None:
        valid = valid & key_mask[:, keys.clamp(0, max(num_keys - 1, 0))]
    return _ascending(keys, valid, num_keys)[:, None]


def random_indices(
    num_queries: int,
    num_keys: int,
    num_samples: int,
    *,
    num_index_heads: int = 1,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Distinct keys, each valid one as likely as any other; all of them where they are at most K.

    Args:
        num_queries: N.
        num_keys: M.
        num_samples: K.
        num_index_heads: H_i.
        is_causal: as above.
        key_mask: as above.
        seed: int64 [2]; equal seed, equal pattern. None: drawn from ``generator``.
        generator: source of a seed that is not given; None: PyTorch's global one.
        device: of the result; that of ``key_mask`` where given.

    Returns:
        int32 [B or 1, H_i, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    return bigbird_indices(
        num_queries,
        num_keys,
        num_samples,
        window=0,
        num_sinks=0,
        num_index_heads=num_index_heads,
        is_causal=is_causal,
        key_mask=key_mask,
        seed=seed,
        generator=generator,
        device=device,
    )


def bigbird_indices(
    num_queries: int,
    num_keys: int,
    num_samples: int,
    *,
    window: int,
    num_sinks: int,
    num_index_heads: int = 1,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Global, local and random keys together (Big Bird, arXiv 2007.14062), by token, not by block.

    All queries attend to the global tokens. These do not attend to all tokens in turn, as Big
    Bird's do: every query has K keys here.

    Args:
        num_queries: N.
        num_keys: M.
        num_samples: K; what global and local keys leave of it is filled with random ones.
        window: local keys, counted as in :func:`window_indices`; 0 for none.
        num_sinks: global keys, the first valid ones.
        num_index_heads: H_i; heads differ in their random keys.
        is_causal: as above.
        key_mask: as above.
        seed: int64 [2]; equal seed, equal pattern. None: drawn from ``generator``.
        generator: source of a seed that is not given; None: PyTorch's global one.
        device: of the result; that of ``key_mask`` where given.

    Returns:
        int32 [B or 1, H_i, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    batch, device = (1, device) if key_mask is None else (key_mask.shape[0], key_mask.device)
    # A sketch of zeros gives every key the same chance.
    indices: Tensor = ops.sketch_sample(
        torch.zeros(batch, num_queries, 1, device=device),
        torch.zeros(batch, num_keys, 1, device=device),
        num_samples,
        num_index_heads=num_index_heads,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        seed=seed,
        generator=generator,
    )[0]
    return indices


@torch.no_grad()
def oracle_indices(
    q: Tensor,
    k: Tensor,
    num_samples: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The keys with the largest exact scores ``q . k`` of every head: what no sketch can beat.

    Top-k attention (arXiv 2106.06899). Costs what dense attention costs: it is the bound to compare
    with. Scores are made for a few rows at a time, never all N x M.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        num_samples: K.
        is_causal: as above.
        key_mask: as above.

    Returns:
        int32 [B, H, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if q.dim() != 4 or k.dim() != 4 or (len(q), q.shape[3]) != (len(k), k.shape[3]):
        raise ValueError(
            "q and k must be [B, H, N, D] and [B, H_kv, M, D], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    (batch, heads, num_queries, _), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if key_mask is not None:
        check_key_mask(key_mask, (batch, num_keys))
    grouped = torch.unflatten(q, 1, (kv_heads, heads // kv_heads))
    num_kept = min(num_samples, num_keys)
    key = torch.arange(num_keys, device=q.device)
    indices = q.new_full((batch, heads, num_queries, num_samples), -1, dtype=torch.int32)
    rows_per_block = max(1, _MAX_SCORES // max(1, batch * heads * num_keys))
    for first in range(0, num_queries, rows_per_block):
        rows = slice(first, min(first + rows_per_block, num_queries))
        scores = grouped[..., rows, :].flatten(2, 3) @ k.mT
        scores = scores.reshape(batch, heads, -1, num_keys)
        valid = torch.ones((), dtype=torch.bool, device=q.device)
        if is_causal:
            row = torch.arange(rows.start, rows.stop, device=q.device)
            valid = key <= row[:, None] + (num_keys - num_queries)
        if key_mask is not None:
            valid = valid & key_mask[:, None, None, :]
        top = scores.masked_fill(~valid, -torch.inf).topk(num_kept, dim=-1).indices
        top_valid = valid.expand(scores.shape).gather(-1, top)
        indices[:, :, rows, :num_kept] = _ascending(top, top_valid, num_keys)
    return indices


def _ascending(keys: Tensor, valid: Tensor, num_keys: int) -> Tensor:
    """The valid keys of each row in ascending order, then -1."""
    ordered = keys.masked_fill(~valid, num_keys).sort(-1).values
    return ordered.masked_fill(ordered == num_keys, -1).int()

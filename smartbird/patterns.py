"""Key indices that need no sketch: the patterns that a sampled one is held beside at equal K.

The builders return int32 indices [B, H_i, N, K] for ``smartbird.ops.gather_attention``, ascending,
-1 in unused places at the end. H_i is 1 where all heads share one pattern; B is 1 where all
sequences share it, and attention then takes ``indices.expand(len(q), -1, -1, -1)``. Causal means
that query i sees keys ``j <= i + (M - N)``; ``key_mask`` is bool [B, M], True where a key may be
attended.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird import ops
from smartbird._checks import check_count, check_flag, check_key_mask
from smartbird._visible import check_visible
from smartbird.ops.sample import ascending

__all__ = [
    "bigbird_indices",
    "oracle_indices",
    "random_indices",
    "routing_indices",
    "strided_indices",
    "update_centroids",
    "window_indices",
]

# Scores held at a time: 64 MiB of float32.
_MAX_SCORES = 1 << 24
# Keys that routing_indices merges into the best of each cluster at a time: about as many as it
# keeps of them, so that neither side dominates.
_ROUTED_KEYS = 64


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
    check_count("window", window, 1)
    _check_lengths(num_queries, num_keys, is_causal, key_mask)
    device = device if key_mask is None else key_mask.device
    after = 0 if is_causal else window // 2
    before = window - 1 if is_causal else window // 2
    position = torch.arange(num_queries, device=device) + (num_keys - num_queries)
    keys = position[:, None] + torch.arange(-before, after + 1, device=device)
    return ascending(keys, _are_valid(keys, num_keys, key_mask), num_keys)[:, None]


def strided_indices(
    num_queries: int,
    num_keys: int,
    num_samples: int,
    *,
    num_index_heads: int = 1,
    stride: int | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Local keys and every ``stride``-th key: the strided Sparse Transformer (arXiv 1904.10509).

    With two index heads or more the first half (rounded up) of them is local and the others are
    strided; a single one shares its K places between both kinds, the local ones taking the odd
    place. Around the position ``i + (M - N)`` of a query, width being the places of a kind:

    - local: the ``width`` keys that end there if causal; otherwise the ``width // 2`` keys before
      it, itself, and as many after it as there are places left;
    - strided: the keys at a distance that ``stride`` divides. A stride of sqrt(M) makes them the
      column of the query in a square grid, and the local ones about its line (axial attention).

    Causal, and with a ``stride`` of at most the local width, a strided and a local step in turn
    reach every earlier key. Masked keys are left out, not replaced.

    Args:
        num_queries: N.
        num_keys: M.
        num_samples: K.
        num_index_heads: H_i.
        stride: at least M / width, so that no query has more keys than places. None: the least
            such number. Give one to have the pattern not depend on M.
        is_causal: as above.
        key_mask: as above.
        device: of the result; that of ``key_mask`` where given.

    Returns:
        int32 [B or 1, H_i, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    check_count("num_samples", num_samples, 1)
    check_count("num_index_heads", num_index_heads, 1)
    _check_lengths(num_queries, num_keys, is_causal, key_mask)
    merged = num_index_heads == 1
    num_strided = num_samples // 2 if merged else num_samples
    num_local = num_samples - num_strided if merged else num_samples
    least = -(-num_keys // num_strided) if num_strided else 1
    stride = max(1, least) if stride is None else stride
    check_count("stride", stride, 1)
    if stride < least:
        raise ValueError(
            f"stride must be at least {least} for {num_keys} keys in {num_strided} places, "
            f"got {stride}"
        )
    device = device if key_mask is None else key_mask.device

    position = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    before = num_local - 1 if is_causal else num_local // 2
    local = position + torch.arange(-before, num_local - before, device=device)
    strided = position % stride + stride * torch.arange(num_strided, device=device)
    if merged:
        # A strided key that is local as well goes out of the range, not in twice.
        repeated = (strided >= local[:, :1]) & (strided <= local[:, -1:])
        keys = torch.cat([local, strided.masked_fill(repeated, num_keys)], dim=-1)[None]
    else:
        num_local_heads = (num_index_heads + 1) // 2
        keys = torch.stack(
            [local] * num_local_heads + [strided] * (num_index_heads - num_local_heads)
        )
    valid = _are_valid(keys, num_keys, key_mask)
    if is_causal:
        valid = valid & (keys <= position)
    return ascending(keys, valid, num_keys)


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
    _check_lengths(num_queries, num_keys, is_causal, key_mask)
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
    query_offset: int | Tensor | None = None,
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
        query_offset: position of query 0, int or int64 [B]: causal, query i sees the keys
            ``j <= query_offset + i``. None: M - N.

    Returns:
        int32 [B, H, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    _check_scored(q, k, num_samples, key_mask)
    (batch, heads, num_queries, _), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    position = check_visible(
        *(batch, num_queries, num_keys, q.device),
        is_causal=is_causal,
        query_offset=query_offset,
    ).query_positions()
    grouped = torch.unflatten(q, 1, (kv_heads, heads // kv_heads))
    num_kept = min(num_samples, num_keys)
    key = torch.arange(num_keys, device=q.device)
    indices = q.new_full((batch, heads, num_queries, num_samples), -1, dtype=torch.int32)
    rows_per_block = max(1, _MAX_SCORES // max(1, batch * heads * num_keys))
    for first in range(0, num_queries, rows_per_block):
        rows = slice(first, min(first + rows_per_block, num_queries))
        scores = grouped[..., rows, :].flatten(2, 3) @ k.mT
        scores = scores.reshape(batch, heads, rows.stop - rows.start, num_keys)
        valid = torch.ones((), dtype=torch.bool, device=q.device)
        if is_causal:
            valid = key <= position[:, None, rows, None]
        if key_mask is not None:
            valid = valid & key_mask[:, None, None, :]
        top = scores.masked_fill(~valid, -torch.inf).topk(num_kept, dim=-1).indices
        top_valid = valid.expand(scores.shape).gather(-1, top)
        indices[:, :, rows, :num_kept] = ascending(top, top_valid, num_keys)
    return indices


@torch.no_grad()
def routing_indices(
    q: Tensor,
    k: Tensor,
    centroids: Tensor,
    num_samples: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The keys nearest the centroid of each query's cluster: Routing Transformer (2003.05997).

    Queries and keys are layer-normalised, without scale and bias, to unit length. A query belongs
    to the centroid of its head with the largest dot product, and sees the K keys whose dot product
    with that centroid is largest, so that every cluster has K members and a key may be in several.

    It differs from the paper where a fair comparison needs it. Every query has a cluster, where the
    paper lets each cluster pick K queries. A causal query sees the K best keys *up to* its
    position; the paper's choice is made over the whole sequence and then masked, which leaves early
    queries few keys and lets later tokens decide which. The query's own position ``i + (M - N)``,
    where it is a valid key, takes the place of the last of the K unless it is one of them.

    Keys are merged into the best of every cluster a block at a time, so no N x M tensor is made.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], H a multiple of H_kv.
        centroids: [H, C, D], of unit length; :func:`update_centroids` learns them.
        num_samples: K.
        is_causal: as above.
        key_mask: as above.

    Returns:
        int32 [B, H, N, K].

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    check_flag("is_causal", is_causal)
    _check_scored(q, k, num_samples, key_mask)
    _check_centroids(centroids, q)
    (batch, heads, num_queries, _), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_clusters = centroids.shape[1]
    cluster = _nearest_centroid(q, centroids)
    first_position = num_keys - num_queries
    position = torch.arange(num_queries, device=q.device)[:, None] + first_position
    grouped = centroids.reshape(kv_heads, -1, centroids.shape[-1])

    ranked = cluster.new_full((batch, heads, num_queries, num_samples), -1)
    # The best keys of each cluster so far, best first.
    best = q.new_full((batch, heads, num_clusters, num_samples), -torch.inf)
    best_keys = cluster.new_full(best.shape, -1)
    for first in range(0, num_keys, _ROUTED_KEYS):
        block = slice(first, min(first + _ROUTED_KEYS, num_keys))
        affinity = (grouped @ _unit(k[:, :, block]).mT).flatten(1, 2)
        affinity = torch.unflatten(affinity, 1, (heads, num_clusters))
        if key_mask is not None:
            affinity = affinity.masked_fill(~key_mask[:, None, None, block], -torch.inf)
        candidates = torch.arange(block.start, block.stop, device=q.device).expand(affinity.shape)
        affinity = torch.cat([best, affinity], dim=-1)
        candidates = torch.cat([best_keys, candidates], dim=-1)
        if is_causal:
            rows = slice(*(max(0, j - first_position) for j in (block.start, block.stop)))
            seen_keys = _of_cluster(candidates, cluster[:, :, rows])
            seen = _of_cluster(affinity, cluster[:, :, rows])
            seen = seen.masked_fill(seen_keys > position[rows], -torch.inf)
            ranked[:, :, rows] = _best(seen, seen_keys, num_samples)[1]
        best, best_keys = _best(affinity, candidates, num_samples)
    if not is_causal:
        ranked = _of_cluster(best_keys, cluster)

    own = position.expand(batch, 1, -1, -1)
    own_valid = _are_valid(position, num_keys, key_mask)[:, None]
    missing = own_valid & (ranked != own).all(-1, keepdim=True)
    ranked[..., -1:] = torch.where(missing, own, ranked[..., -1:])
    return ascending(ranked, ranked >= 0, num_keys)


@torch.no_grad()
def update_centroids(
    centroids: Tensor, x: Tensor, *, decay: float = 0.999, key_mask: Tensor | None = None
) -> Tensor:
    """One step of the online spherical k-means behind :func:`routing_indices` (arXiv 2003.05997).

    Each centroid moves towards the mean of the layer-normalised vectors that are nearest to it, by
    an exponential moving average, and goes back to unit length; one without members stays.

    Args:
        centroids: [H, C, D], of unit length.
        x: [B, H, N, D], queries and keys alike, as they share the centroids.
        decay: what a centroid keeps of itself, in [0, 1); the paper's 0.999 needs thousands of
            steps.
        key_mask: bool [B, N], True where ``x`` holds a token.

    Returns:
        [H, C, D], of unit length.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    _check_centroids(centroids, x)
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    cluster = _nearest_centroid(x, centroids)[..., None]
    members = _unit(x)
    if key_mask is not None:
        check_key_mask(key_mask, (x.shape[0], x.shape[2]))
        members = members.masked_fill(~key_mask[:, None, :, None], 0.0)
    members, cluster = (t.transpose(0, 1).flatten(1, 2) for t in (members, cluster))
    sums = torch.zeros_like(centroids).scatter_add(1, cluster.expand(members.shape), members)
    return F.normalize(decay * centroids + (1.0 - decay) * F.normalize(sums, dim=-1), dim=-1)


def _are_valid(keys: Tensor, num_keys: int, key_mask: Tensor | None) -> Tensor:
    """Which of any integers are keys, and not masked: bool [B or 1, *keys.shape]."""
    inside = (keys >= 0) & (keys < num_keys)
    if key_mask is None:
        return inside[None]
    # One more column, for all that are no keys.
    return F.pad(key_mask, (0, 1), value=False)[:, keys.masked_fill(~inside, num_keys)]


def _unit(x: Tensor) -> Tensor:
    """Layer normalisation without scale and bias, to length 1 instead of sqrt(D)."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def _nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 [B, H, N]: which of the centroids [H, C, D] each x [B, H, N, D] is nearest to."""
    rows = max(1, _MAX_SCORES // max(1, x.shape[0] * centroids.shape[0] * centroids.shape[1]))
    blocks = [(_unit(part) @ centroids.mT).argmax(-1) for part in torch.split(x, rows, dim=2)]
    return torch.cat(blocks, dim=2)


def _of_cluster(x: Tensor, cluster: Tensor) -> Tensor:
    """The lines of x [B, H, C, L] that cluster [B, H, N] names: [B, H, N, L]."""
    return x.gather(2, cluster[..., None].expand(-1, -1, -1, x.shape[-1]))


def _best(scores: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores in descending order and their keys, -1 where they are -inf."""
    best, places = scores.topk(count, dim=-1)
    return best, keys.gather(-1, places).masked_fill(best == -torch.inf, -1)


def _check_lengths(
    num_queries: int, num_keys: int, is_causal: bool, key_mask: Tensor | None
) -> None:
    check_count("num_queries", num_queries, 0)
    check_count("num_keys", num_keys, 0)
    check_flag("is_causal", is_causal)
    if key_mask is not None:
        batch = key_mask.shape[0] if isinstance(key_mask, Tensor) and key_mask.dim() else 0
        check_key_mask(key_mask, (batch, num_keys))


def _check_scored(q: Tensor, k: Tensor, num_samples: int, key_mask: Tensor | None) -> None:
    check_count("num_samples", num_samples, 1)
    if q.dim() != 4 or k.dim() != 4 or (len(q), q.shape[3]) != (len(k), k.shape[3]):
        raise ValueError(
            "q and k must be [B, H, N, D] and [B, H_kv, M, D], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if q.dtype != k.dtype:
        raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    heads, (kv_heads, num_keys) = q.shape[1], k.shape[1:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if key_mask is not None:
        check_key_mask(key_mask, (len(q), num_keys))


def _check_centroids(centroids: Tensor, x: Tensor) -> None:
    sizes = centroids.shape
    if len(sizes) != 3 or x.dim() != 4 or sizes[1] < 1 or sizes[::2] != x.shape[1::2]:
        raise ValueError(
            "centroids must be [H, C, D] with at least one for each head of vectors [B, H, N, D], "
            f"got {list(sizes)} and {list(x.shape)}"
        )
    if centroids.dtype != x.dtype:
        raise TypeError(
            f"centroids must have the dtype of the vectors, {x.dtype}, got {centroids.dtype}"
        )

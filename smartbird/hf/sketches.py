"""How sketches begin: the directions of a model's own q and k that tell most about q . k."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """What is kept of the queries and keys of an attention module that reads a passage.

    Attributes:
        queries: float64 [H, D, D], the sum of q q^T over the queries of each head.
        keys: float64 [H_kv, D, D], the sum of (k - mean) (k - mean)^T over the keys of a sequence:
            what all keys share adds one number to every score of a row, which softmax ignores.
        counts: how many queries and keys there were.
    """

    queries: Tensor = field(default_factory=lambda: torch.zeros(()))
    keys: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, q: Tensor, k: Tensor) -> None:
        """q [B, H, N, D] and k [B, H_kv, M, D] of another call."""
        q, k = q.detach().float(), k.detach().float()
        k = k - k.mean(2, keepdim=True)
        self.queries = self.queries + (q.mT @ q).sum(0).double().cpu()
        self.keys = self.keys + (k.mT @ k).sum(0).double().cpu()


def rotary_pairs(
    moments: Moments, partner: Tensor, sketch_dim: int, *, together: bool = False
) -> tuple[Tensor, Tensor]:
    """Sketches of the rotary pairs whose part of q . k varies most over the keys.

    A sketch takes both features of a pair, so that it is turned as q and k are, at any position.
    The variance of the part that pair i has, averaged over queries, is tr(E[q_i q_i^T] Cov(k_i)).
    Heads that share keys take the same pairs.

    Args:
        moments: of q and k as they are turned.
        partner: int64 [D], the other feature of each feature's pair.
        sketch_dim: S, even.
        together: see :func:`_strongest`.

    Returns:
        float64 [H, D, S] and [H_kv, D, S], which pick features.
    """
    first = torch.arange(partner.numel())
    pairs = torch.stack([first, partner], dim=-1)[first < partner]  # [D / 2, 2]

    def blocks(x: Tensor) -> Tensor:
        """x [heads, D, D] to [heads, D / 2, 2, 2]."""
        return x[:, pairs.unsqueeze(-1), pairs.unsqueeze(-2)]

    kv_heads, width = moments.keys.shape[:2]
    group = moments.queries.shape[0] // kv_heads
    queries = torch.unflatten(blocks(moments.queries), 0, (kv_heads, group)).sum(1)
    energy = (queries * blocks(moments.keys)).sum((-1, -2))  # both are symmetric
    picks = torch.nn.functional.one_hot(pairs, width).mT.double()  # [D / 2, D, 2]
    (chosen,) = _strongest(
        energy, sketch_dim // 2, picks.expand(kv_heads, -1, -1, -1), together=together
    )
    return chosen.repeat_interleave(group, dim=0), chosen


def leading_directions(
    moments: Moments, sketch_dim: int, *, together: bool = False
) -> tuple[Tensor, Tensor]:
    """Sketches whose product is nearest q . k over queries and keys of the passage.

    For one group of heads that share keys, with Q = sum of E[q q^T] over its heads and C = Cov(k):
    of all products of rank S the least squared error has q^T C^(1/2) U U^T C^(-1/2) k, where U are
    the leading eigenvectors of C^(1/2) Q C^(1/2). Were tokens white before the projections, these
    would be the leading singular directions of W_q^T W_k.

    Args:
        sketch_dim: S.
        together: see :func:`_strongest`.

    Returns:
        float64 [H, D, S] and [H_kv, D, S].
    """
    kv_heads = moments.keys.shape[0]
    group = moments.queries.shape[0] // kv_heads
    queries = torch.unflatten(moments.queries, 0, (kv_heads, group)).sum(1)
    spread, basis = torch.linalg.eigh(moments.keys)
    # Directions in which no key differs: nothing is lost by any finite factor there.
    floor = spread.amax(-1, keepdim=True) * 1e-6 + torch.finfo(torch.float64).tiny
    root = spread.clamp(min=floor).sqrt().unsqueeze(-2)
    rise, sink = (basis * root) @ basis.mT, (basis / root) @ basis.mT
    values, vectors = torch.linalg.eigh(rise @ queries @ rise)
    maps = ((x @ vectors).mT.unsqueeze(-1) for x in (rise, sink))  # [H_kv, D, D, 1], a map each
    q_weight, k_weight = _strongest(values, sketch_dim, *maps, together=together)
    return q_weight.repeat_interleave(group, dim=0), k_weight


def _strongest(strength: Tensor, count: int, *maps: Tensor, together: bool) -> list[Tensor]:
    """Of the maps that each key/value head could take, the strongest ones, side by side.

    Args:
        strength: [H_kv, C].
        count: how many a head takes.
        maps: [H_kv, C, D, W] each.
        together: so many for all heads together, each in features of its own, which are zero in the
            maps of other heads: the sum over heads loses nothing.

    Returns:
        [H_kv, D, count * W] for each of ``maps``.
    """
    heads = torch.arange(strength.shape[0]).unsqueeze(-1)
    if not together:
        best = strength.topk(count, dim=-1).indices.sort(-1).values
        taken = [x[heads, best] for x in maps]
    else:
        best = strength.flatten().topk(count).indices.sort().values
        own = (best // strength.shape[1] == heads)[..., None, None]
        taken = [x.flatten(0, 1)[best] * own for x in maps]
    return [x.transpose(1, 2).flatten(2) for x in taken]

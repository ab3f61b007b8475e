"""A call of attention of which this rank has a shard."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird._visible import Visible
from smartbird.distributed._attention import gather_attention, parts_of_heads
from smartbird.distributed._collectives import gather_each
from smartbird.distributed._shards import Shards
from smartbird.ops._call import OPS, acc_dtype
from smartbird.ops.distill import distill
from smartbird.ops.gather import attend_to, dropout_arguments

EXCHANGES = ("auto", "all_gather", "ulysses")


@dataclass(frozen=True)
class ShardedCall:
    """What a call does otherwise than one of all tokens.

    Attributes:
        shards, group: how tokens lie on which ranks.
        exchange: one of ``EXCHANGES``.
        whole: what all queries of the sequence see.
        rows: int64 [real], where this rank's queries stand.
        visible: what these see.
    """

    shards: Shards
    group: str
    exchange: str
    whole: Visible
    rows: Tensor
    visible: Visible

    @property
    def layout(self) -> tuple[str, bool, int]:
        return self.group, self.shards.head_tail, self.shards.length

    # ---- rows ----

    def cut(self, x: Tensor) -> Tensor:
        """[B, C, local, ...] without padding: [B, C, real, ...]."""
        return x[:, :, : self.shards.real]

    def fill(self, x: Tensor, value: float = 0.0) -> Tensor:
        """The way back."""
        missing = self.shards.local - x.shape[2]
        return F.pad(x, (0, 0, 0, missing), value=value) if missing else x

    def gather(self, x: Tensor) -> Tensor:
        """[B, C, local, F] of all ranks: [B, C, length, F], with its gradient."""
        gathered: Tensor = OPS.gather_tokens(x, *self.layout)
        return gathered

    def of_first_rank(self, x: Tensor) -> Tensor:
        """What rank 0 has drawn at random."""
        shared: Tensor = OPS.of_first_rank(x, self.group)
        return shared

    # ---- what takes the place of functions of the same name ----

    def attend_to(
        self,
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
    ) -> tuple[Tensor, Tensor | None]:
        """Of this rank's queries, keys and values.

        Returns:
            out, and lse where it costs nothing.
        """
        if self._goes_by_heads(q, k, v, indices, bias):
            return self._attend_by_heads(q, k, v, indices, bias, scale, dropout_p, seed), None
        dropout = dropout_arguments(visible, dropout_p, seed)[:-1]
        return gather_attention(q, k, v, indices, bias, scale, dropout, self.layout)

    def distill(
        self,
        q: Tensor,
        k: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        visible: Visible,
        *,
        indices: Tensor | None,
        log_inclusion: Tensor | None,
        scale: float | None,
        sketch_scale: float | None,
        rows: Tensor | None,
    ) -> Tensor:
        """The mean over rows of the whole sequence, from this rank's queries and keys.

        Args:
            k_sketch: of all keys.
            rows: int64 [R], those to judge of all rows.

        Returns:
            The same on every rank. Its gradient here is the part that this rank's rows have in it:
            the gradient of the loss is the sum over ranks.
        """
        judged = self.whole.residual()
        if rows is not None:
            judged = judged.at_rows(rows.sort().values)
            rows = torch.isin(self.rows, rows).nonzero().flatten()
        count = judged.has_free_key().sum() * q_sketch.shape[1]

        # As few keys at a time as sketches allow: all heads of a sketch are judged together.
        num_lists = q.shape[1] if indices is None else indices.shape[1]
        sizes = (k.shape[1], q.shape[1], q_sketch.shape[1], k_sketch.shape[1], num_lists)
        parts = [part for _, *part in parts_of_heads(math.gcd(sizes[0], sizes[2]), *sizes)]
        k = k.detach()
        gathered = gather_each((k[:, kv] for kv, *_ in parts), *self.layout)
        total = torch.zeros((), dtype=acc_dtype(q), device=q.device)
        for (_, heads, sketch, key_sketch, lists), keys in zip(parts, gathered, strict=True):
            total = total + distill(
                q[:, heads],
                keys,
                q_sketch[:, sketch],
                k_sketch[:, key_sketch],
                visible,
                indices=None if indices is None else indices[:, lists],
                log_inclusion=None if log_inclusion is None else log_inclusion[:, lists],
                scale=scale,
                sketch_scale=sketch_scale,
                rows=rows,
                reduction="sum",
            )
        whole: Tensor = OPS.sum_of_ranks(total, self.group)
        return whole / count.clamp(min=1)

    # ---- exchange by heads (Ulysses) ----

    def _goes_by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, bias: Tensor | None
    ) -> bool:
        ranks, num_lists = self.shards.size, indices.shape[1]
        lists = max(num_lists, ranks)
        possible = k.shape[1] % ranks == 0 and lists % ranks == 0 and lists % num_lists == 0
        if self.exchange == "ulysses" and not possible:
            raise ValueError(
                f"exchange must be 'all_gather' or 'auto' where {ranks} ranks cannot share "
                f"{k.shape[1]} heads of keys with {num_lists} index heads, got 'ulysses'"
            )
        if self.exchange != "auto" or not possible:
            return self.exchange == "ulysses"
        # What a rank is sent of a token: all of its keys and values, or its share of everything.
        features = q.shape[3] + v.shape[3]
        gathered = k.shape[1] * features * k.element_size()
        shared = gathered + q.shape[1] * features * q.element_size()
        shared += lists * indices.shape[3] * indices.element_size()
        if bias is not None:
            shared += max(bias.shape[1], ranks) * bias.shape[3] * bias.element_size()
        return shared < gathered * ranks

    def _attend_by_heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        """All queries attend by this rank's heads, with the lists that other ranks have drawn."""
        lists = max(indices.shape[1], self.shards.size)
        copies = lists // indices.shape[1]
        if bias is not None:
            if bias.shape[1] == indices.shape[1]:
                bias = bias.repeat_interleave(copies, 1)
            bias = self._to_heads(bias)
        indices = self._to_heads(indices.repeat_interleave(copies, 1))
        first_head = self.shards.rank * (lists // self.shards.size)
        out, _ = attend_to(
            self._to_heads(q),
            self._to_heads(k),
            self._to_heads(v),
            indices,
            replace(self.whole, first_head=first_head),
            bias=bias,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        return self.cut(OPS.heads_to_tokens(out, *self.layout))

    def _to_heads(self, x: Tensor) -> Tensor:
        """[B, C, real or local, F] of this rank's tokens as [B, C / ranks, length, F]."""
        shared: Tensor = OPS.tokens_to_heads(self.fill(x), *self.layout)
        return shared

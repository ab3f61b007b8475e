"""From padded batches to packed sequences and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird._checks import can_look


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch go in one packed sequence: see :func:`packing`.

    Attributes:
        order: int64 [T], the place in the flattened [B * N] of each packed token: first the real
            ones, in order, then the padding, if any is carried along.
        begin: int64 [T], where the batch element of each begins in that.
        cu_seqlens: int32 [B + 1], where each batch element begins in the pack.
        batch, length: B and N.
        carries_padding: whether any is carried along.
    """

    order: Tensor
    begin: Tensor
    cu_seqlens: Tensor
    batch: int
    length: int
    carries_padding: bool

    def pack(self, x: Tensor) -> Tensor:
        """[B, C, N, ...] to [1, C, T, ...], contiguous."""
        if not x.is_contiguous():  # tokens lie side by side, as projections leave them
            rows = x.transpose(1, 2).flatten(0, 1).index_select(0, self.order)
            return rows.transpose(0, 1).contiguous().unsqueeze(0)
        before = torch.arange(x.shape[1], device=x.device).unsqueeze(-1) * self.length  # [C, 1]
        place = self.order + self.begin * (x.shape[1] - 1) + before  # [C, T]
        rows = x.flatten(0, 2).index_select(0, place.flatten())
        return rows.view(1, x.shape[1], *self.order.shape, *x.shape[3:])

    def pack_rows(self, x: Tensor) -> Tensor:
        """[B, N, ...] to [1, T, ...]."""
        return x.flatten(0, 1).index_select(0, self.order).unsqueeze(0)

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """[1, C, T, ...] to [B, C, N, ...], with ``fill`` in places that no packed token has."""
        rows = x.new_full((x.shape[1], self.batch * self.length, *x.shape[3:]), fill)
        rows.index_copy_(1, self.order, x.squeeze(0))
        return torch.unflatten(rows, 1, (self.batch, self.length)).transpose(0, 1)

    def unpack_rows(self, x: Tensor, fill: float = 0) -> Tensor:
        """[1, T, ...] to [B, N, ...]."""
        return self.unpack(x.unsqueeze(1), fill).squeeze(1)

    def places(self, indices: Tensor) -> Tensor:
        """Packed keys int32 (-1 is none) as their places in their own batch element."""
        if self.order.shape[0] == 0:
            return indices
        place = (self.order - self.begin).int()
        return torch.where(indices < 0, indices, place[indices.long().clamp(min=0)])


def packing(mask: Tensor) -> Packing:
    """The packing of a batch whose real tokens are those of ``mask``, bool [B, N].

    T is B * N, which no data decide, so that graphs can hold it and nothing waits for a GPU; tokens
    of padding come last and belong to no sequence. In eager mode on the CPU they are left out.
    """
    batch, length = mask.shape
    lengths = mask.sum(-1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    real = mask.flatten()
    looks = can_look(mask)
    order = real.nonzero().squeeze(-1) if looks else (~real).sort(stable=True).indices
    begin = order - order % length
    return Packing(order, begin, cu_seqlens, batch, length, carries_padding=not looks)

"""How the tokens of a call lie in memory, and their way to the kernels and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smartbird._checks import MOST, autocasts, can_look, check_tensor
from smartbird._packing import Packing, packing
from smartbird._visible import Visible


@dataclass(frozen=True)
class Layout:
    """Of [B, N, ...], [N, B, ...], of one sequence [N, ...], or of a jagged [B, j, ...].

    The kernels work on [B, N, ...] or, where there is a mask or a jagged tensor, on the real tokens
    of all sequences as one pack [1, T, ...], so that padding costs nothing.

    Attributes:
        batched, batch_first: which of these, where the tokens are not jagged.
        packing: where a mask packs them.
        offsets: int64 [B + 1] of a jagged tensor.
        cu_seqlens: int32 [B + 1] of the pack, where there is one.
    """

    batched: bool = True
    batch_first: bool = True
    packing: Packing | None = None
    offsets: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def batch(self, x: Tensor) -> Tensor:
        """Tokens in this layout as [B, N, E]; they are not jagged."""
        if not self.batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def enter(self, x: Tensor) -> Tensor:
        """Tokens in this layout as [B, N, E] or [1, T, E]."""
        if self.offsets is not None:
            return _values(x)
        x = self.batch(x)
        return x if self.packing is None else self.packing.pack_rows(x)

    def leave(self, x: Tensor) -> Tensor:
        """[B, N, E] or [1, T, E] as tokens in this layout; zeros in padding."""
        if self.offsets is not None:
            return _nest(x, self.offsets, 1)
        if self.packing is not None:
            if self.packing.carries_padding:
                row = torch.arange(x.shape[1], device=x.device)
                x = x.masked_fill((row >= self.packing.cu_seqlens[-1]).unsqueeze(-1), 0)
            x = self.packing.unpack_rows(x)
        if not self.batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def size(self, entered: Tensor) -> tuple[int, int]:
        """B and N of tokens that :meth:`enter` gave; 1 and T of jagged ones."""
        if self.packing is not None:
            return self.packing.batch, self.packing.length
        return entered.shape[0], entered.shape[1]

    # Of tensors with heads, which are batched and batch first always.

    def enter_heads(self, x: Tensor) -> Tensor:
        """[B, C, N, ...] or a jagged [B, C, j, ...] as [B, C, N, ...] or [1, C, T, ...]."""
        if self.offsets is not None:
            return _values(x)
        return x if self.packing is None else self.packing.pack(x)

    def leave_heads(self, x: Tensor, fill: float = 0) -> Tensor:
        """The way back; ``fill`` in padding."""
        if self.offsets is not None:
            return _nest(x, self.offsets, 2)
        return x if self.packing is None else self.packing.unpack(x, fill)


def _values(x: Tensor) -> Tensor:
    values: Tensor = x.values()
    return values.unsqueeze(0)


def _nest(x: Tensor, offsets: Tensor, jagged_dim: int) -> Tensor:
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        x.squeeze(0), offsets, jagged_dim=jagged_dim
    )
    return nested


def jagged(x: Any) -> tuple[Tensor, Tensor | None]:
    """Offsets and lengths of a jagged tensor, of which type checkers know nothing."""
    return x.offsets(), x.lengths()


def lay_out(name: str, x: Tensor, weight: Tensor, batch_first: bool) -> Layout:
    """The layout of the argument ``name``, which must be tokens that ``weight`` [*, E] can project.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    width = weight.shape[1]
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"{name} must be {weight.dtype}, as the parameters are, got {x.dtype}")
    if x.is_nested:
        if x.layout != torch.jagged:
            raise TypeError(f"{name} must have layout torch.jagged if it is nested, got {x.layout}")
        offsets, lengths = jagged(x)
        if x.dim() != 3 or x.shape[-1] != width or x.values().dim() != 2 or lengths is not None:
            raise ValueError(
                f"{name} must be [batch, j, {width}] and without holes if it is nested, "
                f"got {list(x.shape)}"
            )
        return Layout(offsets=offsets, cu_seqlens=offsets.int())
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name} must be [batch, length, {width}] or [length, {width}] "
            f"(batch_first={batch_first}), got {list(x.shape)}"
        )
    return Layout(x.dim() == 3, batch_first)


def pack(
    queries: Layout,
    keys: Layout,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_shape: tuple[int, int],
    key_shape: tuple[int, int],
    device: torch.device,
) -> tuple[Layout, Layout]:
    """The layouts of [B, N] queries and [B, M] keys, packed by masks; None: nothing is padding.

    Raises:
        TypeError, ValueError: a mask of another dtype, shape or device, by name.
    """
    packed: list[Layout] = []
    for name, layout, mask, shape, letters in (
        ("query_mask", queries, query_mask, query_shape, "[B, N]"),
        ("key_mask", keys, key_mask, key_shape, "[B, M]"),
    ):
        if packed and mask is query_mask and shape == query_shape:
            packed.append(packed[0])
            continue
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        if mask is key_mask:  # which is both, in self-attention
            name, letters = "key_mask", "[B, M]"
        check_tensor(name, mask, torch.bool, shape, letters, device)
        by_mask = packing(mask)
        packed.append(replace(layout, packing=by_mask, cu_seqlens=by_mask.cu_seqlens))
    return packed[0], packed[1]


def enter_indices(indices: Tensor, queries: Layout, keys: Layout) -> Tensor:
    """Keys by their places in their sequences, int32 [B, H_i, N, K], as rows of what kernels get.

    Keys that are padding are none, -1; what is out of range stays out of range.

    Raises:
        TypeError, ValueError: indices of other queries.
    """
    _check_queries(indices, queries)
    indices = queries.enter_heads(indices)
    if queries.cu_seqlens is None:
        return indices
    row = torch.arange(indices.shape[2], dtype=torch.int32, device=indices.device)
    sequence = torch.searchsorted(queries.cu_seqlens, row, right=True) - 1
    sequence = sequence.clamp(max=queries.cu_seqlens.shape[0] - 2).unsqueeze(-1)
    if keys.packing is not None:
        packing = keys.packing
        row = torch.arange(packing.order.shape[0], dtype=torch.int32, device=indices.device)
        row = row.masked_fill(row >= packing.cu_seqlens[-1], -1)
        row_of = row.new_full((packing.batch * packing.length + 1,), -1)
        row_of = row_of.index_copy(0, packing.order, row)
        inside = (indices >= 0) & (indices < packing.length)
        rows = row_of[(sequence * packing.length + indices).masked_fill(~inside, 0)]
    else:
        assert keys.cu_seqlens is not None
        inside = (indices >= 0) & (indices < keys.cu_seqlens.diff()[sequence])
        rows = keys.cu_seqlens[sequence] + indices
    return rows.masked_fill(~inside, MOST).masked_fill(indices == -1, -1)


def _check_queries(indices: Any, queries: Layout) -> None:
    """Refuse indices of a padded or nested call that are not of its queries."""
    if indices.is_nested != (queries.offsets is not None):
        must = "a plain Tensor" if indices.is_nested else "nested"
        raise TypeError(f"indices must be {must}, as the query is, got {list(indices.shape)}")
    if queries.packing is not None:
        size = queries.packing.batch, queries.packing.length
        if (indices.shape[0], indices.shape[2]) != size:
            raise ValueError(
                f"indices must be [B, H_i, N, K] with B and N of the query, {list(size)}, "
                f"got {list(indices.shape)}"
            )
    if queries.offsets is None:
        return
    offsets, lengths = jagged(indices)
    if indices._ragged_idx != 2 or lengths is not None:
        raise ValueError(
            "indices must be [B, H_i, j, K] and without holes if they are nested, "
            f"got {list(indices.shape)}"
        )
    have, want = list(offsets.shape), list(queries.offsets.shape)
    if can_look(offsets) and can_look(queries.offsets):
        have, want = offsets.diff().tolist(), queries.offsets.diff().tolist()
    if have != want:
        raise ValueError(f"indices must have the lengths of the query, {want}, got {have}")


def leave_indices(indices: Tensor, queries: Layout, keys: Layout, visible: Visible) -> Tensor:
    """The way back; -1 for queries that are padding."""
    if keys.packing is not None:
        indices = keys.packing.places(indices)
    elif keys.cu_seqlens is not None:
        indices = visible.places(indices)
    return queries.leave_heads(indices, fill=-1)

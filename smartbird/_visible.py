"""Who the rows of a call are and which keys each sees: checked once, carried as one record.

csrc/visible.h defines what the fields mean, and says it for the kernels. Here are the checks, and
the few things about rows that must be known outside of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird._checks import MOST, check_count, check_flag, check_int, check_tensor, kind_of


@dataclass(frozen=True)
class Visible:
    """A checked description of the rows of a call, made by :func:`check_visible`.

    The first eleven fields are the arguments of the dispatcher's ops, in their order.

    Attributes:
        is_causal: a query sees the keys up to its position.
        key_mask: bool [B, M], True where a key may be attended.
        window, num_sinks, global_mask: which keys a row must hold.
        query_offset: position of query 0 of every sequence; None: see ``positions``, and where that
            is None as well, M - N.
        positions: int64 [B, N], the position of each query.
        cu_seqlens_q, cu_seqlens_k: int32 [n + 1], where packed.
        sequence_ids: int64 [B or n]; None: 0, 1, ...
        first_head: number of index head 0.
        batch, num_queries, num_keys, device: of the call's tensors: B, N and M.
    """

    is_causal: bool
    key_mask: Tensor | None
    window: int
    num_sinks: int
    global_mask: Tensor | None
    query_offset: int | None
    positions: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sequence_ids: Tensor | None
    first_head: int
    batch: int
    num_queries: int
    num_keys: int
    device: torch.device

    # ---- the dispatcher's arguments ----

    def sampling(self) -> tuple[Any, ...]:
        """Of sketch_sample and sampled_attention."""
        return (
            self.is_causal,
            self.key_mask,
            self.window,
            self.num_sinks,
            self.global_mask,
            self.query_offset,
            self.positions,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.sequence_ids,
            self.first_head,
        )

    def dense(self) -> tuple[Any, ...]:
        """Of the ops that go over all free keys; sinks and global keys: see :meth:`residual`."""
        return (
            self.is_causal,
            self.key_mask,
            self.window,
            self.query_offset,
            self.positions,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
        )

    def dropout(self) -> tuple[Any, ...]:
        """Of gather_attention, which knows of no keys and so of no default position in a pack."""
        positions = self.positions
        if (
            self.cu_seqlens_q is not self.cu_seqlens_k
            and self.query_offset is None
            and positions is None
        ):
            positions = self.query_positions()
        return (
            self.query_offset,
            positions,
            self.cu_seqlens_q,
            self.sequence_ids,
            self.first_head,
        )

    # ---- other rows ----

    def free(self) -> Visible:
        """Without forced keys."""
        return replace(self, window=0, num_sinks=0, global_mask=None)

    def residual(self) -> Visible:
        """The same free keys, with sinks and global keys taken out by ``key_mask``."""
        if self.num_sinks == 0 and self.global_mask is None:
            return self
        left = self.key_mask
        if self.num_sinks > 0:
            beyond = (self._valid_before() >= self.num_sinks).expand(self.batch, -1)
            left = beyond if left is None else left & beyond
        if self.global_mask is not None:
            left = ~self.global_mask if left is None else left & ~self.global_mask
        return replace(self, key_mask=left, num_sinks=0, global_mask=None)

    def at_rows(self, rows: Tensor) -> Visible:
        """Of the queries ``rows``, int64 [R] ascending, of every batch element alone."""
        cu_seqlens_q = self.cu_seqlens_q
        if cu_seqlens_q is not None:
            cu_seqlens_q = torch.searchsorted(rows, cu_seqlens_q.long()).int()
        return replace(
            self,
            query_offset=None,
            positions=self.query_positions().index_select(1, rows),
            cu_seqlens_q=cu_seqlens_q,
            num_queries=rows.shape[0],
        )

    # ---- what the kernels know too ----

    def query_positions(self) -> Tensor:
        """int64 [B, N]: the key of its sequence that each query stands at."""
        if self.positions is not None:
            return self.positions
        row = torch.arange(self.num_queries, device=self.device)
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            offset = self.query_offset
            offset = self.num_keys - self.num_queries if offset is None else offset
            return (row + offset).expand(self.batch, -1)
        place = _place(self.cu_seqlens_q, row)
        if self.query_offset is not None:
            return (place + self.query_offset).unsqueeze(0)
        longer = self.cu_seqlens_k.diff() - self.cu_seqlens_q.diff()
        return (place + _of_sequence(longer, self.cu_seqlens_q, row)).unsqueeze(0)

    def dense_mask(self) -> tuple[Tensor | None, bool]:
        """What tells scaled_dot_product_attention the valid keys: a mask and its is_causal.

        The mask is bool [B or 1, N or 1, M], True where a key may be attended; None: no more than
        is_causal says, which is that query i sees the keys up to key i.
        """
        if self.key_mask is None and self.cu_seqlens_q is None:
            if not self.is_causal:
                return None, False
            if self.positions is None:
                offset = self.query_offset
                if offset == 0 or (offset is None and self.num_queries == self.num_keys):
                    return None, True
                if offset is None and self.num_queries == 1:
                    return None, False
        masks = []
        if self.key_mask is not None:
            masks.append(self.key_mask.unsqueeze(1))
        key, key_sequence = self._key_places()
        if key_sequence is not None and self.cu_seqlens_q is not None:
            row = torch.arange(self.num_queries, device=self.device)
            sequence = _sequence(self.cu_seqlens_q, row)
            exists = sequence < self.cu_seqlens_q.shape[0] - 1
            same = sequence.unsqueeze(-1) == key_sequence
            masks.append((same & exists.unsqueeze(-1)).unsqueeze(0))
        if self.is_causal:
            masks.append(key <= self.query_positions().unsqueeze(-1))
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return mask, False

    def forced_slots(self, indices: Tensor, num_samples: int) -> Tensor:
        """Which slots of ``indices`` hold keys that their row must hold among ``num_samples``.

        Args:
            indices: int32 [B, H_i, N, K], ascending keys that the rows see; -1 is an empty slot.
            num_samples: as many places are there for forced keys, and the last ones of
                ``global_mask`` are left out where they are too many.
        """
        used = indices >= 0
        forced = self._in_window(indices)
        if self.num_sinks > 0:
            forced = forced | (_at_keys(self._valid_before(), indices) < self.num_sinks)
        forced = forced & used
        if self.global_mask is not None:
            more = _at_keys(self.global_mask, indices) & used & ~forced
            room = num_samples - forced.sum(-1, keepdim=True)
            forced = forced | (more & (more.cumsum(-1) <= room))
        return forced

    def free_slots(self, indices: Tensor) -> Tensor:
        """Which slots of ``indices`` [B, H_i, N, K] hold free keys of their row.

        Of what :meth:`residual` gives: forced keys of a row are those of its window.
        """
        free = (indices >= 0) & ~self._in_window(indices)
        if self.key_mask is not None:
            free = free & _at_keys(self.key_mask, indices)
        key, key_sequence = self._key_places()
        if key_sequence is not None and self.cu_seqlens_q is not None:
            row = torch.arange(self.num_queries, device=self.device)
            sequence = _sequence(self.cu_seqlens_q, row).unsqueeze(-1)
            free = free & (_at_keys(key_sequence.unsqueeze(0), indices) == sequence)
        if self.is_causal:
            position = self.query_positions()[:, None, :, None]
            free = free & (_at_keys(key.unsqueeze(0), indices) <= position)
        return free

    def has_free_key(self) -> Tensor:
        """bool [B, N]: which queries have a free key, of what :meth:`residual` gives."""
        position = self.query_positions().expand(self.batch, -1)
        first = torch.zeros_like(position)
        num_keys = first + self.num_keys
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            row = torch.arange(self.num_queries, device=self.device)
            first = self.cu_seqlens_k.long()[_sequence(self.cu_seqlens_q, row)].unsqueeze(0)
            num_keys = _of_sequence(self.cu_seqlens_k.diff(), self.cu_seqlens_q, row).unsqueeze(0)
        limit = torch.minimum(position + 1, num_keys).clamp(min=0) if self.is_causal else num_keys
        begin = end = limit
        if self.window > 0:
            before, after = _reach(self.window, self.is_causal)
            begin, end = (
                torch.minimum((position + by).clamp(min=0), limit) for by in (-before, after + 1)
            )
        valid = torch.ones(1, self.num_keys, dtype=torch.bool, device=self.device)
        valid = valid if self.key_mask is None else self.key_mask
        valid_before = F.pad(valid.cumsum(-1), (1, 0)).expand(self.batch, -1)
        from_, to, hole, rest = (
            valid_before.gather(1, first + place)
            for place in (torch.zeros_like(limit), limit, begin, end)
        )
        return to - from_ > rest - hole

    def places(self, indices: Tensor) -> Tensor:
        """Packed keys ``indices`` [B, H_i, N, K] (-1 is none) by their places in their sequence."""
        place = _at_keys(self._key_places()[0].unsqueeze(0), indices)
        return torch.where(indices < 0, indices, place.int())

    def _in_window(self, indices: Tensor) -> Tensor:
        if self.window == 0:
            return torch.zeros_like(indices, dtype=torch.bool)
        key, _ = self._key_places()
        position = self.query_positions()[:, None, :, None]
        distance = position - _at_keys(key.unsqueeze(0), indices)
        before, after = _reach(self.window, self.is_causal)
        return (distance <= before) & (distance >= -after)

    def _key_places(self) -> tuple[Tensor, Tensor | None]:
        """int64 [M]: the place of each key in its sequence and, of a pack, its sequence."""
        key = torch.arange(self.num_keys, device=self.device)
        if self.cu_seqlens_k is None:
            return key, None
        return _place(self.cu_seqlens_k, key), _sequence(self.cu_seqlens_k, key)

    def _valid_before(self) -> Tensor:
        """int64 [B or 1, M]: how many valid keys of its sequence precede each key."""
        if self.key_mask is None:
            return self._key_places()[0].unsqueeze(0)
        before = F.pad(self.key_mask.cumsum(-1), (1, 0))  # [B, M + 1]
        if self.cu_seqlens_k is None:
            return before[:, :-1]
        key = torch.arange(self.num_keys, device=self.device)
        first = self.cu_seqlens_k.long()[_sequence(self.cu_seqlens_k, key)]
        return before[:, :-1] - before.gather(-1, first.unsqueeze(0))


# Rows of a pack: row i is in sequence s with cu[s] <= i < cu[s + 1]. Rows beyond the last sequence
# make one more, n.


def _sequence(cu_seqlens: Tensor, row: Tensor) -> Tensor:
    return (torch.searchsorted(cu_seqlens, row.int(), right=True) - 1).clamp(min=0)


def _place(cu_seqlens: Tensor, row: Tensor) -> Tensor:
    return row - cu_seqlens.long()[_sequence(cu_seqlens, row)]


def _of_sequence(values: Tensor, cu_seqlens: Tensor, row: Tensor) -> Tensor:
    """The values [n] of the rows' sequences, 0 beyond the last."""
    return F.pad(values.long(), (0, 1))[_sequence(cu_seqlens, row)]


def _at_keys(values: Tensor, indices: Tensor) -> Tensor:
    """values [B or 1, M] at indices [B, H_i, N, K]; anything in empty slots."""
    if values.shape[1] == 0:
        return torch.zeros_like(indices, dtype=values.dtype)
    places = indices.long().clamp(min=0)
    return values.expand(indices.shape[0], -1).gather(1, places.flatten(1)).view(indices.shape)


def _reach(window: int, is_causal: bool) -> tuple[int, int]:
    """Keys of a window before and after the position."""
    return (window - 1, 0) if is_causal else (window // 2, window // 2)


def check_room(
    num_samples: int,
    window: int,
    num_sinks: int,
    is_causal: bool,
) -> None:
    """Refuse more forced keys than ``num_samples``.

    Raises:
        ValueError: says how many are forced, and by what.
    """
    forced = num_sinks + (1 + sum(_reach(window, is_causal)) if window else 0)
    if forced > num_samples:
        raise ValueError(
            f"num_samples must be at least the number of forced keys: window={window} and "
            f"num_sinks={num_sinks} force {forced}, got num_samples={num_samples}"
        )


def check_visible(
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
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
) -> Visible:
    """The row keywords of ``smartbird.ops``, checked: the only place where they are.

    Args:
        batch, num_queries, num_keys, device: B, N, M and where the tensors of the call are.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, range or device, by its name.
    """
    is_causal = check_flag("is_causal", is_causal)
    for name, mask in (("key_mask", key_mask), ("global_mask", global_mask)):
        if mask is not None:
            shape = (batch, num_keys)
            check_tensor(name, mask, torch.bool, shape, "[B, M]", device)
    window = check_count("window", window, 0)
    num_sinks = check_count("num_sinks", num_sinks, 0)
    first_head = check_count("first_head", first_head, 0)

    sequences, letters = batch, "[B]"
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
                raise TypeError(f"{name} must be an int32 Tensor, got {kind_of(cu)}")
            if cu.dim() != 1 or cu.shape[0] == 0:
                raise ValueError(f"{name} must be [n + 1], got {list(cu.shape)}")
            if cu.device != device:
                raise ValueError(f"{name} must be on {device}, got {cu.device}")
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_k must have as many sequences as cu_seqlens_q, "
                f"{cu_seqlens_q.shape[0] - 1}, got {cu_seqlens_k.shape[0] - 1}"
            )
        if batch != 1:
            raise ValueError(f"cu_seqlens_q must come with a batch of 1, got {batch}")
        sequences, letters = cu_seqlens_q.shape[0] - 1, "[sequences]"
    if sequence_ids is not None:
        check_tensor("sequence_ids", sequence_ids, torch.int64, (sequences,), letters, device)

    positions = None
    if isinstance(query_offset, Tensor):
        check_tensor("query_offset", query_offset, torch.int64, (sequences,), letters, device)
        row = torch.arange(num_queries, device=device)
        if cu_seqlens_q is None:
            positions = query_offset.unsqueeze(-1) + row
        else:
            place, offset = _place(cu_seqlens_q, row), _of_sequence(query_offset, cu_seqlens_q, row)
            positions = (place + offset).unsqueeze(0)
        query_offset = None
    elif query_offset is not None:
        query_offset = check_int("query_offset", query_offset)
        if not -MOST <= query_offset <= MOST:
            raise ValueError(f"query_offset must be between -2^31 and 2^31, got {query_offset}")
    return Visible(
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        global_mask=global_mask,
        query_offset=query_offset,
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sequence_ids=sequence_ids,
        first_head=first_head,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        device=device,
    )

"""The mask function: what transformers asks for in place of a mask of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

Rows = slice | Tensor  # a slice or int64 indices


@dataclass(frozen=True)
class Run:
    """Sequences of a call that lie alike, without padding.

    Attributes:
        batch: the elements of the batch they are.
        queries, keys: their rows of the call's queries and keys. The last query stands at the last
            key.
    """

    batch: slice
    queries: Rows
    keys: Rows


class RowMask:
    """What the rows of a call see, handed from the mask function to the attention function.

    Not a tensor, so that nothing else can be taken for it, and no N x M mask is made.

    Attributes:
        is_causal: a row sees the keys up to its position.
        num_queries, num_keys: N, and the keys that exist; a static cache holds more.
        reason: why attention over sampled keys cannot honour it; None: it can.
        runs: the sequences, empty where there is a reason.
    """

    ndim = 4  # transformers takes what has two dimensions for a mask of padding

    def __init__(
        self, arguments: dict[str, Any], num_queries: int, num_keys: int, is_causal: bool
    ) -> None:
        self._arguments = arguments
        self._native: dict[str, Any] = {}
        self.num_queries, self.num_keys, self.is_causal = num_queries, num_keys, is_causal
        self.reason: str | None = None
        self.runs: list[Run] = []

    def native(self, implementation: str) -> Any:
        """The mask that another attention implementation of transformers takes, made once."""
        if implementation not in self._native:
            make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            self._native[implementation] = make(**self._arguments)
        return self._native[implementation]

    def packed_runs(self, cu_seqlens: Tensor) -> list[Run]:
        """The sequences of a pack, int32 [n + 1] as FlashAttention takes them.

        Raises:
            ValueError: they are not the sequences of this call.
        """
        bounds = cu_seqlens.tolist()
        batch = self._arguments["batch_size"]
        if batch != 1 or self.num_keys != self.num_queries:
            raise ValueError(
                "cu_seq_lens_q must come with a batch of 1 and without a cache, got a batch of "
                f"{batch}, {self.num_queries} queries and {self.num_keys} keys"
            )
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.num_queries:
            raise ValueError(f"cu_seq_lens_q must go from 0 to {self.num_queries}, got {bounds}")
        told = [
            (run.queries.start, run.queries.stop)
            for run in self.runs
            if isinstance(run.queries, slice)
        ]
        pairs = list(pairwise(bounds))
        if len(told) < len(self.runs) or told not in (pairs, [(0, self.num_queries)]):
            raise ValueError(
                "cu_seq_lens_q must be the sequences that attention_mask and position_ids tell, "
                f"got {bounds}"
            )
        return _pack(0, bounds)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def row_mask(**arguments: Any) -> RowMask:
    """The mask function "smartbird" of transformers' AttentionMaskInterface."""
    given = arguments.get("attention_mask")
    if isinstance(given, RowMask):  # made before the forward pass, as generate() does
        return given
    if "cache_position" in arguments:  # what transformers 5.0 has in place of the next
        rows = arguments["cache_position"]
        offset, queries, device = int(rows[0]), rows.shape[0], rows.device
    else:
        # A static cache counts in a tensor, which its first layer changes.
        offset = arguments["q_offset"] = int(arguments["q_offset"])
        queries, device = arguments["q_length"], arguments.get("device", "cpu")
    batch, allocated = arguments["batch_size"], arguments["kv_length"]
    pattern = arguments.get("mask_function", causal_mask_function)
    is_causal = pattern is not bidirectional_mask_function
    keys = offset + queries
    mask = RowMask(arguments, queries, keys, is_causal)

    starts = None
    if arguments.get("local_size") is not None or arguments.get("kv_offset", 0) != 0:
        mask.reason = "its rows see a window or a chunk of the keys"
    elif arguments.get("use_vmap", False):
        mask.reason = "its mask is a pattern of the model's own"
    elif not is_causal and allocated != queries:
        mask.reason = "it attends to another sequence"
    elif allocated < keys:
        mask.reason = f"its cache holds {allocated} of {keys} keys"
    elif is_causal and pattern is not causal_mask_function:
        starts = None if keys != queries else _starts(pattern, batch, queries, device)
        if starts is None:
            mask.reason = "its mask is a pattern of the model's own"
    if mask.reason is not None:
        return mask

    if starts is not None:
        for element, begins in enumerate(starts):
            bounds = begins.nonzero().squeeze(-1).tolist()
            mask.runs += _pack(element, [*bounds, queries])
    elif given is None:
        mask.runs = _all(batch, queries, keys)
    else:
        if given.shape[0] != batch or given.shape[1] < keys:
            raise ValueError(
                f"attention_mask must be [B, M] = {[batch, keys]}, of cached and new tokens, got "
                f"{list(given.shape)}"
            )
        mask.runs = _padded(given[:, :keys].bool(), offset)
    return mask


def _all(batch: int, queries: int, keys: int) -> list[Run]:
    return [Run(slice(0, batch), slice(0, queries), slice(0, keys))]


def _pack(element: int, bounds: list[int]) -> list[Run]:
    """Sequences side by side in one element of the batch."""
    rows = [slice(begin, end) for begin, end in pairwise(bounds) if begin < end]
    return [Run(slice(element, element + 1), row, row) for row in rows]


def _padded(key_mask: Tensor, offset: int) -> list[Run]:
    """Of bool [B, M], where query 0 is key ``offset``: one run for each sequence, or one for all.

    Rows without a query are left out.
    """
    batch, keys = key_mask.shape
    if key_mask.all():
        return _all(batch, keys - offset, keys)
    runs = []
    for element, valid in enumerate(key_mask):
        index = valid.nonzero().squeeze(-1)
        queries = index[index >= offset] - offset
        if queries.numel() > 0:
            runs.append(Run(slice(element, element + 1), _slice(queries), _slice(index)))
    return runs


def _slice(index: Tensor) -> Rows:
    """Ascending indices as a slice, which copies nothing, if they lie side by side."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.numel() else index


def _starts(pattern: Any, batch: int, length: int, device: Any) -> Tensor | None:
    """Where the sequences of a causal pack begin, bool [B, N]; None: ``pattern`` is no such pack.

    transformers hands a function that says whether a pair is seen. It is asked for pairs that
    settle which kind it is, a few for each row.
    """
    row = torch.arange(length, device=device)
    element = torch.arange(batch, device=device).unsqueeze(-1)

    def sees(key: Tensor) -> Tensor:
        seen: Tensor = pattern(element, torch.zeros_like(element), row, key)
        return seen.expand(batch, length)

    follows = sees((row - 1).clamp(min=0)) & (row > 0)
    first = torch.where(follows, 0, row).cummax(-1).values
    ahead = sees((row + 1).clamp(max=length - 1)) & (row < length - 1)
    earlier = sees((first - 1).clamp(min=0)) & (first > 0)
    last = sees(torch.full_like(row, length - 1)) & (row < length - 1)
    if sees(row).all() and sees(first).all() and not (ahead | earlier | last).any():
        return ~follows
    return None

"""The mask function: what transformers asks for in place of a mask of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
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
        num_queries: N.
        start: int64 [], the key that query 0 stands at, where causality needs it and a cache counts
            in a tensor; None: what data say is known.
        key_mask: bool [B, L], False in padding; None: there is none.
        packed: the sequences of a pack; empty: each element of the batch is one.
        reason: why attention over sampled keys cannot honour it; None: it can.
    """

    ndim = 4  # transformers takes what has two dimensions for a mask of padding

    def __init__(self, arguments: dict[str, Any], num_queries: int, offset: int | Tensor) -> None:
        self._arguments = arguments
        self._native: dict[str, Any] = {}
        self._offset = offset
        self.packed: list[Run] = []
        self.num_queries = num_queries
        self.is_causal = arguments.get("mask_function") is not bidirectional_mask_function
        self.start = offset if isinstance(offset, Tensor) and self.is_causal else None
        self.key_mask: Tensor | None = None
        self.reason: str | None = None

    @cached_property
    def num_keys(self) -> int:
        """The keys that exist; a static cache holds more."""
        return int(self._offset) + self.num_queries

    @cached_property
    def runs(self) -> list[Run]:
        """The sequences of a mask without a reason."""
        if self.packed:
            return self.packed
        if self.key_mask is None:
            batch = self._arguments["batch_size"]
            return [Run(slice(0, batch), slice(0, self.num_queries), slice(0, self.num_keys))]
        return _padded(self.key_mask[:, : self.num_keys], self.num_keys - self.num_queries)

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


def row_mask(**arguments: Any) -> RowMask:
    """The mask function "smartbird" of transformers' AttentionMaskInterface.

    A graph can hold it where the cache counts its tokens in a tensor, as StaticCache does; what
    else depends on data breaks the graph.
    """
    given = arguments.get("attention_mask")
    if isinstance(given, RowMask):  # made before the forward pass, as generate() does
        return given
    if "cache_position" in arguments:  # what transformers 5.0 has in place of the next
        rows = arguments["cache_position"]
        offset, queries = rows[0].clone(), rows.shape[0]
    else:
        offset, queries = arguments["q_offset"], arguments["q_length"]
        if isinstance(offset, Tensor):
            # A static cache counts in a tensor, which its first layer changes.
            offset = arguments["q_offset"] = offset.clone()
    mask = RowMask(arguments, queries, offset)
    looks = mask.start is None or not torch.compiler.is_compiling()
    allocated = arguments["kv_length"]
    pattern = arguments.get("mask_function", causal_mask_function)

    if arguments.get("local_size") is not None or arguments.get("kv_offset", 0) != 0:
        mask.reason = "its rows see a window or a chunk of the keys"
    elif arguments.get("use_vmap", False):
        mask.reason = "its mask is a pattern of the model's own"
    elif not mask.is_causal and allocated != queries:
        mask.reason = "it attends to another sequence"
    elif looks and allocated < mask.num_keys:
        mask.reason = f"its cache holds {allocated} of {mask.num_keys} keys"
    elif mask.is_causal and pattern is not causal_mask_function:
        if looks and mask.num_keys == queries:
            _look_at_pack(mask, pattern, arguments)
        else:
            mask.reason = "its mask is a pattern of the model's own"
    elif given is not None:
        mask.key_mask = _look_at_padding(mask, given, arguments) if looks else given.bool()
    return mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _look_at_pack(mask: RowMask, pattern: Any, arguments: dict[str, Any]) -> None:
    """Find the sequences of a causal pack, or a reason."""
    rows = arguments.get("cache_position")
    device = arguments.get("device", "cpu") if rows is None else rows.device
    starts = _starts(pattern, arguments["batch_size"], mask.num_queries, device)
    if starts is None:
        mask.reason = "its mask is a pattern of the model's own"
        return
    for element, begins in enumerate(starts):
        bounds = begins.nonzero().squeeze(-1).tolist()
        mask.packed += _pack(element, [*bounds, mask.num_queries])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _look_at_padding(mask: RowMask, given: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Of all allocated keys, bool [B, M], those that exist and are real; None: all that exist."""
    batch, keys = arguments["batch_size"], mask.num_keys
    if given.shape[0] != batch or given.shape[1] < keys:
        raise ValueError(
            f"attention_mask must be [B, M] = {[batch, keys]}, of cached and new tokens, got "
            f"{list(given.shape)}"
        )
    real = given[:, :keys].bool()
    return None if real.all() else F.pad(real, (0, arguments["kv_length"] - keys))


def _pack(element: int, bounds: list[int]) -> list[Run]:
    """Sequences side by side in one element of the batch."""
    rows = [slice(begin, end) for begin, end in pairwise(bounds) if begin < end]
    return [Run(slice(element, element + 1), row, row) for row in rows]


def _padded(key_mask: Tensor, offset: int) -> list[Run]:
    """Of bool [B, M], where query 0 is key ``offset``: one for each element that has a query."""
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

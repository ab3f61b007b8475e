"""How the tokens of a sequence lie on the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """A sequence cut into blocks of equal size, of which every rank holds one or two.

    With ``head_tail`` there are 2 P blocks for P ranks, and rank r holds the blocks r and 2 P - 1 -
    r: causal queries see the more keys the later they stand, and these two together see as many as
    any other two. Otherwise there are P blocks, and rank r holds block r. Padding fills the last
    blocks up. So a rank's tokens stand in ascending order, and its padding at their end.

    Ranks send each other *parts*, [parts, B, C, block, F], those of rank 0 first.

    Attributes:
        rank, size: this one, and how many there are.
        head_tail: as above.
        length: tokens of the sequence, without padding.
    """

    rank: int
    size: int
    head_tail: bool
    length: int

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return -(-self.length // (self.size * (1 + self.head_tail)))

    @property
    def local(self) -> int:
        """Tokens of a rank, with padding."""
        return self.block * (1 + self.head_tail)

    @property
    def real(self) -> int:
        """Tokens of this rank without padding, its first."""
        return sum(self._real(number) for number in self._numbers(self.rank))

    def rows(self, device: torch.device | str | None = None) -> Tensor:
        """int64 [local]: where this rank's tokens stand; padding stands beyond the last token."""
        row = torch.arange(self.block, device=device)
        return torch.cat([row + n * self.block for n in self._numbers(self.rank)])

    # ---- tokens and parts ----

    def split(self, x: Tensor) -> Tensor:
        """[B, C, local, F] as this rank's parts, copied only where that needs it."""
        return torch.unflatten(x, 2, (-1, self.block)).movedim(2, 0).contiguous()

    def join(self, parts: Tensor) -> Tensor:
        """The way back."""
        return parts.movedim(0, 2).flatten(2, 3)

    def split_whole(self, x: Tensor) -> Tensor:
        """[B, C, length, F] as the parts of all ranks, with zeros for padding."""
        missing = self.size * self.local - self.length
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        parts = torch.split(x, self.block, 2)
        return torch.stack([parts[number] for number in self._order])

    def join_whole(self, parts: Tensor) -> Tensor:
        """The way back, without padding."""
        blocks = sorted(zip(self._order, parts.unbind(), strict=True), key=lambda block: block[0])
        return torch.cat([part[:, :, : self._real(number)] for number, part in blocks], 2)

    @cached_property
    def _order(self) -> list[int]:
        """The numbers of the blocks, those of rank 0 first."""
        return [number for rank in range(self.size) for number in self._numbers(rank)]

    def _numbers(self, rank: int) -> tuple[int, ...]:
        """The blocks of a rank."""
        return (rank, 2 * self.size - 1 - rank) if self.head_tail else (rank,)

    def _real(self, number: int) -> int:
        """Tokens of a block without padding."""
        return min(max(self.length - number * self.block, 0), self.block)

"""Rotary position embedding (arXiv 2104.09864), for queries, keys and their sketches alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smartbird._checks import check_number


class RotaryEmbedding(nn.Module):
    """Turns pairs of features by angles that grow with the position (arXiv 2104.09864).

    Feature i of the first half and feature i of the second half of a row at position p are turned
    by ``p * base ** (-2 i / width)``, so that a product of two turned rows depends on how far apart
    they are. Any even width is served, each by frequencies of its own: heads and sketches have
    different ones.

    Args:
        base: of the frequencies; the larger, the slower the last pair turns.

    Raises:
        ValueError: ``base`` is not positive.
        TypeError: ``base`` is no number.
    """

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        self.base = check_number("base", base)
        if not self.base > 0.0:
            raise ValueError(f"base must be positive, got {base}")

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn every row of ``x`` by its position.

        Args:
            x: [B, heads, length, width], width even.
            positions: int64 [length] or [B, length].

        Returns:
            The shape and dtype of ``x``; angles are computed in float32 (float64 for float64).

        Raises:
            ValueError: ``width`` is odd.
        """
        width = x.shape[-1]
        if width % 2:
            raise ValueError(f"x must have an even width to be turned in pairs, got {width}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponent = torch.arange(0, width, 2, dtype=dtype, device=x.device) / width
        # [length, width / 2], or [B, 1, length, width / 2] for all heads.
        angle = positions.unsqueeze(-1).to(dtype) * self.base**-exponent
        angle = angle.unsqueeze(-3) if positions.dim() == 2 else angle
        cos, sin = angle.cos(), angle.sin()
        first, second = x.to(dtype).chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype)

    def extra_repr(self) -> str:
        return f"base={self.base}"

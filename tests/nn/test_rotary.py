"""RotaryEmbedding against complex numbers."""

from __future__ import annotations

import pytest
import torch

from smartbird.nn import RotaryEmbedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_turns_pairs_by_their_position(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 50, width).to(dtype)
    positions = torch.randint(-3, 4000, (2, 50))
    half = width // 2
    frequency = 500.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None, :, None] * frequency
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1).to(dtype)
    rotary = RotaryEmbedding(base=500.0)
    # An angle of thousands, in float32, is off by some 1e-4.
    atol = {torch.float32: 2e-3, torch.float64: 1e-11, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(rotary(x, positions), expected, atol=atol, rtol=0)
    assert rotary(x, positions[0])[0].equal(rotary(x, positions)[0])


def test_products_depend_on_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 20, 8, dtype=torch.float64).unbind()
    rotary = RotaryEmbedding()
    positions = torch.arange(20)
    scores = [rotary(q, positions + shift) @ rotary(k, positions + shift).mT for shift in (0, 1000)]
    torch.testing.assert_close(*scores)


def test_what_cannot_be_turned_is_refused() -> None:
    with pytest.raises(ValueError, match="x must have an even width to be turned in pairs, got 3"):
        RotaryEmbedding()(torch.randn(1, 1, 2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="base must be positive, got 0"):
        RotaryEmbedding(0.0)
    with pytest.raises(TypeError, match="base must be a float, got str"):
        RotaryEmbedding("1e4")

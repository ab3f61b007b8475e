"""Which keys are drawn more than by chance, for reports. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smartbird.plot import draw_rates

_SURE = 5.0  # standard deviations of a number of draws from what chance gives


def key_rates(
    indices: Tensor,
    num_keys: int,
    *,
    forced: tuple[int, int] = (0, 0),
    is_causal: bool = False,
) -> list[float]:
    """How often each key is drawn, times chance at its place; 1 where that may be chance alone.

    Forced keys are left out, as nobody drew them. What of the others is less than five standard
    deviations above chance counts as chance: a sketch that knows nothing then shows nothing.

    Args:
        indices: int32 [..., N, K], -1 in unused places.
        num_keys: M, as many as there are queries.
        forced: nearest keys and leading keys that each row had to hold.
        is_causal: query i sees keys up to i only.
    """
    window, num_sinks = forced
    query = torch.arange(indices.shape[-2])[:, None]
    reach = window - 1 if is_causal else window // 2
    near = (
        (indices - query).abs() <= reach if window else torch.zeros_like(indices, dtype=torch.bool)
    )
    drawn = indices.masked_fill(near | (indices < num_sinks), -1)
    if not (drawn >= 0).any():
        return [1.0] * num_keys
    (rates,) = draw_rates(drawn, num_keys, is_causal=is_causal, cells=(1, num_keys))
    counts = drawn[drawn >= 0].long().bincount(minlength=num_keys)
    by_chance = (counts / rates).nan_to_num(0.0)
    is_sure = counts - by_chance > _SURE * by_chance.sqrt()
    return torch.where(is_sure, rates, 1.0).tolist()


def drawn_words(
    pieces: Sequence[str], begins: Sequence[bool], rates: Sequence[float]
) -> list[tuple[str, int, float]]:
    """Words that are drawn more than by chance: the word, its first token, the rate of its most
    drawn one; the most drawn first."""
    words: list[tuple[str, int, float]] = []
    for position, (piece, begin, rate) in enumerate(zip(pieces, begins, rates, strict=True)):
        if begin or not words:
            words.append((piece, position, rate))
        else:
            word, first, most = words[-1]
            words[-1] = (word + piece, first, max(most, rate))
    return sorted((word for word in words if word[2] > 1.0), key=lambda word: -word[2])

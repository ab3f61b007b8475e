"""What context parallelism knows without other ranks."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from smartbird._visible import check_visible
from smartbird.distributed._attention import parts_of_heads
from smartbird.distributed._shards import Shards
from smartbird.ops import sketch_lse

SIZES = (1, 2, 3, 4, 7, 64)
LENGTHS = (1, 5, 8, 37, 64, 129)


@pytest.mark.parametrize("head_tail", [False, True])
def test_shards_hold_every_token_once(head_tail: bool) -> None:
    for size, length in product(SIZES, LENGTHS):
        ranks = [Shards(rank, size, head_tail, length) for rank in range(size)]
        rows = [shards.rows() for shards in ranks]
        assert all((row.diff() > 0).all() and len(row) == ranks[0].local for row in rows)
        for shards, row in zip(ranks, rows, strict=True):
            assert (row[: shards.real] < length).all()
            assert (row[shards.real :] >= length).all()
        assert torch.cat(rows).unique().numel() == size * ranks[0].local
        assert ranks[0].local * size - length < size * (1 + head_tail)


@pytest.mark.parametrize("head_tail", [False, True])
def test_parts_go_together(head_tail: bool) -> None:
    for size, length in product(SIZES, LENGTHS):
        ranks = [Shards(rank, size, head_tail, length) for rank in range(size)]
        x = torch.randn(2, 3, length, 2)
        parts = ranks[0].split_whole(x)
        assert torch.equal(ranks[0].join_whole(parts), x)
        for shards, own in zip(ranks, parts.chunk(size), strict=True):
            local = shards.join(own)
            assert torch.equal(local[:, :, : shards.real], x[:, :, shards.rows()[: shards.real]])
            assert torch.equal(shards.split(local), own)


def test_head_and_tail_share_causal_work() -> None:
    seen = [Shards(rank, 8, True, 4096).rows().sum() for rank in range(8)]
    assert len({int(x) for x in seen}) == 1


@pytest.mark.parametrize(
    ("heads", "count"),
    [
        ((4, 8, 4), 4),
        ((4, 8, 1), 4),
        ((4, 8, 2), 4),
        ((4, 12, 3), 1),
        ((6, 12, 4), 2),
        ((1, 4, 2), 1),
        ((4, 4, 8, 2), 4),
    ],
)
def test_heads_are_cut_where_lists_allow(heads: tuple[int, ...], count: int) -> None:
    parts = parts_of_heads(*heads)
    assert len(parts) == count
    for heads_of, slices in zip(heads, zip(*parts, strict=True), strict=True):
        for number, part in enumerate(slices):
            for head in range(heads_of):
                # Head h of n belongs to part h * count // n, or has the part in its share.
                inside = (
                    number * heads_of // count <= head <= ((number + 1) * heads_of - 1) // count
                )
                assert (part.start <= head < part.stop) == inside


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_with_free_keys_are_those_with_a_normaliser(is_causal: bool, packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for window, num_sinks, masked in product((0, 1, 4), (0, 2), (False, True)):
        batch, length = (1, 23) if packed else (3, 9)
        options = {"is_causal": is_causal, "window": window, "num_sinks": num_sinks}
        if masked:
            options["key_mask"] = torch.rand(batch, length, generator=generator) < 0.4
            options["global_mask"] = torch.rand(batch, length, generator=generator) < 0.2
        if packed:
            cu = torch.tensor([0, 0, 3, 12, 13, 21], dtype=torch.int32)
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        sketch = torch.randn(batch, length, 2, generator=generator)
        visible = check_visible(batch, length, length, sketch.device, **options)
        expected = sketch_lse(sketch, sketch, **options) != -torch.inf
        assert torch.equal(visible.residual().has_free_key(), expected)

"""Index builders against sets of keys written down one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smartbird import ops, patterns
from smartbird.patterns import bigbird_indices, oracle_indices, random_indices, window_indices

SIZES = [(9, 9), (4, 9), (9, 4), (1, 1), (0, 5)]


def make_mask(num_keys: int) -> Tensor:
    """Key mask of two sequences, the second without any key."""
    return torch.stack([torch.rand(num_keys) < 0.6, torch.zeros(num_keys, dtype=torch.bool)])


def valid_keys(
    batch: int, row: int, num_queries: int, num_keys: int, is_causal: bool, mask: Tensor | None
) -> list[int]:
    last = row + num_keys - num_queries if is_causal else num_keys - 1
    return [j for j in range(num_keys) if j <= last and (mask is None or bool(mask[batch, j]))]


def keys_of(row: Tensor) -> list[int]:
    """The keys of one row, having checked that they are ascending and -1 comes last."""
    keys = [int(j) for j in row if j >= 0]
    assert row.tolist() == sorted(set(keys)) + [-1] * (len(row) - len(keys))
    return keys


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 6])
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_window(
    num_queries: int, num_keys: int, window: int, is_causal: bool, masked: bool
) -> None:
    mask = make_mask(num_keys) if masked else None
    indices = window_indices(num_queries, num_keys, window, is_causal=is_causal, key_mask=mask)
    width = window if is_causal else 2 * (window // 2) + 1
    assert indices.dtype == torch.int32
    assert indices.shape == (1 if mask is None else 2, 1, num_queries, width)
    for batch in range(indices.shape[0]):
        for row in range(num_queries):
            at = row + num_keys - num_queries
            near = range(at - window + 1, at + 1)
            if not is_causal:
                near = range(at - window // 2, at + window // 2 + 1)
            valid = valid_keys(batch, row, num_queries, num_keys, is_causal, mask)
            assert keys_of(indices[batch, 0, row]) == [j for j in valid if j in near]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_bigbird(num_queries: int, num_keys: int, is_causal: bool, masked: bool) -> None:
    mask = make_mask(num_keys) if masked else None
    indices = bigbird_indices(
        num_queries,
        num_keys,
        6,
        window=3,
        num_sinks=2,
        num_index_heads=3,
        is_causal=is_causal,
        key_mask=mask,
    )
    assert indices.shape == (1 if mask is None else 2, 3, num_queries, 6)
    window = window_indices(num_queries, num_keys, 3, is_causal=is_causal, key_mask=mask)
    for batch in range(indices.shape[0]):
        for row in range(num_queries):
            valid = valid_keys(batch, row, num_queries, num_keys, is_causal, mask)
            certain = set(valid[:2]) | set(keys_of(window[batch, 0, row]))
            for head in range(3):
                keys = keys_of(indices[batch, head, row])
                assert certain <= set(keys) <= set(valid)
                assert len(keys) == min(6, len(valid))


def test_random_keys_are_equally_likely() -> None:
    indices = random_indices(4000, 10, 3, seed=torch.tensor([5, 0]))
    share = indices.flatten().bincount(minlength=10) / 4000
    # Each share has mean 0.3 and standard deviation sqrt(0.3 * 0.7 / 4000) = 0.007.
    torch.testing.assert_close(share, torch.full((10,), 0.3), atol=0.03, rtol=0)


def test_random_is_a_function_of_its_seed() -> None:
    draws = [random_indices(20, 50, 4, seed=torch.tensor([s, 0])) for s in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    heads = random_indices(20, 50, 4, num_index_heads=2)
    assert not heads[:, 0].equal(heads[:, 1])


@pytest.mark.parametrize("max_scores", [1, 100, 1 << 24])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_oracle(
    monkeypatch: pytest.MonkeyPatch,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    masked: bool,
    max_scores: int,
) -> None:
    monkeypatch.setattr(patterns, "_MAX_SCORES", max_scores)
    mask = make_mask(num_keys) if masked else None
    q, k = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, num_keys, 8)
    indices = oracle_indices(q, k, 3, is_causal=is_causal, key_mask=mask)
    assert indices.dtype == torch.int32
    assert indices.shape == (2, 4, num_queries, 3)
    scores = q @ k.repeat_interleave(2, dim=1).mT
    for batch in range(2):
        for row in range(num_queries):
            valid = valid_keys(batch, row, num_queries, num_keys, is_causal, mask)
            for head in range(4):
                best = sorted(valid, key=lambda j: -scores[batch, head, row, j])[:3]
                assert keys_of(indices[batch, head, row]) == sorted(best)


@pytest.mark.parametrize("is_causal", [False, True])
def test_patterns_feed_gather_attention(is_causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    for indices in (
        window_indices(9, 9, 3, is_causal=is_causal),
        random_indices(9, 9, 3, num_index_heads=4, is_causal=is_causal),
        bigbird_indices(9, 9, 5, window=1, num_sinks=1, num_index_heads=2, is_causal=is_causal),
    ):
        out = ops.gather_attention(q, k, v, indices.expand(2, -1, -1, -1))
        assert out.shape == q.shape
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: window_indices(4, 4, 0), ValueError, "window"),
        (lambda: window_indices(4, 4, 1, key_mask=torch.ones(2, 4)), TypeError, "key_mask"),
        (
            lambda: window_indices(4, 4, 1, key_mask=torch.ones(2, 5, dtype=torch.bool)),
            ValueError,
            "key_mask",
        ),
        (lambda: random_indices(4, 4, 0), ValueError, "num_samples"),
        (lambda: random_indices(4, 4, 2, key_mask=torch.ones(2, 4)), TypeError, "key_mask"),
        (lambda: bigbird_indices(4, 4, 2, window=2, num_sinks=2), ValueError, "window"),
        (
            lambda: oracle_indices(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0),
            ValueError,
            "num_samples",
        ),
        (
            lambda: oracle_indices(torch.randn(1, 3, 3, 4), torch.randn(1, 2, 3, 4), 2),
            ValueError,
            "multiple",
        ),
        (
            lambda: oracle_indices(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5), 2),
            ValueError,
            "q and k must",
        ),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call()

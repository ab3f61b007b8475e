"""Index builders against sets of keys written down one row at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smartbird import ops, patterns
from smartbird.patterns import (
    bigbird_indices,
    oracle_indices,
    random_indices,
    routing_indices,
    strided_indices,
    update_centroids,
    window_indices,
)

ONE = torch.eye(4)[:1, None]  # one centroid of one head
SIZES = [(9, 9), (4, 9), (9, 4), (1, 1), (0, 5), (5, 0)]


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize(("num_samples", "heads"), [(1, 1), (4, 1), (5, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [*SIZES, (40, 40)])
def test_strided(
    num_queries: int,
    num_keys: int,
    num_samples: int,
    heads: int,
    stride: int | None,
    is_causal: bool,
    masked: bool,
) -> None:
    num_strided = num_samples // 2 if heads == 1 else num_samples
    num_local = num_samples - num_strided if heads == 1 else num_samples
    least = max(1, -(-num_keys // num_strided)) if num_strided else 1
    stride = None if stride is None else max(stride, least)
    mask = make_mask(num_keys) if masked else None
    indices = strided_indices(
        num_queries,
        num_keys,
        num_samples,
        num_index_heads=heads,
        stride=stride,
        is_causal=is_causal,
        key_mask=mask,
    )
    assert indices.dtype == torch.int32
    assert indices.shape == (1 if mask is None else 2, heads, num_queries, num_samples)
    for batch in range(indices.shape[0]):
        for row in range(num_queries):
            at = row + num_keys - num_queries
            start = at - num_local + 1 if is_causal else at - num_local // 2
            local = set(range(start, start + num_local))
            far = {j for j in range(num_keys) if (at - j) % (stride or least) == 0}
            valid = valid_keys(batch, row, num_queries, num_keys, is_causal, mask)
            for head in range(heads):
                expected = local if head < (heads + 1) // 2 else far
                if heads == 1:
                    expected = local | far if num_strided else local
                assert keys_of(indices[batch, head, row]) == [j for j in valid if j in expected]


def test_a_strided_and_a_local_step_reach_every_earlier_key() -> None:
    num_keys, num_samples = 60, 8  # at most num_samples ** 2 keys
    indices = strided_indices(num_keys, num_keys, num_samples, num_index_heads=2, is_causal=True)
    indices = indices[0].long()
    reach = torch.zeros(2, num_keys, num_keys + 1)
    reach = reach.scatter_(-1, indices.where(indices >= 0, num_keys), 1.0)[..., :num_keys]
    joined = reach[1] @ reach[0] > 0
    assert joined.equal(torch.ones(num_keys, num_keys, dtype=torch.bool).tril())


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


def unit(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=0.0) / x.shape[-1] ** 0.5


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_samples", [1, 3, 12])
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_routing(
    monkeypatch: pytest.MonkeyPatch,
    num_queries: int,
    num_keys: int,
    num_samples: int,
    is_causal: bool,
    masked: bool,
    block: int,
) -> None:
    monkeypatch.setattr(patterns, "_ROUTED_KEYS", block)
    monkeypatch.setattr(patterns, "_MAX_SCORES", 100)
    mask = make_mask(num_keys) if masked else None
    q, k = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, num_keys, 8)
    if mask is not None:
        k[~mask[:, None].expand(2, 2, -1)] = torch.nan
    centroids = F.normalize(torch.randn(4, 3, 8), dim=-1)
    indices = routing_indices(q, k, centroids, num_samples, is_causal=is_causal, key_mask=mask)
    assert indices.dtype == torch.int32
    assert indices.shape == (2, 4, num_queries, num_samples)
    for batch in range(2):
        for row in range(num_queries):
            valid = valid_keys(batch, row, num_queries, num_keys, is_causal, mask)
            own = row + num_keys - num_queries
            for head in range(4):
                cluster = int((centroids[head] @ unit(q[batch, head, row])).argmax())
                affinity = unit(k[batch, head // 2]) @ centroids[head, cluster]
                chosen = sorted(valid, key=lambda j: -float(affinity[j]))[:num_samples]
                if own in valid and own not in chosen:
                    chosen[-1] = own
                assert keys_of(indices[batch, head, row]) == sorted(chosen)


def test_later_tokens_do_not_change_what_causal_routing_chooses() -> None:
    q, k = torch.randn(2, 1, 2, 40, 8).unbind()
    centroids = F.normalize(torch.randn(2, 5, 8), dim=-1)
    whole = routing_indices(q, k, centroids, 4, is_causal=True)
    part = routing_indices(q[:, :, :25], k[:, :, :25], centroids, 4, is_causal=True)
    assert whole[:, :, :25].equal(part)


def test_centroids_find_separated_clusters() -> None:
    # Orthogonal directions of mean 0, as layer normalisation leaves them: rows of a DFT.
    angle = 2 * torch.pi * torch.arange(16) * torch.arange(1, 5)[:, None] / 16
    directions = unit(angle.cos()).expand(2, 4, 16)
    label = torch.randint(4, (3, 2, 50))
    x = 7.0 * directions[0][label] + 0.1 * torch.randn(3, 2, 50, 16)
    # Each starts nearer to its own direction than to the others, and far from it.
    centroids = start = F.normalize(directions + 0.2 * torch.randn(2, 4, 16), dim=-1)
    for _ in range(60):
        centroids = update_centroids(centroids, x, decay=0.9)
    torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(2, 4))
    # Cosines: the noise has 0.1 / 7 of the length in each dimension, averaged over the members.
    assert (start * directions).sum(-1).max() < 0.95
    assert (centroids * directions).sum(-1).min() > 0.999


def test_a_step_of_the_centroids() -> None:
    x = torch.randn(2, 3, 20, 8)
    mask = torch.rand(2, 20) < 0.5
    x[~mask[:, None].expand(2, 3, -1)] = torch.nan
    centroids = F.normalize(torch.randn(3, 5, 8), dim=-1)
    centroids[:, 4] = centroids[:, 3]  # ties go to the first: no members
    moved = update_centroids(centroids, x, decay=0.75, key_mask=mask)
    for head in range(3):
        tokens = unit(x[:, head][mask])
        cluster = (tokens @ centroids[head].mT).argmax(-1)
        assert 4 not in cluster
        for c in range(5):
            expected = centroids[head, c]
            if c in cluster:
                mean = F.normalize(tokens[cluster == c].mean(0), dim=0)
                expected = F.normalize(0.75 * expected + 0.25 * mean, dim=0)
            torch.testing.assert_close(moved[head, c], expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_patterns_feed_gather_attention(is_causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    for indices in (
        window_indices(9, 9, 3, is_causal=is_causal),
        random_indices(9, 9, 3, num_index_heads=4, is_causal=is_causal),
        bigbird_indices(9, 9, 5, window=1, num_sinks=1, num_index_heads=2, is_causal=is_causal),
        strided_indices(9, 9, 3, num_index_heads=2, is_causal=is_causal),
        routing_indices(q, k, F.normalize(torch.randn(4, 3, 8), dim=-1), 3, is_causal=is_causal),
    ):
        out = ops.gather_attention(q, k, v, indices.expand(2, -1, -1, -1))
        assert out.shape == q.shape
        assert out.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_sequences(is_causal: bool) -> None:
    q, k = torch.randn(0, 4, 6, 8), torch.randn(0, 2, 6, 8)
    mask = torch.ones(0, 6, dtype=torch.bool)
    centroids = F.normalize(torch.randn(4, 3, 8), dim=-1)
    for indices in (
        oracle_indices(q, k, 3, is_causal=is_causal),
        routing_indices(q, k, centroids, 3, is_causal=is_causal),
        window_indices(6, 6, 3, is_causal=is_causal, key_mask=mask),
        strided_indices(6, 6, 3, is_causal=is_causal, key_mask=mask),
        random_indices(6, 6, 3, is_causal=is_causal, key_mask=mask),
    ):
        assert (indices.dtype, indices.shape[0], *indices.shape[2:]) == (torch.int32, 0, 6, 3)
    torch.testing.assert_close(update_centroids(centroids, q), centroids)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: window_indices(4, 4, 0), ValueError, "window"),
        (lambda: window_indices(4, 4, 2.5), TypeError, "window"),
        (lambda: window_indices(-1, 4, 2), ValueError, "num_queries"),
        (lambda: window_indices(4, 4, 2, key_mask=[True]), TypeError, "key_mask"),
        (lambda: window_indices(4, 4, 2, is_causal="no"), TypeError, "is_causal"),
        (lambda: strided_indices(4, -1, 2), ValueError, "num_keys"),
        (lambda: strided_indices(4, 4, 2, stride=2.0), TypeError, "stride"),
        (lambda: random_indices(4, 4.0, 2), TypeError, "num_keys"),
        (lambda: oracle_indices(*torch.randn(2, 1, 2, 3, 4), 2.0), TypeError, "num_samples"),
        (
            lambda: oracle_indices(*torch.randn(2, 1, 2, 3, 4), 2, is_causal=1),
            TypeError,
            "is_causal",
        ),
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
        (lambda: strided_indices(4, 4, 0), ValueError, "num_samples"),
        (lambda: strided_indices(4, 4, 2, num_index_heads=0), ValueError, "num_index_heads"),
        (lambda: strided_indices(9, 9, 2, num_index_heads=2, stride=4), ValueError, "stride"),
        (lambda: strided_indices(4, 4, 1, key_mask=torch.ones(2, 4)), TypeError, "key_mask"),
        (
            lambda: routing_indices(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), ONE, 0),
            ValueError,
            "num_samples",
        ),
        (
            lambda: routing_indices(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), ONE, 2),
            ValueError,
            "centroids",
        ),
        (
            lambda: oracle_indices(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4).double(), 2),
            TypeError,
            "k must have the dtype of q",
        ),
        (
            lambda: routing_indices(
                torch.randn(1, 1, 3, 4).double(), torch.randn(1, 1, 3, 4).double(), ONE, 2
            ),
            TypeError,
            "centroids",
        ),
        (lambda: update_centroids(ONE, torch.randn(1, 1, 3, 5)), ValueError, "centroids"),
        (lambda: update_centroids(ONE[:, :0], torch.randn(1, 1, 3, 4)), ValueError, "centroids"),
        (lambda: update_centroids(ONE, torch.randn(1, 1, 3, 4), decay=1.0), ValueError, "decay"),
        (
            lambda: update_centroids(ONE, torch.randn(1, 1, 3, 4), key_mask=torch.ones(1, 3)),
            TypeError,
            "key_mask",
        ),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call()

"""sketch_sample: the keys it may draw, the law it draws them by, and log_inclusion.

The laws are computed here from the definition and hold for the reference and the compiled extension
alike. Seeds are fixed, so a test passes or fails for good; thresholds are set so that a right
implementation fails at no more than about one seed in 10^4.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASE, CASES, DTYPES, METHODS, PROBLEMS, Backend, Case, at_night, make_inputs
from scipy import special, stats
from torch import Tensor

from smartbird import reference

both = pytest.mark.parametrize("backend", ["reference", "ops"], indirect=True)
DISTINCT = ("gumbel", "systematic", "topk")
RANDOM = ("gumbel", "systematic", "multinomial")
SMALLEST_P_VALUE = 1e-4

# Rows of scores. All but one have a few keys close to each other so that every set occurs.
ROWS = {
    "uniform": [0.0, 0.0, 0.0, 0.0, 0.0],
    "falling": [0.0, -0.7, -1.4, -2.1, -2.8],
    "uneven": [0.3, 2.0, -1.0, 0.0, 1.1, -0.2],
    # So many keys that CUDA draws among them; of the others each runs by itself.
    "many": [0.5, 1.2, -0.8, 0.0, 0.9, -0.3, 0.2, -1.5, 1.0, 0.1, -0.6, 0.4],
    # One key holds all but 1e-8 of the mass: the others are drawn by their own ratios.
    "peaked": [-18.5, 0.0, -19.0, -20.0, -18.0],
    # The third and fourth draw are decided far below the smallest float32, exp(-103).
    "spread": [-150.4, -200.0, 0.0, -150.0, -50.0, -151.0],
}


def sample_row(
    backend: Backend,
    scores: Sequence[float],
    num_samples: int,
    *,
    repeats: int,
    num_index_heads: int = 1,
    seed: tuple[int, int] = (11, 5),
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """``repeats`` draws from one row: indices and log_inclusion [repeats, H_i, K]."""
    k_sketch = torch.tensor(scores, dtype=torch.float32, device=backend.device).view(1, -1, 1)
    indices, log_inclusion = backend.ops.sketch_sample(
        torch.ones(1, repeats, 1, device=backend.device),
        k_sketch,
        num_samples,
        num_index_heads=num_index_heads,
        scale=1.0,
        seed=torch.tensor(seed, device=backend.device),
        **kwargs,
    )
    return indices[0].transpose(0, 1).cpu(), log_inclusion[0].transpose(0, 1).cpu()


# The exact laws: probability of each ascending tuple of keys.

Law = dict[tuple[int, ...], float]


def successive_law(scores: Sequence[float], k: int) -> Law:
    """Draw one key after the other without replacement, each from the softmax of what is left."""
    law: Law = defaultdict(float)
    for order in itertools.permutations(range(len(scores)), k):
        left = list(range(len(scores)))
        log_prob = 0.0
        for key in order:
            log_prob += scores[key] - special.logsumexp([scores[j] for j in left])
            left.remove(key)
        law[tuple(sorted(order))] += math.exp(log_prob)
    return law


def inclusion_probabilities(scores: Sequence[float], k: int) -> np.ndarray:
    """min(1, c p) with sum k: keys above 1 are set to 1 until none is."""
    pi = np.zeros(len(scores))
    certain: set[int] = set()
    while True:
        rest = [j for j in range(len(scores)) if j not in certain]
        pi[rest] = (k - len(certain)) * special.softmax([scores[j] for j in rest])
        above = {j for j in rest if pi[j] > 1.0}
        if not above:
            return pi
        certain |= above
        pi[list(above)] = 1.0


def systematic_law(scores: Sequence[float], k: int) -> Law:
    """The set is constant between the values of u at which a running sum is an integer away."""
    passed = np.concatenate([[0.0], np.cumsum(inclusion_probabilities(scores, k))])
    edges = np.unique(np.concatenate([[0.0, 1.0], passed % 1.0]))
    law: Law = defaultdict(float)
    for low, high in itertools.pairwise(edges):
        steps = np.ceil(passed - (low + high) / 2)
        law[tuple(np.flatnonzero(np.diff(steps)).tolist())] += high - low
    return law


def multinomial_law(scores: Sequence[float], k: int) -> Law:
    law: Law = defaultdict(float)
    p = special.softmax(scores)
    for draws in itertools.product(range(len(scores)), repeat=k):
        law[tuple(sorted(draws))] += float(np.prod(p[list(draws)]))
    return law


LAWS = {
    "gumbel": successive_law,
    "systematic": systematic_law,
    "multinomial": multinomial_law,
}


def p_value(observed: Counter[tuple[int, ...]], law: Law) -> float:
    """Chi-square; outcomes expected fewer than five times are pooled, and impossible ones fail."""
    total = observed.total()
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    assert all(law.get(outcome, 0.0) > 1e-12 for outcome in observed)
    cells, pooled = [], [0.0, 0.0]
    for outcome, probability in law.items():
        cell = (observed[outcome], probability * total)
        if cell[1] < 5.0:
            pooled = [pooled[0] + cell[0], pooled[1] + cell[1]]
        else:
            cells.append(cell)
    if pooled[1] >= 1.0:
        cells.append((pooled[0], pooled[1]))
    elif pooled[0] > 0:
        return float(stats.poisson.sf(pooled[0] - 1, pooled[1]))
    if len(cells) == 1:
        return 1.0
    counts, expected = np.array(cells).T
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


@pytest.mark.one_order
@both
@pytest.mark.parametrize("k", [at_night(1, "slow_emulated"), 3, at_night(4, "slow_emulated")])
@pytest.mark.parametrize(
    "row",
    [
        row if row in ("peaked", "uneven", "many") else at_night(row, "slow_emulated")
        for row in ROWS
    ],
)
@pytest.mark.parametrize("method", RANDOM)
def test_law_of_the_set(backend: Backend, method: str, row: str, k: int) -> None:
    indices, _ = sample_row(backend, ROWS[row], k, repeats=10_000, num_index_heads=2, method=method)
    observed = Counter(tuple(keys) for keys in indices.flatten(0, 1).tolist())
    assert p_value(observed, LAWS[method](ROWS[row], k)) > SMALLEST_P_VALUE


@pytest.mark.one_order
@both
@pytest.mark.parametrize(
    "deviation", [at_night(0.5, "slow_emulated"), 3, at_night(8, "slow_emulated")]
)
@pytest.mark.parametrize("method", RANDOM)
def test_inclusion_in_a_long_row(backend: Backend, method: str, deviation: float) -> None:
    """Mean number of draws of every key, where running sums span blocks. Sketches that have not
    learned have flat rows; at a deviation of 8, a few keys of 1000 hold nearly all of the mass."""
    rng = np.random.default_rng(3)
    scores = np.concatenate([rng.normal(size=700), rng.normal(size=300) * deviation])
    scores = scores.astype(np.float32)
    k, repeats = 24, 4000
    indices, log_inclusion = sample_row(backend, scores.tolist(), k, repeats=repeats, method=method)
    counts = torch.bincount(indices.flatten(), minlength=len(scores)).numpy()
    if method == "gumbel":
        # No closed form: simulated, so the expectation has its own variance.
        race = scores + rng.gumbel(size=(repeats, len(scores)))
        chosen = np.argpartition(-race, k, axis=1)[:, :k]
        expected = np.bincount(chosen.ravel(), minlength=len(scores)).astype(float)
        variance = np.maximum(counts + expected, 25.0)
    elif method == "systematic":
        expected = repeats * inclusion_probabilities(scores.tolist(), k)
        variance = np.maximum(expected, 25.0)
    else:
        expected = repeats * k * special.softmax(scores)
        variance = np.maximum(expected, 25.0)
    # A bound of 5.5 standard deviations on 1000 keys, with a floor for the keys of a few draws.
    assert (np.abs(counts - expected) < 5.5 * np.sqrt(variance)).all()
    # And together: a small bias over many keys shows in the mean square, whose expectation is 1.
    often = expected > 5
    ratio = ((counts - expected) ** 2 / variance)[often].mean()
    assert ratio < 1 + 5 * math.sqrt(2 / often.sum())
    # Weighted by 1 / inclusion, every key counts once on average.
    weight = torch.exp(-log_inclusion.double()).flatten()
    keys = indices.flatten().long()
    total, square = (
        torch.zeros(len(scores), dtype=torch.float64).scatter_add_(0, keys, x).numpy()
        for x in (weight, weight**2)
    )
    seen = counts > 200
    error = np.abs(total / repeats - 1)[seen]
    assert (error < 5.5 * np.sqrt(square[seen]) / repeats + 1e-5).all()


@both
@pytest.mark.one_order
def test_keys_that_are_tiny_but_not_beside_the_last_place(backend: Backend) -> None:
    """One key holds all but 1e-24 of the mass; the second place is open between all others."""
    scores = [0.0, -56.87, -56.87] + [-59.97] * 10
    indices, _ = sample_row(backend, scores, 2, repeats=20_000, method="gumbel")
    observed = Counter(tuple(keys) for keys in indices[:, 0].tolist())
    assert p_value(observed, successive_law(scores, 2)) > SMALLEST_P_VALUE


@pytest.mark.slow_emulated
@pytest.mark.parametrize("method", RANDOM)
def test_no_key_beyond_the_last(backend: Backend, method: str) -> None:
    """Rounding within the last block, which is full, must not lead out of it: once in 1e6."""
    k_sketch = torch.randn(1, 32, 1, generator=torch.Generator().manual_seed(0)) * 0.3
    q_sketch = torch.ones(1, 100_000, 1)
    for seed in (1, 2):
        indices, _ = backend.ops.sketch_sample(
            q_sketch.to(backend.device),
            k_sketch.to(backend.device),
            8,
            num_index_heads=8,
            method=method,
            scale=1.0,
            seed=torch.tensor([seed, 1], device=backend.device),
        )
        assert indices.min() >= 0
        assert indices.max() <= 31


@both
@pytest.mark.one_order
@pytest.mark.parametrize("row", [at_night("falling", "slow_emulated"), "uneven"])
@pytest.mark.parametrize("method", RANDOM)
def test_heads_rows_and_batch_elements_are_independent(
    backend: Backend, method: str, row: str
) -> None:
    """The sets of two heads, two rows or two batch elements have no association."""
    repeats = 4000
    k_sketch = torch.tensor(ROWS[row], device=backend.device).view(1, -1, 1).expand(2, -1, 1)
    indices, _ = backend.ops.sketch_sample(
        torch.ones(2, repeats, 1, device=backend.device),
        k_sketch,
        2,
        num_index_heads=3,
        scale=1.0,
        method=method,
        seed=torch.tensor([2, 9], device=backend.device),
    )
    number = (indices[..., 0] * 8 + indices[..., 1]).cpu().numpy()  # [B, H_i, N]
    pairs = {
        "heads 0, 1": (number[:, 0], number[:, 1]),
        "heads 1, 2": (number[:, 1], number[:, 2]),
        "rows": (number[..., :-1], number[..., 1:]),
        "batch": (number[0], number[1]),
    }
    for name, (a, b) in pairs.items():
        table = stats.contingency.crosstab(a.ravel(), b.ravel()).count
        frequent = table[table.sum(1) > 200][:, table.sum(0) > 200]
        assert frequent.shape[0] > 1, name
        assert stats.chi2_contingency(frequent).pvalue > SMALLEST_P_VALUE, name


@both
@pytest.mark.parametrize("method", RANDOM)
def test_seeds_give_different_draws(backend: Backend, method: str) -> None:
    scores = np.linspace(0.0, 2.0, 64).tolist()
    rows = {
        seed: sample_row(backend, scores, 8, repeats=50, seed=seed, method=method)[0]
        for seed in [(11, 5), (11, 6), (12, 5), (-1, 2**40)]
    }
    for a, b in itertools.combinations(rows, 2):
        same = (rows[a] == rows[b]).all(-1).float().mean()
        assert same < 0.2, (a, b)


# log_inclusion.


@pytest.mark.slow_emulated
@both
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", RANDOM)
def test_horvitz_thompson_is_unbiased(backend: Backend, method: str, row: str, k: int) -> None:
    """E of the sum over entries on key j of 1 / exp(log_inclusion) is 1, for every key j."""
    scores = ROWS[row]
    indices, log_inclusion = sample_row(backend, scores, k, repeats=40_000, method=method)
    indices, weight = indices[:, 0].numpy(), np.exp(-log_inclusion[:, 0].double().numpy())
    p = special.softmax(scores)
    seen = False
    for key in range(len(scores)):
        estimates = (weight * (indices == key)).sum(1)
        if (estimates > 0).sum() < 200:
            continue  # too rare for a normal approximation of the mean
        seen = True
        error = abs(estimates.mean() - 1.0)
        assert error <= 4.5 * estimates.std() / math.sqrt(len(estimates)) + 1e-6, key
    assert seen
    # The sum of p_j x_j, as attention uses it, with the rare keys in.
    x = np.linspace(-1.0, 2.0, len(scores))
    estimates = (weight * (p * x)[indices]).sum(1)
    error = abs(estimates.mean() - p @ x)
    assert error <= 4.5 * estimates.std() / math.sqrt(len(estimates)) + 1e-6


@both
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("k", [1, 3])
def test_log_inclusion_is_the_closed_form(backend: Backend, row: str, k: int) -> None:
    scores = torch.tensor(ROWS[row], dtype=torch.float64)
    pi = torch.from_numpy(inclusion_probabilities(ROWS[row], k)).log()
    laws = {
        "systematic": pi,
        "multinomial": math.log(k) + scores.log_softmax(0),
        "topk": torch.zeros_like(scores),
    }
    for method, expected in laws.items():
        indices, log_inclusion = sample_row(backend, ROWS[row], k, repeats=500, method=method)
        # float32 scores of up to 200, then a log of float32 sums.
        torch.testing.assert_close(log_inclusion.double(), expected[indices], rtol=1e-5, atol=1e-5)


@pytest.mark.one_order
@both
@pytest.mark.parametrize("row", ["uniform", "falling", "many"])
@pytest.mark.parametrize("k", [at_night(1, "slow_emulated"), 3, at_night(4, "slow_emulated")])
def test_gumbel_log_inclusion_comes_from_one_kappa(backend: Backend, row: str, k: int) -> None:
    """Solved for kappa, every key of a draw gives the same, and it is the (k+1)-th of a race."""
    log_p = torch.tensor(ROWS[row], dtype=torch.float64).log_softmax(0)
    repeats = 20_000
    indices, log_inclusion = sample_row(backend, ROWS[row], k, repeats=repeats, method="gumbel")
    indices, log_inclusion = indices[:, 0], log_inclusion[:, 0].double()
    kappa = log_p[indices] - (-(-log_inclusion.expm1()).log()).log()
    # Nearer to 0 than this, float32 rounding of log_inclusion leaves too little of kappa.
    known = log_inclusion < -1e-6
    low = kappa.masked_fill(~known, math.inf).amin(-1)
    high = kappa.masked_fill(~known, -math.inf).amax(-1)
    rows = known.any(-1)
    assert rows.double().mean() > 0.99
    assert (high - low)[rows].max() < 1e-2
    race = log_p.numpy() + np.random.default_rng(5).gumbel(size=(repeats, len(log_p)))
    exact = np.sort(race, axis=1)[:, len(log_p) - 1 - k]
    assert stats.ks_2samp(low[rows].numpy(), exact).pvalue > SMALLEST_P_VALUE


# Which keys, for every case and dtype.


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        *(pytest.param("ops", *problem.values, id=f"ops-{problem.id}") for problem in PROBLEMS),
        *(pytest.param("reference", case, torch.float32, id=f"reference-{case}") for case in CASES),
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("method", METHODS)
def test_structure(backend: Backend, case: Case, method: str, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)
    indices, log_inclusion = backend.ops.sketch_sample(
        x.q_sketch, x.k_sketch, case.K, method=method, **x.sampling()
    )
    shape = (case.B, case.H_i, case.N, case.K)
    assert (indices.shape, log_inclusion.shape) == (shape, shape)
    assert (indices.dtype, log_inclusion.dtype) == (torch.int32, torch.float32)
    assert not indices.requires_grad

    rows_valid, rows_forced = (
        [[set() for _ in range(case.N)] for _ in range(case.B)] for _ in "vf"
    )
    for rows, keys in zip((rows_valid, rows_forced), x.valid_and_forced(case.K), strict=True):
        for b, i, key in keys.nonzero().tolist():
            rows[b][i].add(key)
    all_indices, all_entries = indices.tolist(), log_inclusion.tolist()
    for b, h, i in itertools.product(range(case.B), range(case.H_i), range(case.N)):
        keys, valid, must = all_indices[b][h][i], rows_valid[b][i], rows_forced[b][i]
        used = [key for key in keys if key != -1]
        entry = dict(zip(keys, all_entries[b][h][i], strict=True))
        assert len(used) == min(case.K, len(valid))
        assert keys == sorted(used) + [-1] * (case.K - len(used))
        assert must <= set(used) <= valid
        if method in DISTINCT or len(valid) <= case.K:
            assert len(set(used)) == len(used)
        assert all(used.count(key) == 1 for key in must)
        if len(valid) <= case.K:
            must = set(used)
        assert all(entry[key] == 0.0 for key in must)
        assert all(math.isfinite(entry[key]) for key in used)
        assert entry.get(-1, -math.inf) == -math.inf
        if method != "multinomial":
            assert all(entry[key] <= 0.0 for key in used)


# (is_causal, window, num_sinks, mask): {i: the forced keys of row i}. Row i of 4 is at i + 8 of 12.
FORCED = {
    (False, 0, 2, "none"): {0: [0, 1], 3: [0, 1]},
    (False, 1, 0, "none"): {0: [8], 3: [11]},
    (False, 2, 1, "none"): {0: [0, 7, 8, 9], 3: [0, 10, 11]},
    (False, 3, 0, "none"): {0: [7, 8, 9], 2: [9, 10, 11]},
    (True, 2, 1, "none"): {0: [0, 7, 8], 3: [0, 10, 11]},
    (False, 0, 3, "odd"): {0: [1, 3, 5], 3: [1, 3, 5]},
    (False, 2, 2, "odd"): {0: [1, 3, 7, 9], 3: [1, 3, 11]},
    (True, 3, 2, "odd"): {3: [1, 3, 9, 11]},
    (True, 3, 1, "odd"): {0: [1, 3, 5, 7]},  # all of its valid keys
}


@both
@pytest.mark.parametrize("forced", FORCED, ids=str)
def test_forced_keys_by_hand(backend: Backend, forced: tuple[bool, int, int, str]) -> None:
    """Over many heads of a uniform row, the forced keys are the ones that are always there."""
    is_causal, window, num_sinks, mask = forced
    odd = torch.arange(12, device=backend.device)[None] % 2 == 1
    key_mask = odd if mask == "odd" else None
    for i, expected in FORCED[forced].items():
        num_samples = num_sinks + (window if is_causal or window == 0 else 2 * (window // 2) + 1)
        indices, _ = backend.ops.sketch_sample(
            torch.zeros(1, 4, 1, device=backend.device),
            torch.zeros(1, 12, 1, device=backend.device),
            num_samples,
            num_index_heads=400,
            is_causal=is_causal,
            key_mask=key_mask,
            window=window,
            num_sinks=num_sinks,
        )
        drawn = F.one_hot(indices[0, :, i].long() + 1, 13).sum(1)[:, 1:]
        always = torch.nonzero((drawn == 1).all(0)).flatten().tolist()
        assert always == expected


@pytest.mark.one_order
@both
@pytest.mark.parametrize("method", RANDOM)
def test_drawing_beside_forced_keys(backend: Backend, method: str) -> None:
    """Forced keys take places; the others are drawn by the law of the rest, log_inclusion too."""
    scores = [0.5, 3.0, 0.0, -1.0, 1.0, 0.2]
    indices, log_inclusion = sample_row(
        backend, scores, 4, repeats=20_000, num_sinks=2, method=method
    )
    assert (indices[..., :2] == torch.tensor([0, 1])).all()
    assert (log_inclusion[..., :2] == 0).all()
    observed = Counter(tuple(key - 2 for key in keys) for keys in indices[:, 0, 2:].tolist())
    assert p_value(observed, LAWS[method](scores[2:], 2)) > SMALLEST_P_VALUE
    weight = log_inclusion[:, 0, 2:].double().neg().exp()
    for key in range(2, 6):
        estimates = (weight * (indices[:, 0, 2:] == key)).sum(-1)
        error = abs(estimates.mean() - 1.0)
        assert error <= 4.5 * estimates.std() / math.sqrt(len(estimates)) + 1e-6


@pytest.mark.one_order
@both
@pytest.mark.parametrize("method", RANDOM)
def test_masked_and_causal_rows_follow_the_law(backend: Backend, method: str) -> None:
    """The last of two rows sees keys 0..5 but 2, 3; what is hidden has the highest scores."""
    scores = [0.5, 0.0, 30.0, 50.0, -1.0, 1.0, 70.0]
    visible = [True, True, False, False, True, True, True]
    indices, _ = backend.ops.sketch_sample(
        torch.ones(1, 2, 1, device=backend.device),
        torch.tensor(scores, device=backend.device).view(1, -1, 1),
        2,
        num_index_heads=20_000,
        scale=1.0,
        is_causal=True,
        key_mask=torch.tensor([visible], device=backend.device),
        method=method,
        seed=torch.tensor([4, 4], device=backend.device),
    )
    names = {0: 0, 1: 1, 4: 2, 5: 3}
    observed = Counter(tuple(names[key] for key in keys) for keys in indices[0, :, 0].tolist())
    assert p_value(observed, LAWS[method]([0.5, 0.0, -1.0, 1.0], 2)) > SMALLEST_P_VALUE


# topk and systematic can be compared draw by draw.


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_breaks_ties_to_the_lower_index(backend: Backend, dtype: torch.dtype) -> None:
    """Small integers: every score is exact in every dtype, and most are tied."""
    q_sketch = torch.randint(-2, 3, (2, 33, 4)).to(backend.device, dtype)
    k_sketch = torch.randint(-2, 3, (2, 150, 4)).to(backend.device, dtype)
    indices, _ = backend.ops.sketch_sample(q_sketch, k_sketch, 11, num_index_heads=2, method="topk")
    scores = q_sketch.double() @ k_sketch.double().mT
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :11]
    expected = order.sort(-1).values.int()[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(indices, expected)


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS)
def test_topk_has_the_largest_scores(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, backend.device)
    args = (x.q_sketch, x.k_sketch, case.K)
    indices, _ = backend.ops.sketch_sample(*args, method="topk", **x.sampling())
    expected, _ = reference.sketch_sample(*args, method="topk", **x.sampling())
    # Scores that differ by less than their rounding may change places.
    scores = x.sketch_scores() * math.sqrt(case.S)
    if case.M == 0:
        assert torch.equal(indices, expected)
        return
    ours = scores.gather(-1, indices.long().clamp(min=0)).masked_fill(indices < 0, 0)
    theirs = scores.gather(-1, expected.long().clamp(min=0)).masked_fill(expected < 0, 0)
    assert torch.equal(indices < 0, expected < 0)
    torch.testing.assert_close(ours.sort(-1).values, theirs.sort(-1).values, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("name", ["self", "causal", "masked", "past_the_tiles", "cross", "forced"])
def test_systematic_keys_belong_to_one_uniform(backend: Backend, name: str) -> None:
    """Draw m of a row is the key whose step of the running sum holds u + m, for one u."""
    case = CASE[name]
    x = make_inputs(case, torch.float64, backend.device)
    indices, log_inclusion = backend.ops.sketch_sample(
        x.q_sketch, x.k_sketch, case.K, method="systematic", **x.sampling()
    )
    valid, forced = x.valid_and_forced(case.K)
    scores = x.sketch_scores()[:, 0]
    uniforms = []
    for b, i in itertools.product(range(case.B), range(case.N)):
        if valid[b, i].sum() <= case.K:
            continue
        drawable = torch.nonzero(valid[b, i] & ~forced[b, i]).flatten().tolist()
        k = case.K - int(forced[b, i].sum())
        pi = inclusion_probabilities(scores[b, i, drawable].tolist(), k)
        passed = np.concatenate([[0.0], np.cumsum(pi)])
        place = {key: n for n, key in enumerate(drawable)}
        for h in range(case.H_i):
            drawn = [
                (place[key], value)
                for key, value in zip(
                    indices[b, h, i].tolist(), log_inclusion[b, h, i].tolist(), strict=True
                )
                if key in place
            ]
            assert len(drawn) == k
            low = max(passed[n] - m for m, (n, _) in enumerate(drawn))
            high = min(passed[n + 1] - m for m, (n, _) in enumerate(drawn))
            # Running sums up to K in float32 at worst.
            assert low < high + 1e-5
            uniforms.append((low + high) / 2)
            for n, value in drawn:
                assert value == pytest.approx(math.log(pi[n]), abs=1e-5)
    assert stats.kstest(uniforms, "uniform").pvalue > SMALLEST_P_VALUE


# Equal seed, equal result.


@pytest.mark.usefixtures("restore_num_threads")
@pytest.mark.parametrize("name", ["gqa", "masked_causal_gqa", "forced", "past_the_tiles"])
@pytest.mark.parametrize("method", METHODS)
def test_number_of_threads_does_not_matter(backend: Backend, method: str, name: str) -> None:
    x = make_inputs(CASE[name], torch.float32, backend.device)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(
            backend.ops.sketch_sample(
                x.q_sketch, x.k_sketch, x.case.K, method=method, **x.sampling()
            )
        )
    for indices, log_inclusion in results[1:]:
        assert torch.equal(indices, results[0][0])
        assert torch.equal(log_inclusion, results[0][1])


@pytest.mark.parametrize("method", METHODS)
def test_part_of_the_problem_is_the_same(backend: Backend, method: str) -> None:
    """A draw depends on (sequence, head, position), not on how many others there are."""
    x = make_inputs(CASE["past_the_tiles"], torch.float32, backend.device)
    q_sketch, k_sketch = x.q_sketch.expand(3, -1, -1), x.k_sketch.expand(3, -1, -1)

    def run(batch: int, heads: int, rows: int) -> tuple[Tensor, Tensor]:
        return backend.ops.sketch_sample(
            q_sketch[:batch, :rows],
            k_sketch[:batch],
            41,
            num_index_heads=heads,
            method=method,
            query_offset=5,
            seed=x.seed,
        )

    whole = run(3, 4, 70)
    for batch, heads, rows in ((1, 4, 70), (3, 1, 70), (3, 4, 5), (2, 3, 67), (1, 1, 1)):
        part = run(batch, heads, rows)
        assert torch.equal(part[0], whole[0][:batch, :heads, :rows])
        assert torch.equal(part[1], whole[1][:batch, :heads, :rows])


@pytest.mark.slow_emulated
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_few_queries_of_many_keys_draw_as_many_do(
    backend: Backend, method: str, dtype: torch.dtype, far: bool
) -> None:
    """A CPU scans the keys of few queries on all cores, where it packs them for many. Far: all
    scores are beyond what a weight may be without a reference."""
    rng = torch.Generator().manual_seed(5)
    queries, keys = 9, 5003
    q_sketch, k_sketch = (
        torch.randn(2, heads, n, 16, generator=rng) for heads, n in ((4, queries), (2, keys))
    )
    k_sketch[..., 0], q_sketch[..., 0] = 20.0 if far else 0.0, 20.0
    key_mask = torch.rand(2, keys, generator=rng) < 0.9
    key_mask[1, 2000:4500] = False
    key_mask[:, -queries:] = True

    def run(begin: int, end: int) -> tuple[Tensor, Tensor]:
        return backend.ops.sketch_sample(
            q_sketch[:, :, begin:end].to(backend.device, dtype),
            k_sketch.to(backend.device, dtype),
            33,
            num_index_heads=8,
            method=method,
            is_causal=True,
            key_mask=key_mask.to(backend.device),
            window=3,
            num_sinks=2,
            query_offset=keys - queries + begin,
            seed=torch.tensor([3, 4], device=backend.device),
        )

    whole = run(0, queries)
    for begin, end in ((0, 1), (1, 3), (3, 7), (8, 9)):
        for some, all_ in zip(run(begin, end), whole, strict=True):
            assert torch.equal(some, all_[:, :, begin:end])


@pytest.mark.parametrize("method", METHODS)
def test_seed_and_generator(backend: Backend, method: str) -> None:
    x = make_inputs(CASE["past_the_tiles"], torch.float32, backend.device)

    def run(**kwargs: object) -> Tensor:
        return backend.ops.sketch_sample(x.q_sketch, x.k_sketch, 9, method=method, **kwargs)[0]

    assert torch.equal(run(seed=x.seed), run(seed=x.seed.clone()))

    def seeded() -> Tensor:
        return run(generator=torch.Generator(backend.device).manual_seed(3))

    assert torch.equal(seeded(), seeded())
    torch.manual_seed(3)
    first = run()
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert torch.equal(first, run()) == (method == "topk")


@pytest.mark.slow_emulated
@pytest.mark.parametrize("method", RANDOM)
def test_sampling_and_dropout_use_different_streams(backend: Backend, method: str) -> None:
    """One of two keys is drawn, and one slot kept or dropped, under one seed at equal addresses."""
    B, H, N = 2, 4, 4000
    seed = torch.tensor([6, 6], device=backend.device)
    zeros = torch.zeros(B, H, N, 1, device=backend.device)
    drawn, _ = backend.ops.sketch_sample(
        zeros[:, 0], zeros[:, 0, :2], 1, num_index_heads=H, method=method, seed=seed
    )
    slot = torch.zeros(B, H, N, 1, dtype=torch.int32, device=backend.device)
    kept = backend.ops.gather_attention(
        zeros, zeros[:, :, :1], zeros[:, :, :1] + 1, slot, dropout_p=0.5, seed=seed
    )
    table = stats.contingency.crosstab(drawn.cpu().ravel(), (kept != 0).cpu().ravel()).count
    assert table.shape == (2, 2)
    assert stats.chi2_contingency(table).pvalue > SMALLEST_P_VALUE


# What cannot be drawn must not be read.


@pytest.mark.parametrize("poisoned", ["masked keys", "rows without keys"])
@pytest.mark.parametrize("method", METHODS)
def test_poison(backend: Backend, method: str, poisoned: str) -> None:
    x = make_inputs(CASE["masked_causal_gqa"], torch.float32, backend.device)
    args = {"method": method, **x.sampling()}
    expected = backend.ops.sketch_sample(x.q_sketch, x.k_sketch, 6, **args)
    if poisoned == "masked keys":
        x.k_sketch = x.k_sketch.masked_fill(~x.key_mask[..., None], math.nan)
    else:
        x.q_sketch = x.q_sketch.masked_fill(~x.valid().any(-1, keepdim=True), math.nan)
        assert x.q_sketch.isnan().any()
    actual = backend.ops.sketch_sample(x.q_sketch, x.k_sketch, 6, **args)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.slow_emulated
def test_many_batch_elements_and_heads(backend: Backend) -> None:
    q_sketch = torch.zeros(66_000, 1, 1, device=backend.device)
    k_sketch = torch.zeros(66_000, 3, 1, device=backend.device)
    indices, _ = backend.ops.sketch_sample(q_sketch, k_sketch, 1)
    share = torch.bincount(indices.flatten(), minlength=3) / 66_000
    # Five standard deviations of a share of 1/3.
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 66_000)


def test_the_last_draw_of_a_row_lies_within_it(backend: Backend) -> None:
    """A last spacing far below the rounding of the sums could put a draw beyond their total."""
    weights = [0.065, 0.0872, 0.0358, 0.0211, 0.1186, 0.0231, 0.0815, 0.0109, 0.0577, 0.0124]
    weights += [0.0515, 0.0103, 0.064, 0.0473, 0.1117, 0.0162, 0.1207, 0.065]
    q_sketch = torch.zeros(8, 18, 18)
    q_sketch[7, 17] = torch.tensor(weights).log()
    k_sketch = torch.eye(18).expand(8, 18, 18)
    indices, _ = backend.ops.sketch_sample(
        q_sketch.to(backend.device),
        k_sketch.to(backend.device),
        16,
        num_index_heads=4,
        scale=1.0,
        is_causal=True,
        window=2,
        seed=torch.tensor([-5065813589958632775, 6018318063960025268], device=backend.device),
    )
    drawn = indices[7, :, 17]
    assert (drawn[:, 1:] > drawn[:, :-1]).all()
    assert drawn.min() >= 0
    assert drawn.max() == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["gumbel", "systematic", "topk"])
def test_scores_too_large_to_tell_weights(
    backend: Backend, method: str, dtype: torch.dtype
) -> None:
    """Where rounding moves a score by more than all weights span, the largest ones are drawn."""
    q_sketch, k_sketch = (1e4 * torch.randn(1, length, 16) for length in (33, 50))
    q_sketch, k_sketch = q_sketch.to(dtype), k_sketch.to(dtype)
    scores = q_sketch.double() @ k_sketch.double().transpose(1, 2)
    indices, log_inclusion = backend.ops.sketch_sample(
        q_sketch.to(backend.device), k_sketch.to(backend.device), 4, method=method
    )
    expected = scores.topk(4).indices.sort(dim=-1).values
    assert torch.equal(indices[:, 0].cpu().long(), expected)
    assert log_inclusion.isfinite().all()

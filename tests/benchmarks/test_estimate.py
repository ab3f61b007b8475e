"""The sampled estimate of dense attention: its noise and its bias against their law."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.learning import estimate
from benchmarks.learning.estimate import METHODS, Error, Law, Problem, measure

DRAWS = 512
NUM_SAMPLES = (8, 32, 128)
# Four standard deviations of a mean square of normal errors: of one draw as if of 128 x 16. Of
# the mean over draws as if of 250 (seen with torch.multinomial): the 16 features of a query go
# together, and a few queries have most of the error.
CHANCE = 1 + 4 * (2 / (128 * 16)) ** 0.5 / 2
CHANCE_OF_MEAN = 1 + 4 * (2 / 250) ** 0.5 / 2

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(num_queries=128, num_keys=512)


@pytest.fixture(scope="module")
def law(problem: Problem) -> Law:
    return problem.law()


def errors(problem: Problem, method: str, *, correction: bool) -> list[Error]:
    return [measure(problem, method, k, correction=correction, draws=DRAWS) for k in NUM_SAMPLES]


def test_law_by_hand() -> None:
    """Attention of 1/4 and 3/4 to two keys, of which the sketch cannot tell one from the other."""
    q = torch.tensor([[0.0, math.log(3.0) / 2]])
    k = torch.tensor([[3.0, -1.0], [3.0, 1.0]])
    law = Problem(q, k, sketch_dim=1, scale=1.0).law()
    # o = [3, 1/2]; a^2 / p = 1/8 and 9/8; v - o = [0, -3/2] and [0, 1/2].
    norm = math.hypot(3.0, 0.5)
    assert law.noise == pytest.approx(math.sqrt(9 / 4 / 8 + 9 / 8 / 4) / norm)
    assert law.bias == pytest.approx((-3 / 2 / 8 + 9 / 8 / 2) / norm)
    assert law.ratio == pytest.approx(10 / 8)


@every_method
def test_error_falls_as_the_law_or_faster(problem: Problem, law: Law, method: str) -> None:
    few, *_ = results = errors(problem, method, correction=True)
    for x in results:
        assert x.one <= CHANCE * law.error(x.num_samples)
    for more in results[1:]:
        # At few keys the error is below the law by the terms that it leaves out.
        slack = 1 + law.ratio / few.num_samples
        assert more.one <= slack * few.one * (few.num_samples / more.num_samples) ** 0.5
        few = more


@every_method
def test_mean_has_no_bias_but_of_self_normalisation(
    problem: Problem, law: Law, method: str
) -> None:
    for x in errors(problem, method, correction=True):
        assert x.mean <= CHANCE_OF_MEAN * law.error(x.num_samples, DRAWS)


@every_method
def test_without_correction_the_mean_is_not_dense_attention(
    problem: Problem, law: Law, method: str
) -> None:
    *_, most = errors(problem, method, correction=False)
    assert most.mean > 10 * law.error(most.num_samples, DRAWS)


def test_page_and_files(problem: Problem, tmp_path: Path) -> None:
    made = [
        Error(method, correction, k, one=3 / k, mean=0.125 / k)
        for method, correction in [("gumbel", True), ("gumbel", False), ("topk", False)]
        for k in (8, 32)
    ]
    page = estimate.update_page(
        "<!-- table estimate:error -->\nold\n<!-- end -->\n"
        "<!-- table mqar:length -->\nkept\n<!-- end -->\n",
        made,
    )
    assert "| gumbel, corrected | 38 (1.6) | 9.4 (0.39) |\n" in page
    assert "| topk | 38 | 9.4 |\n" in page
    assert "old" not in page
    assert "kept" in page
    estimate.save(made, problem, tmp_path / "estimate.json")
    assert {path.name for path in tmp_path.iterdir()} == {"estimate.json", "estimate.png"}

"""As many as 1024 ranks, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import rank_cases as cases
import torch
import torch.distributed as dist

from smartbird._visible import check_visible
from smartbird.distributed._shards import Shards
from smartbird.ops.gather import attend_to

EVERYTHING = {"is_causal": True, "window": 3, "correction": True, "dropout_p": 0.2}


@pytest.mark.parametrize("size", [3, 64, 1024])
def test_bits_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    """Each rank's queries with all keys, as ranks have gathered them."""
    problem = cases.Problem(2500, (4, 2, 2, 2, 1), batch=1, options=EVERYTHING)
    q, k, v, q_sketch, k_sketch = problem.tensors()
    visible = check_visible(1, problem.length, problem.length, q.device, **problem.rows())
    expected = cases.draw_and_attend(problem, (q, k, v, q_sketch, k_sketch), visible, attend_to)
    dout = problem.normal(q.shape[1], cases.DV)
    expected[2].backward(dout)
    for rank in range(size):
        shards = Shards(rank, size, True, problem.length)
        rows = shards.rows()[: shards.real]
        own = [x.detach()[:, :, rows].requires_grad_() for x in (q, q_sketch)]
        tensors = (own[0], k.detach(), v.detach(), own[1], k_sketch)
        actual = cases.draw_and_attend(problem, tensors, visible.at_rows(rows), attend_to)
        for ours, theirs in zip(actual, expected, strict=True):
            cases.exact(ours, theirs[:, :, rows])
        actual[2].backward(dout[:, :, rows])
        cases.exact(own[0].grad, q.grad[:, :, rows])


@pytest.fixture
def pretended() -> Iterator[Callable[[int, int], None]]:
    """Makes this process a rank of a group whose others are not there."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def join(rank: int, size: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=size, store=fake.FakeStore())

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 511, 1023])
def test_one_of_many_is_sent_what_the_page_says(
    rank: int, pretended: Callable[[int, int], None]
) -> None:
    pretended(rank, 1024)
    cases.ranks_are_sent_what_the_page_says(4096, ("all_gather",))
    assert torch.equal(cases.cp_of(4096).positions()[:2], torch.tensor([2 * rank, 2 * rank + 1]))

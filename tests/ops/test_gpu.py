"""What only a GPU can show: graphs, streams, several devices, and that nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from cases import CASE, Case, Inputs, leaves, make_inputs
from torch import Tensor

from smartbird import ops
from smartbird.functional import smart_bird_attention

pytestmark = pytest.mark.gpu

PROBLEM = CASE["past_the_tiles"]
DRAWS = Case("draws", B=1, N=128, M=1000, H=2, H_kv=2, H_i=2, S=16, K=32)


def attend(x: Inputs, seed: Tensor, method: str = "gumbel") -> tuple[Tensor, ...]:
    """Indices, output and the gradients of q, k and v."""
    indices, _ = ops.sketch_sample(
        x.q_sketch, x.k_sketch, x.case.K, num_index_heads=x.case.H_i, method=method, seed=seed
    )
    q, k, v = leaves(x.q, x.k, x.v)
    out = ops.gather_attention(q, k, v, indices, dropout_p=0.2, seed=seed)
    return indices, out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Draws and output bit by bit; dk and dv are added up by atomics, in an order that varies."""
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(actual[3:], expected[3:], strict=True):
        tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2  # dk and dv are rounded at last
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["gumbel", "systematic"])
def test_graph_replays_with_another_seed(method: str, dtype: torch.dtype) -> None:
    x = make_inputs(PROBLEM, dtype, "cuda")
    seed = x.seed.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once is made before the capture
        attend(x, seed, method)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(x, seed, method)
    drawn = []
    for numbers in ([1, 7], [1, 8], [2, 7]):
        seed.copy_(torch.tensor(numbers))
        graph.replay()
        assert_same(captured, attend(x, seed, method))
        drawn.append(captured[0].clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_work_follows_the_current_stream() -> None:
    """Inputs get their values late on a side stream; work on another stream would miss them."""
    x = make_inputs(PROBLEM, torch.float32, "cuda")
    expected = attend(x, x.seed)
    late = make_inputs(PROBLEM, torch.float32, "cuda")
    names = ("q", "k", "v", "q_sketch", "k_sketch")
    for name in names:
        getattr(late, name).zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for name in names:
            getattr(late, name).copy_(getattr(x, name))
        actual = attend(late, late.seed)
    side.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["systematic", "topk"])
def test_draws_are_those_of_the_cpu(method: str, dtype: torch.dtype) -> None:
    """One uniform number decides a row, so only rounding can move a draw: to the next key.

    Emulated, all 8192 draws are the same; a real exp2 and mma round otherwise.
    """
    on_cpu, on_gpu = (make_inputs(DRAWS, dtype, device) for device in ("cpu", "cuda"))
    expected, actual = (
        ops.sketch_sample(
            x.q_sketch, x.k_sketch, x.case.K, num_index_heads=2, method=method, seed=x.seed
        )
        for x in (on_cpu, on_gpu)
    )
    indices, log_inclusion = (t.cpu() for t in actual)
    same = indices == expected[0]
    assert same.double().mean() > 0.99
    if method == "systematic":
        assert (indices - expected[0]).abs().max() <= 1
    torch.testing.assert_close(log_inclusion[same], expected[1][same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_waits_for_the_device(deterministic: bool) -> None:
    """A training step of one layer, with distillation: PyTorch raises where it would wait.

    A wait inside our own sources would not be noticed; it would fail the capture above.
    """
    x = make_inputs(PROBLEM, torch.bfloat16, "cuda")
    q, k, v, q_sketch, k_sketch = leaves(x.q, x.k, x.v, x.q_sketch, x.k_sketch)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, indices = smart_bird_attention(
            q, k, v, q_sketch, k_sketch, x.case.K, dropout_p=0.1, return_indices=True
        )
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, indices=indices)
        dense = ops.distill_loss(q, k, q_sketch, k_sketch)
        (out.float().sum() + loss + dense).backward()
        with torch.no_grad():
            smart_bird_attention(q, k, v, q_sketch, k_sketch, x.case.K, correction=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert all(leaf.grad is not None for leaf in (q, k, v, q_sketch, k_sketch))


def test_tensors_on_another_device_than_the_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected, actual = (
        attend(x, x.seed)
        for x in (make_inputs(PROBLEM, torch.float32, f"cuda:{n}") for n in (0, 1))
    )
    assert torch.cuda.current_device() == 0
    assert_same(tuple(t.to("cuda:0") for t in actual), expected)


def test_tensors_on_two_devices_are_refused() -> None:
    x = make_inputs(PROBLEM, torch.float32, "cuda")
    for k, indices in ((x.k.cpu(), x.indices), (x.k, x.indices.cpu())):
        with pytest.raises(RuntimeError, match="all tensors must be on one device"):
            torch.ops.smartbird.gather_scores(x.q, k, indices, 1.0)

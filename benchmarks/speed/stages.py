"""Where Smart Bird's time goes, and how near each stage is to what the machine allows.

Stages are timed through the operators:

- *scores* (with exp and running sums) and *drawing*: the time of ``draw_keys`` is fitted as
  scores + H_i * drawing from H_i = 1 and H_i = H, as all index heads share the scores.
- *gather attention*: ``gather_attention`` alone, on indices that were drawn.
- *slot gradients*, the first part of its backward pass (scores, softmax and dout . v again): the
  gradient of a bias alone, which needs no more than that. *Gradient sums*: what the gradient of q,
  k and v takes beyond it, with the inversion of the indices.
- *distillation*: ``distill_loss``, which makes its gradients with the loss.
- *embedding_bag*, which is not ours: torch.nn.functional.embedding_bag sums the same rows of v with
  weights that are given. It is half of gather attention, by a well-tuned kernel.

Floating point operations are the multiplications and additions of the definition: exponentials and
random numbers are not counted, so what is made of those looks slower than it is. Gathered bytes
are rows that indices name, each slot once per pass; streamed bytes are tensors read or written in
order. The least time of a stage is the larger of two: FLOPs over the measured peak; and bytes over
bandwidth, summed over gathered and streamed bytes, each at the bandwidth of the smallest cache of a
core that holds the table, or all that is streamed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.speed.contenders import GUMBEL, SYSTEMATIC, Problem, Widths
from benchmarks.speed.results import Limits, Stage
from benchmarks.speed.timing import interleave
from smartbird._checks import check_sketches
from smartbird._visible import check_visible
from smartbird.ops import distill_loss, gather_attention
from smartbird.ops.sample import draw

SCORES = "scores"
DRAWING = {SYSTEMATIC: "drawing, systematic", GUMBEL: "drawing, gumbel"}
GATHER = "gather attention"
EMBEDDING_BAG = "(embedding_bag on v)"
SLOT_GRADIENTS = "backward: slot gradients"
GRADIENT_SUMS = "backward: gradient sums"
DISTILL = "distillation, with gradients"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage must do, see the module's text; one gathered table is of ``table_bytes``."""

    flops: int
    gathered_bytes: int
    table_bytes: int
    streamed_bytes: int


def work(widths: Widths, length: int, item_bytes: int) -> dict[str, Work]:
    """The work of each stage for one sequence, D = Dv, H_i = H; sums and sketch gradients float32.

    Letters as in ``smartbird.ops``; ``slots`` is H N K, ``pairs`` N M.
    """
    H, D, S, K = widths.heads, widths.head_dim, widths.sketch_dim, widths.num_samples
    slots, pairs = H * length * K, length * length
    heads = H * length * D * item_bytes  # one of q, k, v, out and their gradients
    sketch = length * S * item_bytes
    indices = slots * 4
    row = D * item_bytes
    table = length * row
    return {
        SCORES: Work(2 * pairs * S, 0, 0, 2 * sketch),
        DRAWING[SYSTEMATIC]: Work(0, 0, 0, indices),
        DRAWING[GUMBEL]: Work(0, 0, 0, indices),
        # q.k and sum p v
        GATHER: Work(4 * slots * D, 2 * slots * row, table, 2 * heads + indices),
        EMBEDDING_BAG: Work(2 * slots * D, slots * row, table, heads + indices + slots * 4),
        # q.k and dout.v; q and dout in, two numbers per slot out
        SLOT_GRADIENTS: Work(
            4 * slots * D, 2 * slots * row, table, 2 * heads + indices + slots * 8
        ),
        # dq from rows of k, dk from rows of q, dv from rows of dout; two numbers per slot in
        GRADIENT_SUMS: Work(6 * slots * D, 3 * slots * row, table, 3 * heads + indices + slots * 8),
        # sketch scores and two products with p; q.k of the sampled keys and two sums with t
        DISTILL: Work(
            6 * pairs * S + 2 * slots * (D + 2 * S),
            slots * (row + 2 * 4 * S),
            table,
            heads + indices + 4 * sketch,
        ),
    }


def least_seconds(
    stage: Work, limits: Limits, cache_bytes: Mapping[str, int]
) -> tuple[float | None, str]:
    """The least time for a stage and what bounds it; None where only random numbers are at work.

    Kernels compute in float32 whatever the inputs, so that is the peak that counts.
    """
    if not stage.flops:
        return None, "random numbers"
    table, streamed = (
        next((level for level in ("L2", "L3") if size <= cache_bytes[level]), "DRAM")
        for size in (stage.table_bytes, stage.streamed_bytes)
    )
    compute = stage.flops / limits.flops["float32"]
    gathered = stage.gathered_bytes / limits.bandwidth[table]
    memory = gathered + stage.streamed_bytes / limits.bandwidth[streamed]
    return (compute, "FMA") if compute >= memory else (memory, table)


def draw_keys(p: Problem, *, method: str, num_index_heads: int, seed: Tensor) -> Tensor:
    """As attention without correction draws: ``sketch_sample`` without log_inclusion."""
    q_sketch, k_sketch = check_sketches(p.q_sketch.detach(), p.k_sketch.detach())
    batch, length = p.q.shape[0], p.length
    indices, _ = draw(
        q_sketch,
        k_sketch,
        p.num_samples,
        check_visible(batch, length, length, p.q.device),
        num_index_heads=num_index_heads,
        method=method,
        scale=q_sketch.shape[3] ** -0.5,
        seed=seed,
        need_log_inclusion=False,
    )
    return indices


def measure_stages(
    widths: Widths,
    *,
    length: int,
    dtype: str,
    limits: Limits,
    cache_bytes: Mapping[str, int],
    seconds: float,
) -> list[Stage]:
    """Times every stage at one length with the threads of ``limits``, about ``seconds`` s each."""
    torch.set_num_threads(limits.threads)
    problem = Problem.random(
        widths, batch=1, length=length, dtype=getattr(torch, dtype), requires_grad=True
    )
    times = interleave(_calls(problem), seconds)
    median = {name: statistics.median(of_call) for name, of_call in times.items()}

    heads = widths.heads
    measured = {
        name: median[name] for name in (GATHER, EMBEDDING_BAG, SLOT_GRADIENTS) if name in median
    }
    for method, drawing in DRAWING.items():
        one, all_heads = median[f"{method} 1"], median[f"{method} {heads}"]
        per_head = (all_heads - one) / max(heads - 1, 1)
        measured[drawing] = heads * per_head
        # Both methods share the scores; systematic's estimate is the steadier one.
        measured.setdefault(SCORES, one - per_head)
    measured[GRADIENT_SUMS] = median["backward"] - median[SLOT_GRADIENTS]
    measured[DISTILL] = median[DISTILL]

    item_bytes = problem.q.element_size()
    rows = []
    for name, stage in work(widths, length, item_bytes).items():
        if name not in measured:
            continue
        limit, bound = least_seconds(stage, limits, cache_bytes)
        rows.append(
            Stage(
                name,
                length,
                dtype,
                limits.threads,
                measured[name],
                **dataclasses.asdict(stage),
                limit_seconds=limit,
                bound=bound,
            )
        )
    return rows


def _calls(p: Problem) -> dict[str, Callable[[], object]]:
    """What is timed; the forward passes of the backward ones are run here, once."""
    H, D = p.q.shape[1], p.q.shape[3]
    q, k, v = (x.detach() for x in (p.q, p.k, p.v))
    seed = torch.tensor([1, 2])
    indices = draw_keys(p, method=GUMBEL, num_index_heads=H, seed=seed)
    bias = torch.zeros(indices.shape, requires_grad=True)
    with_bias = gather_attention(q, k, v, indices, bias=bias)
    out = gather_attention(p.q, p.k, p.v, indices)

    def sample(method: str, index_heads: int) -> Callable[[], object]:
        return lambda: draw_keys(p, method=method, num_index_heads=index_heads, seed=seed)

    def gradient(of: Tensor, *inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of, inputs, p.dout, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {
        f"{method} {index_heads}": sample(method, index_heads)
        for method in DRAWING
        for index_heads in (1, H)
    }
    calls[GATHER] = lambda: gather_attention(q, k, v, indices)
    if v.dtype == torch.float32:  # the only dtype in which it takes weights
        bags = (indices + p.length * torch.arange(H, dtype=torch.int32)[:, None, None]).view(-1)
        ends = torch.arange(0, len(bags) + 1, p.num_samples, dtype=torch.int32)
        weights = torch.rand(len(bags))
        calls[EMBEDDING_BAG] = lambda: embedding_bag(
            bags,
            v.view(-1, D),
            ends,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
    calls[SLOT_GRADIENTS] = gradient(with_bias, bias)
    calls["backward"] = gradient(out, p.q, p.k, p.v)
    calls[DISTILL] = lambda: distill_loss(q, k, p.q_sketch, p.k_sketch, indices=indices)
    return calls

"""Time Smart Bird attention against PyTorch's scaled_dot_product_attention.

Each repetition runs every contender once, one after the other, so that a slow spell of the machine
meets all of them; a ratio compares medians of one run. The table is printed and, with ``--out``,
all timings are written as JSON.

Queries, keys and sketches are random, so the sketch's probabilities are spread over many keys;
where they are concentrated on few, ``gumbel`` takes more rounds to find distinct ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import smartbird
from smartbird.functional import smart_bird_attention
from smartbird.ops import distill_loss

BASELINE = "sdpa"
MIN_REPETITIONS = 3
MAX_REPETITIONS = 25


class Problem(NamedTuple):
    """One self-attention problem. q, k, v ``[B, H, N, D]``; q_sketch, k_sketch ``[B, N, S]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_sketch: Tensor
    k_sketch: Tensor
    dout: Tensor
    num_samples: int


def make_problem(args: argparse.Namespace, length: int, *, requires_grad: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(requires_grad)

    heads = (args.batch, args.heads, length, args.head_dim)
    sketch = (args.batch, length, args.sketch_dim)
    return Problem(
        q=normal(*heads),
        k=normal(*heads),
        v=normal(*heads),
        q_sketch=normal(*sketch),
        k_sketch=normal(*sketch),
        dout=normal(*heads).detach(),
        num_samples=args.num_samples,
    )


def contenders(
    problem: Problem, methods: list[str], *, backward: bool
) -> dict[str, Callable[[], Any]]:
    """The calls to time. With ``backward`` each also runs the backward pass of what it computed."""
    q, k, v, q_sketch, k_sketch, dout, num_samples = problem

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    def smart_bird(method: str) -> Callable[[], Tensor]:
        return lambda: smart_bird_attention(q, k, v, q_sketch, k_sketch, num_samples, method=method)

    calls: dict[str, Callable[[], Any]] = {BASELINE: sdpa} | {m: smart_bird(m) for m in methods}
    if not backward:
        return calls

    def with_backward(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: forward().backward(dout)

    def distilled(method: str) -> Callable[[], Any]:
        """A whole training step of one layer: attention, and the loss that teaches the sketch."""

        def step() -> None:
            out, indices = smart_bird_attention(
                q, k, v, q_sketch, k_sketch, num_samples, method=method, return_indices=True
            )
            loss = distill_loss(q, k, q_sketch, k_sketch, indices=indices)
            torch.autograd.backward([out, loss], [dout, None])

        return step

    return {name: with_backward(call) for name, call in calls.items()} | {
        f"{m} + distill": distilled(m) for m in methods
    }


def interleave(
    calls: dict[str, Callable[[], Any]], leaves: list[Tensor], budget: float
) -> dict[str, list[float]]:
    """Seconds of each repetition of each call, after one untimed round, for about ``budget`` s."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for repetition in range(MAX_REPETITIONS + 1):
        for name, call in calls.items():
            for leaf in leaves:
                leaf.grad = None
            before = time.perf_counter()
            call()
            if repetition > 0:
                times[name].append(time.perf_counter() - before)
        if repetition >= MIN_REPETITIONS and time.perf_counter() - start > budget:
            break
    return times


def measure(args: argparse.Namespace, length: int, *, backward: bool) -> list[dict[str, Any]]:
    problem = make_problem(args, length, requires_grad=backward)
    leaves = [x for x in problem[:5] if x.requires_grad]
    with torch.set_grad_enabled(backward):
        times = interleave(
            contenders(problem, args.methods, backward=backward), leaves, args.seconds
        )
    baseline = statistics.median(times[BASELINE])
    rows = []
    for name, seconds in times.items():
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
        rows.append(
            {
                "length": length,
                "pass": "forward+backward" if backward else "forward",
                "attention": name,
                "median_seconds": quartiles[1],
                "quartiles_seconds": [quartiles[0], quartiles[2]],
                "speedup_over_sdpa": baseline / quartiles[1],
                "seconds": seconds,
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        low, high = row["quartiles_seconds"]
        print(
            f"{row['length']:>7}  {row['pass']:<16}  {row['attention']:<22}"
            f"  {row['median_seconds'] * 1e3:>9.1f} ms  [{low * 1e3:.1f}, {high * 1e3:.1f}]"
            f"  {row['speedup_over_sdpa']:>6.2f}x  {len(row['seconds'])} runs",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--methods", nargs="+", default=["gumbel", "systematic"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sketch-dim", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help=f"stop repeating a row group after this time (at least {MIN_REPETITIONS} repetitions)",
    )
    parser.add_argument("--quick", action="store_true", help="lengths 256 and 1024, 2 s each")
    parser.add_argument("--out", type=Path, help="write the timings to this JSON file")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.seconds = [256, 1024], 2.0
    return args


def main() -> None:
    args = parse_args()
    print(
        f"float32, B={args.batch} H={args.heads} D={args.head_dim} S={args.sketch_dim}"
        f" K={args.num_samples}, {torch.get_num_threads()} threads;"
        f" median, [quartiles], speed-up over {BASELINE}"
    )
    rows = []
    for length in args.lengths:
        for backward in (False, True):
            group = measure(args, length, backward=backward)
            print_rows(group)
            rows += group
    if args.out:
        report = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "build": smartbird.build_info(),
            "arguments": {k: v for k, v in vars(args).items() if k != "out"},
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"timings in {args.out}")


if __name__ == "__main__":
    main()

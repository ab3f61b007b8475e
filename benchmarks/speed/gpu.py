"""Times Smart Bird attention and its rivals on a GPU; writes JSON, plots and a page of tables.

Times are the GPU's own, between two events, with its L2 cache overwritten before each repetition.
Where the host takes longer to launch the kernels than the GPU to run them, that is in the time.
Stages are whole ops, held to the least times of ``benchmarks.speed.roofline``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.markdown import table
from benchmarks.speed import machine, roofline
from benchmarks.speed.contenders import (
    DISTILL,
    FLASH_ATTN,
    FLASH_ATTN_WINDOW,
    FLEX_WINDOWS,
    GUMBEL,
    SDPA,
    SDPA_FLASH,
    SYSTEMATIC,
    Problem,
    Unavailable,
    Widths,
    build,
)
from benchmarks.speed.plots import write_plots
from benchmarks.speed.report import update_page
from benchmarks.speed.results import Case, Memory, Results, Stage, ms, pass_name
from benchmarks.speed.stages import draw_keys
from benchmarks.speed.timing import Clock, interleave, time_case, wall_clock
from smartbird._library import why_no_cuda
from smartbird.ops import gather_attention, gather_scores, sketch_lse

LENGTHS = (1024, 4096, 16384, 65536)
# As many tokens as in a sequence of 16384: one of 1024 does not fill a GPU.
BATCHED_LENGTH, BATCH = 1024, 16
OURS = (GUMBEL, SYSTEMATIC)
WINDOW = FLEX_WINDOWS[-1]  # on GPUs its blocks are of 128
DENSE = {"float32": SDPA, "bfloat16": SDPA_FLASH}
RIVALS = {
    "float32": (SDPA, WINDOW),
    "bfloat16": (SDPA_FLASH, FLASH_ATTN, FLASH_ATTN_WINDOW, WINDOW),
}


class CudaClock:
    """Seconds of a call on the current GPU."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._overwritten = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        event: type[Any] = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        self._overwritten.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def run(device: str, lengths: list[int], widths: Widths, seconds: float, results: Results) -> None:
    """Adds times, stages and peak memory on ``device``; no memory on the CPU, for tests."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    on_gpu = device == "cuda"
    clock: Clock = CudaClock() if on_gpu else wall_clock
    sizes = [(1, length) for length in lengths] + [(BATCH, min(BATCHED_LENGTH, *lengths))]
    for batch, length in sizes:
        for backward in (False, True):
            case = Case(length, backward, threads, batch)
            for timing in time_case(case, _contenders(backward), widths, seconds, device, clock):
                results.timings.append(timing)
                print(timing, flush=True)
    for length in lengths:
        for dtype in RIVALS:
            for stage in measure_stages(widths, length, dtype, seconds, device, clock):
                results.stages.append(stage)
                print(stage, flush=True)
    for length in lengths if on_gpu else ():
        for backward in (False, True):
            for attention, dtype in _contenders(backward):
                if dtype == "bfloat16":
                    memory = measure_memory(attention, dtype, length, backward, widths)
                    results.memory.append(memory)
                    print(memory, flush=True)
    results.environment["seconds"] = time.perf_counter() - start


def _contenders(backward: bool) -> list[tuple[str, str]]:
    whole_step = (GUMBEL + DISTILL,) if backward else ()
    return [
        (attention, dtype)
        for dtype, rivals in RIVALS.items()
        for attention in (*rivals, *OURS, *whole_step)
    ]


def describe(device: str) -> dict[str, Any]:
    """The GPU by name, and what runs on it."""
    if device == "cpu":
        return {"name": "no GPU: the CPU"}
    properties = torch.cuda.get_device_properties()
    driver = "unknown"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def measure_stages(
    widths: Widths, length: int, dtype: str, seconds: float, device: str, clock: Clock
) -> list[Stage]:
    """The ops one by one, with the work of their kernels and, on a GPU of known limits, a floor."""
    problem = _problem(widths, length, dtype, True, device)
    times = interleave(_calls(problem), seconds, clock=clock)
    item_bytes = problem.q.element_size()
    work = roofline.kernels(widths, length, item_bytes)
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    gpu = roofline.find_device(name)
    stages = []
    for kernel, repetitions in times.items():
        limit, bound = roofline.floor_seconds(work[kernel], gpu, item_bytes) if gpu else (None, "-")
        stages.append(
            Stage(
                kernel,
                length,
                dtype,
                torch.get_num_threads(),
                statistics.median(repetitions),
                flops=round(work[kernel].tile_flops + work[kernel].fma_flops),
                gathered_bytes=round(work[kernel].cached_bytes),
                table_bytes=0,
                streamed_bytes=round(work[kernel].hbm_bytes),
                limit_seconds=limit,
                bound=bound,
            )
        )
    return stages


def _problem(widths: Widths, length: int, dtype: str, requires_grad: bool, device: str) -> Problem:
    """Of one sequence."""
    return Problem.random(
        widths,
        batch=1,
        length=length,
        dtype=getattr(torch, dtype),
        requires_grad=requires_grad,
        device=device,
    )


def _calls(p: Problem) -> dict[str, Callable[[], object]]:
    """By the kernel's name in ``roofline``; the forward passes of gradients run here, once."""
    q_sketch, k_sketch = p.q_sketch.detach(), p.k_sketch.detach()
    q, k, v = (x.detach() for x in (p.q, p.k, p.v))
    seed = torch.tensor([1, 2], device=p.q.device)

    def sample(method: str) -> torch.Tensor:
        return draw_keys(p, method=method, num_index_heads=p.q.shape[1], seed=seed)

    indices = sample(SYSTEMATIC)
    out = gather_attention(p.q, p.k, p.v, indices)
    lse = sketch_lse(p.q_sketch, p.k_sketch)
    ones = torch.ones_like(lse)
    leaves, sketches = (p.q, p.k, p.v), (p.q_sketch, p.k_sketch)
    return {
        roofline.SAMPLE_SYSTEMATIC: lambda: sample(SYSTEMATIC),
        roofline.SAMPLE_GUMBEL: lambda: sample(GUMBEL),
        roofline.GATHER_SCORES: lambda: gather_scores(q, k, indices),
        roofline.GATHER: lambda: gather_attention(q, k, v, indices),
        roofline.BACKWARD: lambda: torch.autograd.grad(out, leaves, p.dout, retain_graph=True),
        roofline.LSE: lambda: sketch_lse(q_sketch, k_sketch),
        roofline.MEAN: lambda: torch.autograd.grad(lse, sketches, ones, retain_graph=True),
    }


def measure_memory(
    attention: str, dtype: str, length: int, backward: bool, widths: Widths, device: str = "cuda"
) -> Memory:
    """Peak of PyTorch's allocations in one call, beyond its inputs; another call goes before."""
    # FlexAttention is compiled for every problem, and torch keeps eight graphs of one function.
    torch.compiler.reset()
    problem = _problem(widths, length, dtype, backward, device)

    def call() -> int:
        for leaf in problem.leaves:
            leaf.grad = None
        outputs = forward()
        output_bytes = outputs[0].nbytes
        if backward:
            problem.backward(outputs)
        return output_bytes

    with torch.set_grad_enabled(backward):
        try:
            forward = build(attention, problem)
        except Unavailable as reason:
            return Memory(attention, dtype, length, backward, -1, -1, str(reason))
        call()
        for leaf in problem.leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output_bytes = call()
        peak = torch.cuda.max_memory_allocated() - before
    output_bytes += sum(leaf.grad.nbytes for leaf in problem.leaves if leaf.grad is not None)
    return Memory(attention, dtype, length, backward, peak, output_bytes)


# ---- the page -----------------------------------------------------------------------------------

PAGE = """# Smart Bird on {name}

Written by `python -m benchmarks.speed.gpu`; what is measured and how stands in
`benchmarks/speed/gpu.py`.

{facts}
## Speed-up over dense attention

Over SDPA: in bfloat16 its FlashAttention kernels, in float32 the kernels it chooses.

{speed_ups}
## Forward

<!-- table {stem}:forward -->
<!-- end -->

## Forward and backward

<!-- table {stem}:backward -->
<!-- end -->

## {batch} sequences of {batched_length}

{batched}
## Stages

Work and least time by `benchmarks/speed/roofline.py`: "gathered" are its cached bytes, "streamed"
its HBM bytes. No least time where the GPU is not among those of `docs/cuda.md`.

<!-- table {stem}:stages -->
<!-- end -->

## Memory

<!-- table {stem}:memory -->
<!-- end -->
"""


def make_page(results: Results, stem: str) -> str:
    """All tables of a run, of which the JSON is called ``stem``."""
    gpu = results.environment["gpu"]
    facts = [[key, str(value)] for key, value in gpu.items()]
    facts += [[key, str(results.environment[key])] for key in ("torch", "date")]
    widths = results.environment["arguments"]
    shape = ("heads", "head_dim", "sketch_dim", "num_samples")
    facts.append(["shape", ", ".join(f"{name} {widths[name]}" for name in shape)])
    batched = [t for t in results.timings if t.case.batch > 1]
    page = PAGE.format(
        name=gpu["name"],
        stem=stem,
        facts=table(["", ""], facts),
        speed_ups=table(["N", "dtype", "", *(f"`{name}`" for name in OURS)], _speed_ups(results)),
        batch=BATCH,
        batched_length=batched[0].case.length,
        batched=table(
            ["", "dtype", "attention", "ms: median [quartiles]"],
            [
                [pass_name(t.case.backward), t.dtype, t.attention, t.missing or t.spread]
                for t in batched
            ],
        ),
    )
    return update_page(page, {stem: results})


def _speed_ups(results: Results) -> Iterator[list[str]]:
    medians = {(t.case, t.dtype, t.attention): t.median for t in results.timings if not t.missing}
    for case in dict.fromkeys(t.case for t in results.timings if t.case.batch == 1):
        for dtype, dense in DENSE.items():
            rival = medians.get((case, dtype, dense))
            ours = [medians.get((case, dtype, name)) for name in OURS]
            yield [
                str(case.length),
                dtype,
                pass_name(case.backward),
                *(f"{rival / x:.2f}x ({ms(x)} ms)" if rival and x else "-" for x in ours),
            ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tests")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a case")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="JSON",
        help="default: docs/performance/gpu-NAME.json; plots and NAME.md are written beside it",
    )
    widths = Widths()
    parser.add_argument("--heads", type=int, default=widths.heads)
    parser.add_argument("--head-dim", type=int, default=widths.head_dim)
    parser.add_argument("--sketch-dim", type=int, default=widths.sketch_dim)
    parser.add_argument("--num-samples", type=int, default=widths.num_samples)
    args = parser.parse_args(argv)
    if args.device == "cuda" and (reason := why_no_cuda()):
        sys.exit(f"error: {reason}")
    widths = Widths(args.heads, args.head_dim, args.sketch_dim, args.num_samples)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    gpu, threads = describe(args.device), torch.get_num_threads()
    name = re.sub(r"\W+", "-", gpu["name"].lower())
    out: Path = args.out or Path(f"docs/performance/gpu-{name}.json")
    environment = {"arguments": arguments, "threads": threads, "gpu": gpu}
    results = Results(machine.describe() | environment)
    try:
        run(args.device, args.lengths, widths, args.seconds, results)
    finally:  # what was measured before an error is not lost
        results.save(out)
    write_plots(results, out.with_suffix(""))
    out.with_suffix(".md").write_text(make_page(results, out.stem))
    print(f"\n{out} and {out.with_suffix('.md')} written")


if __name__ == "__main__":
    main()

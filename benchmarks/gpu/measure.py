"""Times Smart Bird attention and its rivals on a GPU, in a process of its own: ``benchmarks.gpu``.

Times are the GPU's own, between two events, with its L2 cache overwritten before each repetition.
Where the host takes longer to launch the kernels than the GPU to run them, that is in the time.

Every contender on every problem is an item. What cannot be measured is told and the next item
begins; a fault after which CUDA serves this process no more ends it, and ``benchmarks.gpu`` begins
another one behind that item. Answers are lines of JSON: ``plan``, what and where every item is;
``begin``, the place of one; then its record, ``kind`` and ``fields`` of ``benchmarks.gpu.report``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.report import BFLOAT16, DENSE, WINDOW, Failure, Kernel, Time
from benchmarks.speed import roofline
from benchmarks.speed.contenders import (
    DISTILL,
    FLASH_ATTN,
    FLEX_BLOCKS,
    GRAPH,
    GUMBEL,
    SDPA,
    SDPA_FLASH,
    SYSTEMATIC,
    Problem,
    Unavailable,
    Widths,
)
from benchmarks.speed.machine import cache_bytes
from benchmarks.speed.ratios import LEARNED_SCORES
from benchmarks.speed.results import Case, Limits
from benchmarks.speed.stages import draw_keys
from benchmarks.speed.timing import interleave, time_case, wall_clock
from smartbird.ops import gather_attention, gather_scores, sketch_lse

FLOAT32 = "float32"
OURS = (SYSTEMATIC, GUMBEL)
ITEM_SECONDS = 60  # after which an item is taken to hang; most of it is for compilers


@dataclasses.dataclass(frozen=True)
class Shape:
    """``kv_heads`` None: as many as heads."""

    name: str
    widths: Widths
    kv_heads: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the problems.

    Attributes:
        shapes: the first is also that of single kernels and of ``batch``.
        lengths: N, that which matters most first: of single kernels, too.
        caches: keys of one query.
        batch: sequences, and the length of each.
        matrix: rows of the product that shows what the card computes.
        copied: bytes whose copy shows what its memory delivers.
        seconds: aimed at for the repetitions of each contender.
    """

    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    caches: tuple[int, ...]
    batch: tuple[int, int]
    matrix: int
    copied: int
    seconds: float


SIZES = {
    "cuda": Sizes(
        shapes=(Shape("12 x 64", Widths()), Shape("32 / 8 x 128", Widths(32, 128), 8)),
        lengths=(16384, 65536, 4096, 131072),
        caches=(1024, 32768, 1 << 20),
        batch=(16, 1024),
        matrix=8192,
        copied=1 << 30,
        seconds=0.2,
    ),
    "cpu": Sizes(  # for tests
        shapes=(
            Shape("2 x 16", Widths(2, 16, 8, 16)),
            Shape("4 / 2 x 16", Widths(4, 16, 8, 16), 2),
        ),
        lengths=(48,),
        caches=(40,),
        batch=(3, 32),
        matrix=64,
        copied=1 << 16,
        seconds=0.001,
    ),
}


# ---- the device ---------------------------------------------------------------------------------


def describe(device: str) -> dict[str, Any]:
    """The card by name, and what drives it."""
    if device == "cpu":
        return {"card": "no GPU: the CPU"}
    properties = torch.cuda.get_device_properties()
    driver = "unknown"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory >> 30} GiB",
        "driver": driver,
        "CUDA": torch.version.cuda,
    }


class CudaClock:
    """Seconds of a call on the current GPU.

    Attributes:
        peak_bytes: of PyTorch's allocations in the last call, beyond what there was before it.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._overwritten = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
        self.peak_bytes = -1

    def __call__(self, call: Callable[[], object]) -> float:
        event: type[Any] = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._overwritten.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        return float(begin.elapsed_time(end)) / 1e3


class CpuClock:
    """Stands in for it where there is no GPU."""

    peak_bytes = -1

    def __call__(self, call: Callable[[], object]) -> float:
        return wall_clock(call)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    device: str
    clock: CudaClock | CpuClock

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.device]

    @classmethod
    def on(cls, device: str) -> Bench:
        return cls(device, CudaClock() if device == "cuda" else CpuClock())

    def lost(self) -> bool:
        """Whether CUDA serves this process no more."""
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


# ---- what is measured ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    """``measure`` gives a record of the list ``kind`` of a report."""

    what: str
    where: str
    kind: str
    measure: Callable[[], Limits | Time | Kernel]


def plan(bench: Bench) -> list[Item]:
    """What matters most first, what compiles itself late: there may be no time for the rest."""
    sizes, threads = bench.sizes, torch.get_num_threads()
    main, shape = sizes.lengths[0], sizes.shapes[0]
    items = [Item("ceilings", "the card", "limits", lambda: measure_limits(bench))]
    for name in KERNELS:
        measure = functools.partial(measure_kernel, bench, name, shape, main)
        items.append(Item(name, f"{shape.name}, N = {main}", "kernels", measure))

    def time_all(
        shape: Shape, case: Case, attentions: Sequence[str], dtype: str = BFLOAT16
    ) -> None:
        case = dataclasses.replace(case, kv_heads=shape.kv_heads)
        for attention in attentions:
            measure = functools.partial(measure_time, bench, shape, case, attention, dtype)
            items.append(Item(attention, f"{shape.name}, {case}, {dtype}", "times", measure))

    cases = [Case(length, b, threads) for length in sizes.lengths for b in (False, True)]
    for case in cases:
        for each in sizes.shapes:
            time_all(each, case, (*_installed(DENSE), *OURS))
            time_all(each, dataclasses.replace(case, score_std=LEARNED_SCORES), OURS)
    for keys in sizes.caches:
        for each in sizes.shapes:
            names = [name + how for name in (SDPA_FLASH, *OURS) for how in ("", GRAPH)]
            time_all(each, Case(keys, False, threads, queries=1), names)
    time_all(shape, Case(main, True, threads), (GUMBEL + DISTILL,))
    batch, length = sizes.batch
    for backward in (False, True):
        time_all(shape, Case(length, backward, threads, batch), (SDPA_FLASH, *OURS))
        time_all(shape, Case(main, backward, threads), (SDPA, *OURS), FLOAT32)
    for case in cases:
        for each in sizes.shapes:
            time_all(each, case, (*_installed(WINDOW), FLEX_BLOCKS))
    return items


def _installed(names: Sequence[str]) -> list[str]:
    """Without those of the package flash_attn where there is none."""
    return [name for name in names if not name.startswith(FLASH_ATTN) or find_spec("flash_attn")]


def measure_limits(bench: Bench) -> Limits:
    """What products of torch compute, and its copies and sums read and write, per second."""
    sizes = bench.sizes

    def least_seconds(call: Callable[[], object]) -> float:
        return min(bench.clock(call) for _ in range(6))  # the first sets up what it needs

    flops = {}
    for dtype in (BFLOAT16, FLOAT32):
        a = torch.randn(sizes.matrix, sizes.matrix, device=bench.device).to(getattr(torch, dtype))
        flops[dtype] = 2 * sizes.matrix**3 / least_seconds(functools.partial(torch.mm, a, a))
    source = torch.ones(sizes.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    hbm = 2 * sizes.copied / least_seconds(lambda: target.copy_(source))
    # One array that fits into L2, read again and again.
    l2 = cache_bytes()["L2"]
    if bench.device == "cuda":
        l2 = torch.cuda.get_device_properties().L2_cache_size
    part = source[: l2 // 4 // source.element_size()]
    passes = math.ceil(sizes.copied / part.nbytes)
    out = torch.empty(passes, device=bench.device)
    rows = part.expand(passes, -1)
    read = passes * part.nbytes / least_seconds(lambda: torch.sum(rows, dim=1, out=out))
    return Limits(torch.get_num_threads(), flops, {"HBM": hbm, "L2": read})


def measure_time(bench: Bench, shape: Shape, case: Case, attention: str, dtype: str) -> Time:
    """
    Raises:
        Unavailable: the contender does not run here.
    """
    (timing,) = time_case(
        case, [(attention, dtype)], shape.widths, bench.sizes.seconds, bench.device, bench.clock
    )
    if timing.missing:
        raise Unavailable(timing.missing)
    return Time(shape.name, timing, bench.clock.peak_bytes)


def measure_kernel(bench: Bench, name: str, shape: Shape, length: int) -> Kernel:
    """One op on one sequence whose rows are flat."""
    call = kernel_call(name, _flat_problem(bench, shape, length))
    seconds = interleave({name: call}, bench.sizes.seconds, clock=bench.clock)[name]
    work = roofline.kernels(shape.widths, length, torch.bfloat16.itemsize)[name]
    return Kernel(
        name,
        shape.name,
        length,
        BFLOAT16,
        statistics.median(seconds),
        hbm_bytes=work.hbm_bytes,
        cached_bytes=work.cached_bytes,
        tile_flops=work.tile_flops,
        fma_flops=work.fma_flops,
    )


def _flat_problem(bench: Bench, shape: Shape, length: int) -> Problem:
    return Problem.random(
        shape.widths,
        batch=1,
        length=length,
        dtype=torch.bfloat16,
        requires_grad=True,
        device=bench.device,
    )


DRAWN_BY = {roofline.SAMPLE_SYSTEMATIC: SYSTEMATIC, roofline.SAMPLE_GUMBEL: GUMBEL}
KERNELS = (
    *DRAWN_BY,
    roofline.GATHER_SCORES,
    roofline.GATHER,
    roofline.BACKWARD,
    roofline.LSE,
    roofline.MEAN,
)


def kernel_call(name: str, p: Problem) -> Callable[[], object]:
    """A call of one of ``KERNELS``; the forward pass of a gradient runs here, once."""
    heads, device = p.q.shape[1], p.q.device
    q, k, v, q_sketch, k_sketch = (leaf.detach() for leaf in p.leaves)
    if name in DRAWN_BY:
        seed = torch.tensor([1, 2], device=device)
        return lambda: draw_keys(p, method=DRAWN_BY[name], num_index_heads=heads, seed=seed)
    if name == roofline.LSE:
        return lambda: sketch_lse(q_sketch, k_sketch)
    if name == roofline.MEAN:
        sketches = (p.q_sketch, p.k_sketch)
        lse = sketch_lse(*sketches)
        ones = torch.ones_like(lse)
        return lambda: torch.autograd.grad(lse, sketches, ones, retain_graph=True)
    # Not drawn, so that a fault of the sampler is none of the gather's.
    shape = (1, heads, p.length, p.num_samples)
    indices = torch.randint(p.length, shape, dtype=torch.int32, device=device).sort(-1).values
    if name == roofline.GATHER_SCORES:
        return lambda: gather_scores(q, k, indices)
    if name == roofline.GATHER:
        return lambda: gather_attention(q, k, v, indices)
    assert name == roofline.BACKWARD
    leaves = (p.q, p.k, p.v)
    out = gather_attention(*leaves, indices)
    return lambda: torch.autograd.grad(out, leaves, p.dout, retain_graph=True)


# ---- the process --------------------------------------------------------------------------------


def answers(bench: Bench, first: int, stop: float) -> Iterator[dict[str, Any]]:
    """Measures the items from ``first`` on, until ``time.monotonic`` is ``stop``."""
    items = plan(bench)
    yield {"plan": [(item.what, item.where) for item in items]}
    for place in range(first, len(items)):
        if time.monotonic() >= stop:
            return
        yield {"begin": place}
        kind, item = items[place].kind, items[place]
        record: Limits | Time | Kernel | Failure
        try:
            record = item.measure()
        except Exception as error:  # whatever it is, there is more to measure
            reason = str(error).partition("\n")[0]
            if not isinstance(error, Unavailable):
                reason = f"{type(error).__name__}: {reason}"
            kind, record = "failures", Failure(item.what, item.where, reason)
        yield {"kind": kind, "fields": dataclasses.asdict(record)}
        if kind == "failures" and bench.lost():
            return


def run_once(bench: Bench) -> None:
    """Every kernel once, for a profiler."""
    problem = _flat_problem(bench, bench.sizes.shapes[0], bench.sizes.lengths[0])
    for name in KERNELS:
        kernel_call(name, problem)()
    bench.lost()  # waits


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--first", type=int, default=0, help="place of the item to begin with")
    parser.add_argument(
        "--stop", type=float, default=math.inf, help="of time.monotonic: no item begins later"
    )
    parser.add_argument("--once", action="store_true", help="run every kernel once, untimed")
    args = parser.parse_args(argv)
    bench = Bench.on(args.device)
    if args.once:
        run_once(bench)
        return
    # Answers go where output went; whatever a library prints goes to stderr.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in answers(bench, args.first, args.stop):
        print(json.dumps(answer), file=stdout, flush=True)
        if "begin" in answer:
            # Not caught, so that it ends this process even where that waits for a GPU that hangs.
            left = min(args.stop - time.monotonic(), ITEM_SECONDS)
            signal.alarm(math.ceil(max(left, 1)))
    signal.alarm(0)


if __name__ == "__main__":
    main()

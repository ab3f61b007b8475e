"""Peak memory of one attention call, measured in a process that runs nothing else."""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.common.memory import peak_mib, reset_peak
from benchmarks.speed.contenders import CONTENDERS, Problem, Unavailable, Widths, build
from benchmarks.speed.results import Memory

# The length of a first call, for what libraries and thread pools take once.
WARM_UP_LENGTH = 256


def measure_memory(
    attention: str, dtype: str, length: int, *, backward: bool, widths: Widths, threads: int
) -> Memory:
    """Peak resident memory of one call on a problem of batch 1, beyond its inputs.

    A call at length 256 goes before it, for contenders that compile also one at its own length.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            peak, outputs = process.submit(
                _peak_and_output_bytes, attention, dtype, length, backward, widths, threads
            ).result()
    except Unavailable as reason:
        return Memory(attention, dtype, length, backward, -1, -1, str(reason))
    except BrokenProcessPool:
        return Memory(attention, dtype, length, backward, -1, -1, "its process was killed")
    return Memory(attention, dtype, length, backward, peak, outputs)


def _peak_and_output_bytes(
    attention: str, dtype: str, length: int, backward: bool, widths: Widths, threads: int
) -> tuple[int, int]:
    torch.set_num_threads(threads)

    def problem_of(length: int) -> Problem:
        return Problem.random(
            widths,
            batch=1,
            length=length,
            dtype=getattr(torch, dtype),
            requires_grad=backward,
        )

    with torch.set_grad_enabled(backward):
        problem = problem_of(length)
        forward = build(attention, problem)
        if not CONTENDERS[attention].compiled:
            small = problem_of(WARM_UP_LENGTH)
            _run(small, build(attention, small)())
            del small
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        before = peak_mib()
        outputs = forward()
        output_bytes = outputs[0].nbytes
        _run(problem, outputs)
        after = peak_mib()
    gradients = (leaf.grad for leaf in problem.leaves)
    output_bytes += sum(gradient.nbytes for gradient in gradients if gradient is not None)
    return round((after - before) * 2**20), output_bytes


def _run(problem: Problem, outputs: tuple[torch.Tensor, ...]) -> None:
    if problem.requires_grad:
        problem.backward(outputs)

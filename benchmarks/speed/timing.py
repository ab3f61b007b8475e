"""Times attentions side by side.

All contenders of a case run in one process and take turns, so that a slow spell of the machine
meets them all; each runs untimed first. A ratio compares medians of one case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from benchmarks.speed.contenders import CONTENDERS, Problem, Unavailable, Widths, build
from benchmarks.speed.layers import build_whole
from benchmarks.speed.results import ATTENTION, Case, Timing

Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[Callable[[], object]], float]

MIN_REPETITIONS = 3
MAX_REPETITIONS = 25


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that ``call`` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_case(
    case: Case,
    contenders: Sequence[tuple[str, str]],
    widths: Widths,
    seconds: float,
    device: str = "cpu",
    clock: Clock = wall_clock,
) -> list[Timing]:
    """One Timing for each of ``contenders``, (attention, dtype).

    Args:
        case: the problem and how to run it. Leaves its number of threads set.
        contenders: to be run interleaved.
        widths: of the problem.
        seconds: aimed at for the repetitions of each contender; there are at least 3, at most 25.
        device: of the problem.
        clock: runs a call and gives its seconds.
    """
    torch.set_num_threads(case.threads)
    torch.compiler.reset()  # what earlier cases compiled
    problems: dict[str, Problem] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    missing: dict[tuple[str, str], str] = {}
    with torch.set_grad_enabled(case.backward):
        # Compiled ones last: importing another's library changes what their guards look at.
        for attention, dtype in sorted(contenders, key=lambda c: CONTENDERS[c[0]].compiled):
            try:
                if case.part != ATTENTION:
                    call = build_whole(attention, case, widths, getattr(torch, dtype), device)
                else:
                    if dtype not in problems:
                        problems[dtype] = _problem(case, widths, dtype, device)
                    call = _call(attention, problems[dtype])
                calls[attention, dtype] = call
            except (Unavailable, torch.OutOfMemoryError) as reason:
                missing[attention, dtype] = str(reason).partition("\n")[0]
        leaves = [leaf for problem in problems.values() for leaf in problem.leaves]
        times = interleave(calls, seconds, leaves, clock)
    return [
        Timing(case, *contender, times.get(contender, []), missing.get(contender))
        for contender in contenders
    ]


def _problem(case: Case, widths: Widths, dtype: str, device: str) -> Problem:
    return Problem.random(
        widths,
        batch=case.batch,
        length=case.length,
        dtype=getattr(torch, dtype),
        requires_grad=case.backward,
        score_std=case.score_std,
        queries=case.queries,
        kv_heads=case.kv_heads,
        trained=case.trained,
        lengths=case.lengths,
        device=device,
    )


def _call(attention: str, problem: Problem) -> Callable[[], object]:
    forward = build(attention, problem)
    if not problem.requires_grad:
        return forward
    return lambda: problem.backward(forward())


def interleave(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    leaves: Iterable[torch.Tensor] = (),
    clock: Clock = wall_clock,
) -> dict[Name, list[float]]:
    """Seconds of each repetition of each call; the gradients of ``leaves`` are dropped in between.

    A fast call is repeated more often than a slow one, and the repetitions of each are spread over
    the whole time.
    """
    leaves = tuple(leaves)

    def run(call: Callable[[], object]) -> float:
        for leaf in leaves:
            leaf.grad = None
        return clock(call)

    repetitions = {}
    for name, call in calls.items():
        took = run(call)
        if took < seconds:  # the first run may have loaded or set up more than the next ones do
            took = run(call)
        wanted = int(seconds / took)
        repetitions[name] = min(max(wanted, MIN_REPETITIONS), MAX_REPETITIONS)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    rounds = max(repetitions.values(), default=0)
    for done in range(rounds):
        for name, call in calls.items():
            if (done + 1) * repetitions[name] // rounds > done * repetitions[name] // rounds:
                times[name].append(run(call))
    return times

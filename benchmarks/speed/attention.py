"""Times Smart Bird attention and its rivals on this machine; prints ratios, writes JSON.

``python -m benchmarks.speed.report`` makes the tables and plots of the documentation from the JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import machine
from benchmarks.speed.contenders import Widths
from benchmarks.speed.memory import measure_memory
from benchmarks.speed.presets import PRESETS, Preset
from benchmarks.speed.ratios import ratios
from benchmarks.speed.results import Results
from benchmarks.speed.stages import measure_stages
from benchmarks.speed.timing import time_case

BUSY_LOAD = 0.5  # above it something else takes part of the machine


def run(preset: Preset, widths: Widths, arguments: dict[str, Any]) -> Results:
    """Measures all that ``preset`` holds: the machine first, then timings, stages and memory."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    environment = machine.describe()
    if environment["load_before"][0] > BUSY_LOAD:
        _say(f"warning: load average {environment['load_before'][0]:.2f}: this machine is busy")
    results = Results(environment | {"arguments": arguments, "threads": threads})
    needed = {case.threads for case, _ in preset.cases} | {case.threads for case in preset.stages}
    for n in sorted(needed):
        results.limits.append(machine.measure_limits(n))
        _say(results.limits[-1])
    for case, contenders in preset.cases:
        for timing in time_case(case, contenders, widths, preset.seconds):
            results.timings.append(timing)
            _say(timing)
    for stage_case in preset.stages:
        limits = next(x for x in results.limits if x.threads == stage_case.threads)
        for stage in measure_stages(
            widths,
            length=stage_case.length,
            dtype=stage_case.dtype,
            limits=limits,
            cache_bytes=environment["cache_bytes"],
            seconds=preset.seconds,
        ):
            results.stages.append(stage)
            _say(stage)
    for memory_case in preset.memory:
        memory = measure_memory(
            memory_case.attention,
            "float32",
            memory_case.length,
            backward=memory_case.backward,
            widths=widths,
            threads=threads,
        )
        results.memory.append(memory)
        _say(memory)
    torch.set_num_threads(threads)
    results.environment["load_after"] = os.getloadavg()
    results.environment["seconds"] = time.perf_counter() - start
    return results


def _say(measurement: object) -> None:
    print(measurement, flush=True)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    if args.isa == "avx2" and any(
        os.environ.get(name) != value for name, value in machine.AVX2_ENVIRONMENT.items()
    ):
        # Libraries read these when they are loaded: a new process, in place of this one.
        command = [sys.executable, "-m", "benchmarks.speed.attention", *argv]
        os.execve(sys.executable, command, os.environ | machine.AVX2_ENVIRONMENT)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    widths = Widths(args.heads, args.head_dim, args.sketch_dim, args.num_samples)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    preset = PRESETS[args.preset](threads)
    for part in args.without:
        getattr(preset, part).clear()
    results = run(preset, widths, arguments)
    print()
    for ratio in ratios(results):
        print(ratio)
    if args.out:
        results.save(args.out)
        print(f"\n{args.out} written")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.attention", description=__doc__
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help="default: quick")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all measurements here")
    parser.add_argument(
        "--isa",
        choices=("native", "avx2"),
        default="native",
        help="avx2: hold PyTorch, its libraries and smartbird to AVX2, on a machine that has more",
    )
    parser.add_argument(
        "--without", nargs="+", choices=("stages", "memory"), default=(), help="what to leave out"
    )
    parser.add_argument("--threads", type=int, help="default: PyTorch's, one per core")
    widths = Widths()
    parser.add_argument("--heads", type=int, default=widths.heads)
    parser.add_argument("--head-dim", type=int, default=widths.head_dim)
    parser.add_argument("--sketch-dim", type=int, default=widths.sketch_dim)
    parser.add_argument("--num-samples", type=int, default=widths.num_samples)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

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
from benchmarks.speed.baseline import time_both
from benchmarks.speed.contenders import Widths
from benchmarks.speed.memory import measure_memory
from benchmarks.speed.presets import PRESETS, Preset, StageCase
from benchmarks.speed.ratios import ratios
from benchmarks.speed.results import Results, Stage
from benchmarks.speed.stages import measure_stages
from benchmarks.speed.timing import time_case

BUSY = 0.05  # part of the machine's time; other programs that take more change times that much


def run(
    preset: Preset, widths: Widths, arguments: dict[str, Any], baseline: Path | None = None
) -> Results:
    """Measures all that ``preset`` holds: the machine first, then timings, stages and memory.

    With a ``baseline``, the directory of another version of smartbird, its cases are timed for both
    versions, and nothing else.
    """
    start, threads = time.perf_counter(), torch.get_num_threads()
    environment = machine.describe() | {"others_before": machine.others_now()}
    _warn_if_busy(environment["others_before"], "now: wait until they are done")
    others = machine.OtherWork()
    results = Results(environment | {"arguments": arguments, "threads": threads})
    if baseline is None:
        _measure(preset, widths, results)
    else:
        results.environment["baseline"] = time_both(preset, widths, baseline, results)
    torch.set_num_threads(threads)
    results.environment["load_after"] = os.getloadavg()
    results.environment["others_during"] = others.share()
    results.environment["seconds"] = time.perf_counter() - start
    return results


def _measure(preset: Preset, widths: Widths, results: Results) -> None:
    threads = torch.get_num_threads()
    needed = {case.threads for case, _ in preset.cases} | {case.threads for case in preset.stages}
    for n in sorted(needed):
        results.limits.append(machine.measure_limits(n))
        _say(results.limits[-1])
    for case, contenders in preset.cases:
        for timing in time_case(case, contenders, widths, preset.seconds):
            results.timings.append(timing)
            _say(timing)
    for stage_case in preset.stages:
        for stage in _stages(stage_case, preset.seconds, widths, results):
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


def _stages(stage_case: StageCase, seconds: float, widths: Widths, results: Results) -> list[Stage]:
    """Measures stages, and where one seems faster than the limits, both once more."""
    place = next(i for i, x in enumerate(results.limits) if x.threads == stage_case.threads)

    def measure() -> list[Stage]:
        return measure_stages(
            widths,
            length=stage_case.length,
            dtype=stage_case.dtype,
            limits=results.limits[place],
            cache_bytes=results.environment["cache_bytes"],
            seconds=seconds,
        )

    stages = measure()
    if any(stage.disturbed for stage in stages):
        again = machine.measure_limits(stage_case.threads)
        results.limits[place] = machine.best_of(results.limits[place], again)
        _say(f"a stage was faster than the limits; again, {results.limits[place]}")
        stages = measure()
    return stages


def _warn_if_busy(share: float, when: str) -> None:
    if share > BUSY:
        _say(f"warning: other programs take {share:.0%} of this machine {when}")


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
    # Without paths: they mean nothing on another machine.
    arguments = {name: x for name, x in vars(args).items() if name not in ("out", "baseline")}
    preset = PRESETS[args.preset](threads)
    for part in args.without:
        getattr(preset, part).clear()
    results = run(preset, widths, arguments, args.baseline)
    print()
    _warn_if_busy(results.environment["others_during"], "during this run: its times are less sure")
    for ratio in ratios(results):
        print(ratio)
    if args.out:
        results.save(args.out)
        print(f"\n{args.out} written")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.attention", description=__doc__
    )
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), help="default: quick; with --baseline gains"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="a checkout of another version of smartbird with its extension built: time the cases "
        "of the preset with both, in turns, and nothing else",
    )
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
    args = parser.parse_args(argv)
    args.preset = args.preset or ("quick" if args.baseline is None else "gains")
    if args.baseline is not None and not (args.baseline / "smartbird").is_dir():
        parser.error(f"--baseline: there is no smartbird in {args.baseline}")
    return args


if __name__ == "__main__":
    main()

"""Measures context parallelism between processes of this machine; see docs/distributed.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.markdown import update_page
from benchmarks.common.records import commit
from benchmarks.distributed.measure import count_traffic, measure_memory, time_attention
from benchmarks.distributed.report import TABLES, Results
from benchmarks.speed.machine import describe

PARTS = ("traffic", "memory", "times")
LENGTHS, QUICK_LENGTHS = (4096, 16384, 65536), (256, 512)
REPETITIONS, LONG_REPETITIONS = 9, 2
LONG = 1 << 16  # from here on fewer repetitions
MIDDLE = 1  # of the lengths, that bytes and memory are of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/distributed/ranks.json"),
        help="JSON; parts that are not measured stay as they are there (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, help="Markdown whose tables are made anew")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts (default: all)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="N of times; others stay as they are in the JSON"
    )
    parser.add_argument("--quick", action="store_true", help="short sequences")
    options = parser.parse_args(arguments)
    results = Results.load(options.out) if options.out.exists() else Results()
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    middle = lengths[MIDDLE]

    def keep(found: object) -> None:
        print(found, flush=True)
        results.save(options.out)

    def traffic() -> None:
        results.traffic = []
        for ranks, exchange in ((2, "all_gather"), (4, "all_gather"), (4, "ulysses")):
            for backward in (False, True):
                results.traffic.append(count_traffic(middle, ranks, exchange, backward))
                keep(results.traffic[-1])

    def memory() -> None:
        results.memory = []
        for ranks, exchange in ((1, ""), (2, "all_gather"), (4, "all_gather"), (4, "ulysses")):
            results.memory.append(measure_memory(middle, ranks, exchange))
            keep(results.memory[-1])

    def times() -> None:
        timed = options.lengths or lengths
        results.times = [x for x in results.times if options.lengths and x.length not in timed]
        for length in timed:
            for backward in (False, True):
                repetitions = REPETITIONS if length < LONG else LONG_REPETITIONS
                results.times.append(time_attention(length, 2, backward, repetitions))
                results.times.sort(key=lambda x: (x.length, x.backward))
                keep(length)

    measure: dict[str, Callable[[], None]] = {"traffic": traffic, "memory": memory, "times": times}
    for part in PARTS if options.only is None else options.only:
        environment = {**describe(), "commit": commit(), "seconds": 0.0}
        results.environments[part] = environment
        start = time.perf_counter()
        measure[part]()
        environment["seconds"] = time.perf_counter() - start
        environment["load_after"] = os.getloadavg()
        results.save(options.out)
    for name, make in TABLES.items():
        print(f"\n{name}\n\n{make(results)}", end="")
    if options.page is not None:
        update_page(options.page, options.out.stem, results, TABLES)
    return 0


if __name__ == "__main__":
    sys.exit(main())

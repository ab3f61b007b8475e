"""What a run on a GPU found: JSON, a table of at most 40 lines, and what belongs into docs.

Into docs belong the JSON, as ``docs/performance/gpu-CARD.json``, and the tables of ``TABLES``. They
stand between ``<!-- table gpu-CARD:NAME -->`` and ``<!-- end -->`` and are made anew by::

    python -m benchmarks.gpu.report docs/performance/gpu-CARD.json --update docs/cuda.md

The log, the failures and what was left out do not: they are for whoever mends them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.common.page import text_table
from benchmarks.common.records import rounded, write_json
from benchmarks.speed import roofline
from benchmarks.speed.contenders import (
    DISTILL,
    FLASH_ATTN,
    FLASH_ATTN_WINDOW,
    FLEX_BLOCKS,
    FLEX_WINDOWS,
    GRAPH,
    GUMBEL,
    SDPA_CUDNN,
    SDPA_FLASH,
    SYSTEMATIC,
)
from benchmarks.speed.ratios import LEARNED_SCORES
from benchmarks.speed.results import Case, Limits, Timing, factor, ms, timing_of

MOST_LINES, MOST_FAILURES = 40, 4
BFLOAT16 = "bfloat16"
DENSE = (SDPA_FLASH, SDPA_CUDNN, FLASH_ATTN)
WINDOW = (FLEX_WINDOWS[-1], FLASH_ATTN_WINDOW)  # on GPUs FlexAttention's blocks are of 128


@dataclasses.dataclass(frozen=True)
class Check:
    """Tests, or a tool over them.

    Attributes:
        status: "passed", "failed", "cut off" for lack of time, or "not run".
        summary: what pytest and the tool say at their end, or why they were not run.
        failures: tests that failed, each with the beginning of the reason.
    """

    name: str
    status: str
    seconds: float
    summary: str
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        first = f"; first {self.failures[0]}" if self.failures else ""
        return f"{self.name}: {self.status}, {self.summary}{first}"


@dataclasses.dataclass(frozen=True)
class Time:
    """Of a contender on a shape; ``peak_bytes`` of PyTorch's allocations in a call, -1: unknown."""

    shape: str
    timing: Timing
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Median time of one op on flat rows, and its work by ``benchmarks.speed.roofline``."""

    name: str
    shape: str
    length: int
    dtype: str
    seconds: float
    hbm_bytes: float
    cached_bytes: float
    tile_flops: float
    fma_flops: float


@dataclasses.dataclass(frozen=True)
class Counters:
    """What ncu counts of the longest launch of a kernel: its time, and parts of peaks in %."""

    kernel: str
    microseconds: float
    multiprocessors: float
    l2: float
    hbm: float
    warps: float

    def __str__(self) -> str:
        return (
            f"ncu, {self.kernel}: {self.microseconds:.0f} us, SM {self.multiprocessors:.0f} %, "
            f"L2 {self.l2:.0f} %, HBM {self.hbm:.0f} %, warps {self.warps:.0f} %"
        )


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no result of ``what``, ``where``."""

    what: str
    where: str
    reason: str


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "limits": lambda fields: Limits(**fields),
    "checks": lambda fields: Check(**fields),
    "times": lambda fields: Time(**fields | {"timing": timing_of(fields["timing"])}),
    "kernels": lambda fields: Kernel(**fields),
    "counters": lambda fields: Counters(**fields),
    "failures": lambda fields: Failure(**fields),
}


@dataclasses.dataclass
class Report:
    """A run. ``facts`` say on what; ``left_out`` is what there was no time or no tool for."""

    facts: dict[str, Any]
    limits: list[Limits] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    times: list[Time] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    counters: list[Counters] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        """Adds a record, as ``dataclasses.asdict`` and JSON give it, to the list ``kind``.

        Rounded as in the file, so that a report that is read again says the same.
        """
        getattr(self, kind).append(RECORDS[kind](rounded(fields)))

    def save(self, folder: Path) -> None:
        """Writes gpu.json and table.txt, each in one step: a program that is killed leaves them
        whole.
        """
        part = folder / "part"
        write_json(part, self)
        part.replace(folder / "gpu.json")
        part.write_text("".join(f"{line}\n" for line in lines(self)), encoding="utf-8")
        part.replace(folder / "table.txt")

    @classmethod
    def load(cls, path: Path) -> Report:
        fields = json.loads(path.read_text(encoding="utf-8"))
        report = cls(fields["facts"], left_out=fields["left_out"])
        for kind in RECORDS:
            for record in fields[kind]:
                report.add(kind, record)
        return report


# ---- tables: rows of text, the first of them the head -------------------------------------------

Rows = list[list[str]]
Pair = tuple[float | None, float | None]
Medians = Mapping[tuple[str, Case, str], float]  # by shape, case and attention


def facts(report: Report) -> Rows:
    return [["", ""], *([name, str(value)] for name, value in report.facts.items())]


def checks(report: Report) -> Rows:
    rows = [[x.name, x.status, f"{x.seconds:.0f}", x.summary] for x in report.checks]
    return [["", "", "s", ""], *rows]


def times(report: Report) -> Rows:
    """Of one sequence; "dense" and "window" are the faster of their kernels."""
    found = _medians(report)
    problems = {
        (shape, dataclasses.replace(case, backward=False, score_std=1.0))
        for shape, case, _ in found
        if case.queries is None and case.batch == 1
    }
    columns = ["dense", "window", "blocks", SYSTEMATIC, GUMBEL]
    columns += [f"{name}, learned" for name in (SYSTEMATIC, GUMBEL)]
    rows = [["ms: forward / with backward", *columns, f"{SYSTEMATIC} over dense"]]
    for shape, flat in sorted(problems, key=lambda problem: (problem[0], problem[1].length)):
        learned = dataclasses.replace(flat, score_std=LEARNED_SCORES)
        dense, ours = (_passes(found, shape, flat, names) for names in (DENSE, (SYSTEMATIC,)))
        pairs = [dense, *(_passes(found, shape, flat, names) for names in (WINDOW, (FLEX_BLOCKS,)))]
        pairs += [ours, _passes(found, shape, flat, (GUMBEL,))]
        pairs += [_passes(found, shape, learned, (name,)) for name in (SYSTEMATIC, GUMBEL)]
        rows.append([f"{shape}, N = {flat.length}", *map(_ms, pairs), _speed_ups(dense, ours)])
    return rows


def decode(report: Report) -> Rows:
    """One query on the keys of a cache."""
    found = _medians(report)
    problems = {(shape, case) for shape, case, _ in found if case.queries is not None}
    columns = ["dense", SYSTEMATIC, GUMBEL]
    rows = [["ms: launched / as a graph", *columns, f"{SYSTEMATIC} over dense"]]
    for shape, case in sorted(problems, key=lambda problem: (problem[0], problem[1].length)):
        pairs = [
            (_least(found, shape, case, (name,)), _least(found, shape, case, (name + GRAPH,)))
            for name in (SDPA_FLASH, SYSTEMATIC, GUMBEL)
        ]
        title = f"{shape}, 1 of {case.length} keys"
        rows.append([title, *map(_ms, pairs), _speed_ups(pairs[0], pairs[1])])
    return rows


def others(report: Report) -> Rows:
    """What is in neither: batches, float32, distillation."""
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for time in report.times:
        t = time.timing
        if t.case.batch > 1 or t.dtype != BFLOAT16 or t.attention.endswith(DISTILL):
            rows[time.shape, str(t.case), t.dtype].append(f"{t.attention} {ms(t.median)}")
    return [
        ["", "ms"],
        *([", ".join(problem), "; ".join(cells)] for problem, cells in rows.items()),
    ]


def kernels(report: Report) -> Rows:
    """Ops one by one, and the parts that they reach of what the card was seen to deliver."""
    rows = [["op", "ms", "HBM", "L2", "tensor cores", "FMA"]]
    for kernel in report.kernels:
        parts = ["-"] * 4
        for limits in report.limits:
            work = (
                kernel.hbm_bytes / limits.bandwidth["HBM"],
                kernel.cached_bytes / limits.bandwidth["L2"],
                kernel.tile_flops / limits.flops[BFLOAT16],
                kernel.fma_flops / limits.flops["float32"],
            )
            parts = [f"{seconds / kernel.seconds:.0%}" for seconds in work]
        title = f"{kernel.name}; {kernel.shape}, N = {kernel.length}"
        rows.append([title, ms(kernel.seconds), *parts])
    return rows


TABLES = {
    "facts": facts,
    "checks": checks,
    "times": times,
    "decode": decode,
    "kernels": kernels,
    "others": others,
}


def lines(report: Report) -> list[str]:
    """All that fits into ``MOST_LINES``, the most important first."""
    made = [", ".join(f"{name} {value}" for name, value in report.facts.items() if value)]
    made += _ceilings(report)
    made += map(str, report.checks)
    made += _failure_lines(report.failures)
    if report.left_out:
        made.append(f"left out, {len(report.left_out)}: {_some(report.left_out)}")
    for make in (times, decode, kernels):
        if len(rows := make(report)) > 1:
            made += text_table(rows).splitlines()
    made += map(str, report.counters)
    made += (": ".join(row) for row in others(report)[1:])
    if (more := len(made) - MOST_LINES) > 0:
        made[MOST_LINES - 1 :] = [f"and {more + 1} lines more: see gpu.json"]
    return made


def _ceilings(report: Report) -> Iterator[str]:
    """What the card was seen to deliver, of what its data sheet says."""
    sheet = roofline.find_device(report.facts.get("card", ""))
    most = {BFLOAT16: sheet.tensor, "float32": sheet.fma, "HBM": sheet.bandwidth} if sheet else {}
    for limits in report.limits:
        rates = [(name, x, "TFLOP/s") for name, x in limits.flops.items()]
        rates += [(name, x, "TB/s") for name, x in limits.bandwidth.items()]
        texts = [
            f"{name} {x / 1e12:.3g}{f' of {most[name] / 1e12:.3g}' if name in most else ''} {unit}"
            for name, x, unit in rates
        ]
        yield f"ceilings, measured: {', '.join(texts)}"


def _failure_lines(failures: Sequence[Failure]) -> list[str]:
    """Equal ones of a contender together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for failure in failures:
        groups[failure.what, failure.reason].append(failure.where)
    made = [
        f"no result of {what}, {len(where)} times ({_some(where)}): {reason[:160]}"
        for (what, reason), where in groups.items()
    ]
    if (more := len(made) - MOST_FAILURES) > 0:
        made[MOST_FAILURES:] = [f"and {more} failures more: see gpu.json"]
    return made


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:2]) + ("; ..." if len(names) > 2 else "")


def _medians(report: Report) -> Medians:
    return {
        (time.shape, time.timing.case, time.timing.attention): time.timing.median
        for time in report.times
        if time.timing.dtype == BFLOAT16
    }


def _least(found: Medians, shape: str, case: Case, names: Sequence[str]) -> float | None:
    return min((x for name in names if (x := found.get((shape, case, name)))), default=None)


def _passes(found: Medians, shape: str, forward: Case, names: Sequence[str]) -> Pair:
    """Of the forward pass, and with the backward pass."""
    both = dataclasses.replace(forward, backward=True)
    return _least(found, shape, forward, names), _least(found, shape, both, names)


def _ms(pair: Pair) -> str:
    return " / ".join("-" if x is None else ms(x) for x in pair)


def _speed_ups(rival: Pair, ours: Pair) -> str:
    pairs = zip(rival, ours, strict=True)
    return " / ".join(factor(x / y) if x and y else "-" for x, y in pairs)


def _markdown(make: Callable[[Report], Rows], report: Report) -> str:
    head, *rows = make(report)
    return markdown.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="else the lines are printed")
    args = parser.parse_args(argv)
    report = Report.load(args.json)
    if args.update is None:
        print("\n".join(lines(report)))
        return
    tables = {name: functools.partial(_markdown, make) for name, make in TABLES.items()}
    markdown.update_page(args.update, args.json.stem, report, tables)


if __name__ == "__main__":
    main()

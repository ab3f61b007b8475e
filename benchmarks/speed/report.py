"""Tables and plots of the documentation, from the JSON that ``benchmarks.speed.attention`` wrote.

A table goes between the lines ``<!-- table STEM:NAME -->`` and ``<!-- end -->`` of a Markdown file:
STEM is the name of a JSON file without its ending, NAME one of headline, losses, machine, ratios,
forward, backward, stages, memory, scaling, peaked, grouped, decode, padded, whole and gains. Plots
are written beside the JSON, as STEM-headline.png, STEM-time.png, STEM-memory.png and
STEM-stages.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.markdown import table, update_tables
from benchmarks.speed.contenders import (
    DISTILL,
    DRAW,
    FLEX_WINDOWS,
    GUMBEL,
    PACKED,
    SDPA,
    SYSTEMATIC,
)
from benchmarks.speed.plots import write_plots
from benchmarks.speed.ratios import headlines, ratios, versions
from benchmarks.speed.results import (
    ATTENTION,
    Case,
    Results,
    Timing,
    factor,
    ms,
    pass_name,
    threads_name,
)

MIB = 2**20
OURS = (GUMBEL, SYSTEMATIC, DRAW)  # how names of ours begin


def _headline(results: Results) -> str:
    """Times of dense attention and of Smart Bird, and how many times faster it is."""

    def cell(ours: float | None, sdpa: float) -> str:
        return "-" if ours is None else f"{ms(ours)} ({factor(sdpa / ours)})"

    return table(
        ["", "SDPA, ms", "`systematic`, ms", "`gumbel`, ms"],
        [
            [
                line.name,
                ms(line.sdpa),
                cell(line.systematic, line.sdpa),
                cell(line.gumbel, line.sdpa),
            ]
            for line in headlines(results)
        ],
    )


def _losses(results: Results) -> str:
    """Where a rival is faster than ``gumbel``, and how its time stands to ours."""
    medians = {(t.case, t.dtype, t.attention): t.median for t in results.timings if not t.missing}
    # The fastest of FlexAttention's windows stands for all of them.
    rivals: dict[tuple[Case, str, str], float] = {}
    for (case, dtype, attention), seconds in medians.items():
        name = "FlexAttention window" if attention in FLEX_WINDOWS else attention
        if not name.startswith(OURS) and DISTILL not in name:
            rivals[case, dtype, name] = min(seconds, rivals.get((case, dtype, name), math.inf))
    lost: dict[tuple[str, str, str], list[tuple[int, float, float | None]]] = {}
    for (case, dtype, name), seconds in rivals.items():
        suffix = PACKED if case.lengths is not None else ""
        gumbel, systematic = (
            medians.get((case, dtype, ours + suffix)) for ours in (GUMBEL, SYSTEMATIC)
        )
        if gumbel is not None and seconds < gumbel:
            what = re.sub(r"N = \d+, ", "", f"{case}, {threads_name(case.threads)}")
            other = None if systematic is None else seconds / systematic
            lost.setdefault((name, dtype, what), []).append((case.length, seconds / gumbel, other))
    return table(
        ["faster", "dtype", "where", "N", "its time over `gumbel`'s", "over `systematic`'s"],
        [
            [
                *key,
                ", ".join(str(length) for length, _, _ in of_key),
                _range([gumbel for _, gumbel, _ in of_key]),
                _range([systematic for _, _, systematic in of_key if systematic is not None]),
            ]
            for key, of_key in lost.items()
        ],
    )


def _range(values: Sequence[float]) -> str:
    """The least and the largest of some quotients."""
    ends = dict.fromkeys(f"{f(values):.2f}" for f in (min, max)) if values else ["-"]
    return " to ".join(ends)


def _machine(results: Results) -> str:
    e = results.environment
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in e["cache_bytes"].items())
    load = f"{e['load_before'][0]:.2f} before, {e['load_after'][0]:.2f} after"
    facts = [
        ["processor", f"{e['cpu']}, {e['cores']} cores, {caches}"],
        [
            "instruction sets",
            f"PyTorch {e['torch_cpu_capability']}, smartbird {e['smartbird']['cpu_isa']}",
        ],
        ["versions", f"torch {e['torch']}, Python {e['python']}"],
        ["run", f"{e['date']}, {e['seconds'] / 60:.0f} minutes; load average {load}"],
    ]
    if "others_during" in e:
        others = f"{e['others_before']:.0%} before, {e['others_during']:.0%} during the run"
        facts.append(["time that other programs took", others])
    if "baseline" in e:
        facts.append(["other version of smartbird", f"commit {e['baseline']['commit']}"])
    if not results.limits:
        return table(["", ""], facts)
    header = ["threads", *results.limits[0].flops, *results.limits[0].bandwidth]
    limits = [
        [
            str(x.threads),
            *(f"{flops / 1e9:.0f} GFLOP/s" for flops in x.flops.values()),
            *(f"{bandwidth / 1e9:.0f} GB/s" for bandwidth in x.bandwidth.values()),
        ]
        for x in results.limits
    ]
    return table(["", ""], facts) + "\n" + table(header, limits)


def _ratios(results: Results) -> str:
    rows = [[ratio.name, ratio.value_text, ratio.aim_text or "-"] for ratio in ratios(results)]
    return table(["", "measured", "aim"], rows)


def _forward(results: Results) -> str:
    return _times(results, backward=False)


def _backward(results: Results) -> str:
    return _times(results, backward=True)


def _times(results: Results, *, backward: bool) -> str:
    cells = [
        (t.attention, t.dtype, t.case.length, t.missing, "" if t.missing else t.spread)
        for t in results.timings
        if t.case == Case(t.case.length, backward, results.environment["threads"])
    ]
    return _by_length("ms: median [quartiles]", cells)


def _memory(results: Results) -> str:
    cells = [
        (
            f"{m.attention}, {pass_name(m.backward)}",
            m.dtype,
            m.length,
            m.missing,
            f"{m.peak_bytes / MIB:,.0f}",
        )
        for m in results.memory
    ]
    return _by_length("MiB beyond the inputs", cells)


def _by_length(title: str, cells: Sequence[tuple[str, str, int, str | None, str]]) -> str:
    """Cells (attention, dtype, length, why it is missing, text) with lengths as columns.

    What is missing is explained below the table.
    """
    lengths = sorted({length for _, _, length, _, _ in cells})
    rows: dict[tuple[str, str], list[str]] = {}
    missing: dict[str, list[str]] = {}
    for attention, dtype, length, reason, text in cells:
        row = rows.setdefault((attention, dtype), ["-"] * len(lengths))
        if reason is None:
            row[lengths.index(length)] = text
        elif attention not in missing.setdefault(reason, []):
            missing[reason].append(attention)
    header = [title, "dtype", *(f"N = {length}" for length in lengths)]
    text = table(header, [[*name, *row] for name, row in rows.items()])
    if not missing:
        return text
    return f"{text}\nNot run:\n\n" + "".join(
        f"- {'; '.join(attentions)}: {reason}\n" for reason, attentions in missing.items()
    )


def _stages(results: Results) -> str:
    header = ["N", "dtype", "threads", "stage", "ms", "GFLOP", "GB gathered", "GB streamed"]
    rows = [
        [
            str(stage.length),
            stage.dtype,
            str(stage.threads),
            stage.name,
            ms(stage.seconds),
            f"{stage.flops / 1e9:.2f}",
            f"{stage.gathered_bytes / 1e9:.2f}",
            f"{stage.streamed_bytes / 1e9:.2f}",
            "-" if stage.limit_seconds is None else ms(stage.limit_seconds),
            stage.reached,
            stage.bound,
        ]
        for stage in results.stages
    ]
    return table([*header, "least ms", "reached", "bound"], rows)


def _scaling(results: Results) -> str:
    """What was timed with one thread and with all."""
    threads = results.environment["threads"]
    timed = {(t.attention, t.dtype, t.case): t.median for t in results.timings if not t.missing}
    rows = []
    for (attention, dtype, case), one in timed.items():
        others = timed.get((attention, dtype, dataclasses.replace(case, threads=threads)))
        if case.threads == 1 and others is not None and threads > 1 and case.queries is None:
            rows.append(
                [
                    str(case.batch),
                    str(case.length),
                    pass_name(case.backward),
                    attention,
                    ms(one),
                    ms(others),
                    f"{one / others:.2f}x",
                ]
            )
    header = ["B", "N", "", "attention", "ms, 1 thread", f"ms, {threads} threads", "speed-up"]
    return table(header, rows)


def _peaked(results: Results) -> str:
    """Times with flat, with peaked and with trained sketches."""

    def flat(case: Case) -> Case:
        return dataclasses.replace(case, score_std=1.0, trained=False)

    peaked = {flat(t.case) for t in results.timings if flat(t.case) != t.case}
    rows: dict[Case, dict[str, Timing]] = {}
    for t in results.timings:
        if t.dtype == "float32" and flat(t.case) in peaked and t.case.part == ATTENTION:
            rows.setdefault(t.case, {})[t.attention] = t
    columns = (SYSTEMATIC, GUMBEL, SDPA)
    return table(
        ["N", "", "standard deviation of the sketch scores", *(f"{name}, ms" for name in columns)],
        [
            [
                str(case.length),
                pass_name(case.backward),
                "a trained sketch" if case.trained else f"{case.score_std:g}",
                *(row[name].spread if name in row else "-" for name in columns),
            ]
            for case, row in sorted(rows.items(), key=lambda item: _order(item[0]))
        ],
    )


def _order(case: Case) -> tuple[int, bool, bool, float]:
    return case.length, case.backward, case.trained, case.score_std


def _grouped(results: Results) -> str:
    """Heads that share key/value heads, and heads that do not."""
    grouped = [t.case for t in results.timings if t.case.kv_heads is not None]
    timed = {(t.attention, t.case): t for t in results.timings if t.dtype == "float32"}
    columns = (SYSTEMATIC, GUMBEL, SDPA)
    rows = []
    for case in dict.fromkeys(grouped):
        for each in (case, dataclasses.replace(case, kv_heads=None)):
            found = [timed.get((name, each)) for name in columns]
            heads = "as many as heads" if each.kv_heads is None else str(each.kv_heads)
            times = ["-" if t is None or t.missing else t.spread for t in found]
            rows.append([str(each.length), pass_name(each.backward), heads, *times])
    return table(["N", "", "key/value heads", *(f"{name}, ms" for name in columns)], rows)


def _decode(results: Results) -> str:
    """Few queries on a cache: times, and the speed-up over SDPA."""
    cases: dict[Case, dict[str, float]] = {}
    for t in results.timings:
        if t.case.queries is not None and t.dtype == "float32" and not t.missing:
            cases.setdefault(t.case, {})[t.attention] = t.median
    rows = []
    for case, medians in cases.items():
        row = [str(case.batch), str(case.length), str(case.threads)]
        sdpa = medians.get(SDPA)
        row.append("-" if sdpa is None else ms(sdpa))
        for ours in (SYSTEMATIC, GUMBEL):
            time = medians.get(ours)
            ratio = f" ({sdpa / time:.1f}x)" if sdpa and time else ""
            row.append("-" if time is None else f"{ms(time)}{ratio}")
        rows.append(row)
    columns = (f"{name}, ms" for name in (SDPA, SYSTEMATIC, GUMBEL))
    return table(["B", "keys", "threads", *columns], rows)


def _padded(results: Results) -> str:
    """A batch of mixed lengths: times, and the speed-up over SDPA with a mask."""
    timed = [t for t in results.timings if t.case.lengths is not None and not t.missing]
    masked = {(t.case, t.dtype): t.median for t in timed if t.attention == SDPA}
    rows = []
    for t in timed:
        lengths = t.case.lengths or ()
        real = sum(lengths) / (t.case.batch * t.case.length)
        sdpa = masked.get((t.case, t.dtype))
        ratio = "-" if sdpa is None else factor(sdpa / t.median)
        rows.append([", ".join(map(str, lengths)), f"{real:.0%}", t.attention, t.spread, ratio])
    header = ["lengths", "tokens", "attention", "ms: median [quartiles]"]
    return table([*header, "speed-up over SDPA with a mask"], rows)


def _whole(results: Results) -> str:
    """Layers and models: times, and the speed-up over PyTorch's own."""
    cases: dict[Case, dict[str, Timing]] = {}
    for t in results.timings:
        if t.case.part != ATTENTION and t.dtype == "float32" and not t.missing:
            cases.setdefault(t.case, {})[t.attention] = t
    rows = []
    for case, row in cases.items():
        sdpa = row.get(SDPA)
        cells = ["-" if sdpa is None else sdpa.spread]
        for ours in (SYSTEMATIC, GUMBEL):
            found = row.get(ours)
            ratio = f" ({factor(sdpa.median / found.median)})" if sdpa and found else ""
            cells.append("-" if found is None else f"{found.spread}{ratio}")
        rows.append([case.part, str(case.length), pass_name(case.backward), *cells])
    columns = (f"{name}, ms" for name in ("PyTorch's, SDPA", SYSTEMATIC, GUMBEL))
    return table(["", "N", "", *columns], rows)


def _gains(results: Results) -> str:
    """This version of smartbird and the other that was timed beside it."""
    rows = [
        [
            str(new.case),
            str(new.case.threads),
            new.attention,
            new.dtype,
            old.spread,
            new.spread,
            f"{old.median / new.median:.2f}x",
        ]
        for new, old in versions(results)
    ]
    header = ["", "threads", "attention", "dtype", "other version, ms", "this version, ms"]
    return table([*header, "speed-up"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "headline": _headline,
    "losses": _losses,
    "machine": _machine,
    "ratios": _ratios,
    "forward": _forward,
    "backward": _backward,
    "stages": _stages,
    "memory": _memory,
    "scaling": _scaling,
    "peaked": _peaked,
    "grouped": _grouped,
    "decode": _decode,
    "padded": _padded,
    "whole": _whole,
    "gains": _gains,
}


def update_page(markdown: str, results: dict[str, Results]) -> str:
    """``markdown`` with its marked tables made anew from ``results``, by STEM; others stay.

    Raises:
        ValueError: a marker names a table that does not exist, or has no end.
    """

    def make(stem: str, name: str) -> str | None:
        if stem not in results:
            return None
        if name not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
        return TABLES[name](results[stem])

    return update_tables(markdown, make)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="MARKDOWN")
    args = parser.parse_args()
    results = {path.stem: Results.load(path) for path in args.json}
    for path in args.json:
        write_plots(results[path.stem], path.with_suffix(""))
    for path in args.update:
        path.write_text(update_page(path.read_text(), results))


if __name__ == "__main__":
    main()

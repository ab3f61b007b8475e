"""Tables and plots of the documentation, from the JSON that ``benchmarks.speed.attention`` wrote.

A table goes between the lines ``<!-- table STEM:NAME -->`` and ``<!-- end -->`` of a Markdown file:
STEM is the name of a JSON file without its ending, NAME one of summary, rivals, machine, ratios,
forward, backward, stages, memory, scaling, peaked, grouped and decode. Plots are written beside the
JSON, as STEM-time.png, STEM-memory.png and STEM-stages.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.markdown import table, update_tables
from benchmarks.speed.contenders import DISTILL, FLEX_WINDOWS, GUMBEL, SDPA, SYSTEMATIC
from benchmarks.speed.plots import write_plots
from benchmarks.speed.ratios import AIMS_OVER_SDPA, ratios
from benchmarks.speed.results import Case, Results, Timing, ms, pass_name

MIB = 2**20


def _summary(results: Results) -> str:
    """Speed-ups over SDPA and times."""
    threads = results.environment["threads"]
    columns = {
        "forward, `systematic`": (SYSTEMATIC, False),
        "forward, `gumbel`": (GUMBEL, False),
        "forward + backward, `gumbel`": (GUMBEL, True),
        "with distillation": (GUMBEL + DISTILL, True),
    }
    medians = {
        (t.attention, t.case): t.median
        for t in results.timings
        if t.dtype == "float32" and not t.missing
    }

    def cell(attention: str, case: Case) -> str:
        ours, sdpa = medians.get((attention, case)), medians.get((SDPA, case))
        return f"{sdpa / ours:.1f}x ({ms(ours)} ms)" if ours and sdpa else "-"

    rows = [
        [str(length)]
        + [cell(name, Case(length, backward, threads)) for name, backward in columns.values()]
        for length in AIMS_OVER_SDPA
    ]
    return table(["N", *columns], rows)


def _rivals(results: Results) -> str:
    """Times of every attention at N = 4096, float32, of FlexAttention's windows the fastest."""
    threads = results.environment["threads"]
    rows: dict[str, dict[bool, float]] = {}
    for t in results.timings:
        if t.case == Case(4096, t.case.backward, threads) and t.dtype == "float32":
            name = "FlexAttention window" if t.attention in FLEX_WINDOWS else t.attention
            row = rows.setdefault(name, {})
            if not t.missing:
                row[t.case.backward] = min(t.median, row.get(t.case.backward, math.inf))
    return table(
        ["N = 4096", "forward, ms", "forward + backward, ms"],
        [
            [name, *(ms(row[backward]) if backward in row else "-" for backward in (False, True))]
            for name, row in rows.items()
        ],
    )


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
            "-" if stage.fraction is None else f"{stage.fraction:.0%}",
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
    """Forward times for sketch scores of other standard deviations than 1, and for 1."""
    peaked = {
        dataclasses.replace(t.case, score_std=1.0) for t in results.timings if t.case.score_std != 1
    }
    rows: dict[Case, dict[str, Timing]] = {}
    for t in results.timings:
        if t.dtype == "float32" and dataclasses.replace(t.case, score_std=1.0) in peaked:
            rows.setdefault(t.case, {})[t.attention] = t
    columns = (SYSTEMATIC, GUMBEL, SDPA)
    return table(
        ["N", "standard deviation of the sketch scores", *(f"{name}, ms" for name in columns)],
        [
            [str(case.length), f"{case.score_std:g}", *(row[name].spread for name in columns)]
            for case, row in sorted(rows.items(), key=lambda item: item[0].score_std)
        ],
    )


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


TABLES: dict[str, Callable[[Results], str]] = {
    "summary": _summary,
    "rivals": _rivals,
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

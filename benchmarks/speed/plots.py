"""Plots of a run.

The speed-ups to know first, time and memory against N, and what each stage reaches of its limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.common.axes import tidy
from benchmarks.common.marks import MARKS
from benchmarks.speed.contenders import (
    BIGBIRD,
    COMPOSITION,
    DISTILL,
    EXACT_TOPK,
    FLEX_BLOCKS,
    FLEX_WINDOWS,
    GUMBEL,
    LONGFORMER,
    SDPA,
    SYSTEMATIC,
)
from benchmarks.speed.ratios import headlines
from benchmarks.speed.results import Case, Results, factor

_WINDOW = "FlexAttention window"
_DTYPE = "float32"  # of which plots are drawn
_STYLE = {
    GUMBEL: MARKS["smartbird"],
    SYSTEMATIC: MARKS["systematic"],
    GUMBEL + DISTILL: MARKS["distilled"],
    SDPA: MARKS["dense"],
    _WINDOW: MARKS["window"],
    FLEX_BLOCKS: MARKS["random"],
    LONGFORMER: MARKS["longformer"],
    BIGBIRD: MARKS["bigbird"],
    EXACT_TOPK: MARKS["oracle"],
    COMPOSITION: MARKS["composition"],
}
_OURS = (GUMBEL, SYSTEMATIC, GUMBEL + DISTILL)  # drawn thick
_LABEL = {name: f"Smart Bird, {name}" for name in _OURS} | {
    _WINDOW: "FlexAttention, window (best block size)",
    FLEX_BLOCKS: "FlexAttention, random blocks",
}


def write_plots(results: Results, stem: Path) -> list[Path]:
    """STEM-headline.png, -time, -memory and -stages, those that ``results`` have data for."""
    matplotlib.use("Agg")
    written = []
    # Two versions are compared by a table alone.
    timed = results.timings and not results.baseline
    for name, has_data, draw in (
        ("headline", timed and headlines(results), _draw_headline),
        ("time", timed, _draw_time),
        ("memory", results.memory, _draw_memory),
        ("stages", any(stage.limit_seconds for stage in results.stages), _draw_stages),
    ):
        if has_data:
            figure = draw(results)
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=110)
            plt.close(figure)
            written.append(path)
    return written


Points = dict[int, float]


def _draw_headline(results: Results) -> Figure:
    """Bars of the speed-up over SDPA, those of one case together."""
    lines = headlines(results)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(lines)), layout="constrained")
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, line in enumerate(lines):
        timed = [(GUMBEL, line.gumbel), (SYSTEMATIC, line.systematic)]
        for side, (name, seconds) in zip((-0.2, 0.2), timed, strict=True):
            if seconds is not None:
                ratio = line.sdpa / seconds
                # From even, which on a logarithmic axis is where a bar has no length.
                axes.barh(
                    place + side,
                    ratio - 1,
                    left=1,
                    height=0.36,
                    color=_STYLE[name].colour,
                    zorder=2,
                )
                axes.text(
                    *(max(ratio, 1.0) * 1.05, place + side),
                    factor(ratio),
                    va="center",
                    fontsize=7,
                )
    bars = {name: Patch(color=_STYLE[name].colour) for name in (GUMBEL, SYSTEMATIC)}
    figure.legend(
        list(bars.values()), list(bars), loc="outside lower right", ncols=2, frameon=False
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1, y=0.01)
    axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8)
    axes.invert_yaxis()
    tidy(axes, grid="x")
    _title(figure, "Speed-up of Smart Bird over SDPA (left of 1: it is slower)", results)
    return figure


def _draw_time(results: Results) -> Figure:
    threads = results.environment["threads"]
    panels: dict[bool, dict[str, Points]] = {False: {}, True: {}}
    for timing in results.timings:
        case = timing.case
        plain = case == Case(case.length, case.backward, threads)
        if timing.missing or timing.dtype != _DTYPE or not plain:
            continue
        name = _WINDOW if timing.attention in FLEX_WINDOWS else timing.attention
        points = panels[case.backward].setdefault(name, {})
        points[case.length] = min(timing.median, points.get(case.length, math.inf))
    return _lines(results, panels, "time", _seconds, base=10)


def _draw_memory(results: Results) -> Figure:
    panels: dict[bool, dict[str, Points]] = {False: {}, True: {}}
    for memory in results.memory:
        if not memory.missing:
            name = _WINDOW if memory.attention in FLEX_WINDOWS else memory.attention
            panels[memory.backward].setdefault(name, {})[memory.length] = memory.peak_bytes
    return _lines(results, panels, "peak memory beyond the inputs", _bytes, base=2)


def _lines(
    results: Results,
    panels: dict[bool, dict[str, Points]],
    quantity: str,
    format_value: Callable[[float], str],
    *,
    base: int,
) -> Figure:
    """Two panels, forward and forward + backward, one line per attention, both axes logarithmic."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    axes: Axes
    for backward, axes in zip((False, True), both, strict=True):
        series = panels[backward]
        for name in (name for name in _STYLE if name in series):
            points = sorted(series[name].items())
            colour, line, marker = _STYLE[name]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                linewidth=2.2 if name in _OURS else 1.2,
                zorder=3 if name in _OURS else 2,
                label=_LABEL.get(name, name),
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=base)
        axes.set_xlabel("N")
        axes.set_title("forward + backward" if backward else "forward", fontsize=11)
        axes.set_xticks(sorted({length for points in series.values() for length in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_value(y)))
        axes.yaxis.set_minor_locator(NullLocator())
        tidy(axes)
    both[0].set_ylabel(quantity)
    handles, labels = _legend(both)
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    _title(figure, f"{quantity[0].upper()}{quantity[1:]} against N", results)
    return figure


def _legend(panels: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """Every attention once, in the order of ``_STYLE``."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for name in _STYLE if (label := _LABEL.get(name, name)) in handles]
    return [handles[label] for label in labels], labels


def _draw_stages(results: Results) -> Figure:
    """Bars of the fraction of the limit with all threads, one panel per length."""
    threads = results.environment["threads"]
    stages = [
        stage
        for stage in results.stages
        if stage.threads == threads and stage.dtype == _DTYPE and stage.limit_seconds
    ]
    lengths = sorted({stage.length for stage in stages})
    names = list(dict.fromkeys(stage.name for stage in stages))
    figure, panels = plt.subplots(
        1,
        len(lengths),
        figsize=(11, 0.6 + 0.42 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for length, axes in zip(lengths, panels[0], strict=True):
        of_length = {stage.name: stage for stage in stages if stage.length == length}
        for place, name in enumerate(names):
            stage = of_length[name]
            # None: disturbed, which the text says.
            fraction = stage.fraction or 0.0
            ours = not name.startswith("(")
            axes.barh(
                place, fraction, color=MARKS["smartbird"].colour if ours else "#999999", height=0.65
            )
            axes.text(
                fraction + 0.02,
                place,
                f"{stage.reached} of {stage.bound}, {_seconds(stage.seconds)}",
                va="center",
                fontsize=8,
                in_layout=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.6)
        axes.set_xticks([0, 0.5, 1.0], ["0", "50 %", "limit"])
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_title(f"N = {length}", fontsize=10)
        tidy(axes, grid="x")
    panels[0][0].invert_yaxis()
    _title(figure, "Part of the machine's limit that each stage reaches", results)
    return figure


def _title(figure: Figure, title: str, results: Results) -> None:
    environment = results.environment
    a = environment["arguments"]
    subject = (
        f"{_DTYPE}, B = 1, H = {a['heads']}, D = {a['head_dim']}, S = {a['sketch_dim']}, "
        f"K = {a['num_samples']}; "
        f"{environment['threads']} threads, {environment['smartbird']['cpu_isa']}"
    )
    figure.suptitle(f"{title}\n{subject}", x=0.01, ha="left", fontsize=11)


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{x * 1e3:.3g} ms"


def _bytes(x: float) -> str:
    mib = x / 2**20
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"

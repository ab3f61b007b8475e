"""What a study came to: a table and a plot for each grid, and all runs as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import markdown
from benchmarks.common.axes import tidy
from benchmarks.common.marks import MARKS, OTHERS, Mark
from benchmarks.learning.study.spec import Combination, Grid, Study
from benchmarks.learning.tasks import Result, RunError, read_metrics
from benchmarks.learning.tasks.files import METRICS

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError("a study needs matplotlib: pip install '.[bench]'") from error


class Point(NamedTuple):
    """A validation: after how many steps, how right, and the seconds that training took so far."""

    step: int
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """The finished runs of one combination.

    Attributes:
        fields: what tells it from the other rows of its grid.
        num_runs: runs it has, finished or not.
        results: of those that are finished.
        curves: their validations.
    """

    fields: Mapping[str, Any]
    num_runs: int
    results: list[Result]
    curves: list[list[Point]]

    @property
    def accuracies(self) -> list[float]:
        """On the test split, in percent, by run."""
        return [100 * result.test_accuracy for result in self.results]


def grid_rows(grid: Grid, results: Mapping[str, Result]) -> list[Row]:
    """A row for each combination of `grid`, from those of its runs that have a result.

    Raises:
        RunError: runs of one combination were made with different data.
    """
    names = _telling_fields(grid.combinations)
    rows = []
    for combination in grid.combinations:
        finished = [results[run] for run in combination.runs if run in results]
        if len({result.fingerprint for result in finished if result.fingerprint}) > 1:
            directories = ", ".join(result.config.out for result in finished)
            raise RunError(f"{directories}: were made with different data; remove the older ones")
        fields = {name: combination.fields[name] for name in names if name in combination.fields}
        curves = [_curve(result) for result in finished]
        rows.append(Row(fields, len(combination.runs), finished, curves))
    return rows


def tables(study: Study, results: Mapping[str, Result], command: str) -> dict[str, str]:
    """The tables of the grids that have a finished run, in Markdown, by name.

    Below a table stands what it shows, and the `command` that made it.
    """
    return {
        grid.name: _table(rows, study.target_accuracy, command)
        for grid, rows in _begun(study, results)
    }


def update_page(text: str, study: Study, made: Mapping[str, str]) -> str:
    """A page with its marked tables of `study` replaced by those `made`; all else stays.

    Raises:
        ValueError: a marker names a grid that the study does not have, or has no end.
    """
    names = [grid.name for grid in study.grids]

    def make(stem: str, name: str) -> str | None:
        if stem != study.name:
            return None
        if name not in names:
            raise ValueError(f"table {stem}:{name} must name a grid of {', '.join(names)}")
        return made.get(name)

    return markdown.update_tables(text, make)


def write_files(study: Study, results: Mapping[str, Result], directory: Path) -> None:
    """Writes STUDY.json, with all finished runs, and STUDY-GRID.png for grids that have one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{study.name}.json").write_text(json.dumps(_record(study, results), indent=1))
    for grid, rows in _begun(study, results):
        figure = plot_grid(grid, rows)
        figure.savefig(directory / f"{study.name}-{grid.name}.png", dpi=110)


def write_summary(study: Study, made: Mapping[str, str], directory: Path) -> None:
    """Writes STUDY.md: every grid with its text, table and plot; `write_files` wrote the plots."""
    parts = [f"# {study.title}\n"]
    for grid in study.grids:
        shown = "No run is finished yet.\n"
        if grid.name in made:
            shown = f"{made[grid.name]}\n![{grid.name}]({study.name}-{grid.name}.png)\n"
        parts.append(f"## {grid.name}\n\n{grid.text}\n\n{shown}")
    (directory / f"{study.name}.md").write_text("\n".join(parts))


def first_at(curve: Sequence[Point], accuracy: float) -> Point | None:
    """The first validation of at least this accuracy; None if there is none."""
    return next((point for point in curve if point.accuracy >= accuracy), None)


def _begun(study: Study, results: Mapping[str, Result]) -> Iterator[tuple[Grid, list[Row]]]:
    """The grids that have a finished run."""
    for grid in study.grids:
        rows = grid_rows(grid, results)
        if any(row.results for row in rows):
            yield grid, rows


def _curve(result: Result) -> list[Point]:
    rows = read_metrics(Path(result.config.out) / METRICS)
    return [
        Point(row["step"], row["accuracy"], row["seconds"])
        for row in rows
        if row["split"] == "valid"
    ]


def _telling_fields(combinations: Sequence[Combination]) -> list[str]:
    """The fields that tell combinations from each other; all of them where there is but one."""
    values: dict[str, set[Any]] = {}
    for name in (name for combination in combinations for name in combination.fields):
        values[name] = {combination.fields.get(name) for combination in combinations}
    return [name for name in values if len(values[name]) > 1 or len(combinations) == 1]


def _record(study: Study, results: Mapping[str, Result]) -> dict[str, Any]:
    runs = {}
    for run, result in results.items():
        # Equal runs give equal records, wherever they were made.
        record = dataclasses.asdict(result)
        del record["config"]["out"]
        runs[run] = {**record, "valid": _curve(result)}
    grids = [
        {
            "name": grid.name,
            "text": grid.text,
            "combinations": [dataclasses.asdict(combination) for combination in grid.combinations],
        }
        for grid in study.grids
    ]
    return {"title": study.title, "grids": grids, "runs": runs}


# --- Tables ---


def _table(rows: Sequence[Row], target_accuracy: float, command: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    target = f"{100 * target_accuracy:g} %"
    results = [result for row in rows for result in row.results]
    body = [
        [
            *(_text(row.fields[name]) if name in row.fields else "-" for name in names),
            str(len(row.results)) + (f" of {row.num_runs}" * (len(row.results) < row.num_runs)),
            _spread(row.accuracies, 1),
            _recall(row.results),
            *_first_at(row, target_accuracy),
            _spread([1e3 * result.seconds / result.config.steps for result in row.results], 0),
            _spread([result.peak_mib for result in row.results], 0),
        ]
        for row in rows
    ]
    text = markdown.table(
        [
            *(*names, "runs", "test accuracy, %", "recall at K, %"),
            *(f"steps to {target}", f"s to {target}", "ms per step", "peak MiB"),
        ],
        body,
    )
    every = _listed({result.config.eval_every for result in results}, "{}")
    majority = _listed({result.majority_accuracy for result in results}, "{:.1%}")
    return (
        f"{text}\nMean ± sample standard deviation over runs of different seeds. Recall is the "
        "share of dense attention's mass on the keys chosen, layer by layer, in the first test "
        f"batch. Steps and seconds to {target} go to the first validation, every {every} steps, "
        "that was this good, seconds in training steps alone; in brackets, how many runs got "
        f"there, if not all. The commonest class makes {majority} of the test split. "
        f"Made by `{command}`.\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(values: Iterable[float], form: str) -> str:
    return " or ".join(form.format(value) for value in sorted(values))


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _recall(results: Sequence[Result]) -> str:
    """Of each layer, in percent; a mean over the runs in which it was measured."""
    measured = [result.recall for result in results if result.recall]
    layers = [statistics.mean(of_layer) for of_layer in zip(*measured, strict=True)]
    some = f" ({len(measured)} of {len(results)})" * (len(measured) < len(results))
    return (", ".join(f"{100 * share:.0f}" for share in layers) + some) if layers else "-"


def _first_at(row: Row, accuracy: float) -> tuple[str, str]:
    """Steps and seconds."""
    points = [point for curve in row.curves if (point := first_at(curve, accuracy))]
    missing = f" ({len(points)} of {len(row.curves)})" * (len(points) < len(row.curves))
    return (
        _spread([point.step for point in points], 0) + missing,
        _spread([point.seconds for point in points], 0),
    )


# --- Plots ---


def plot_grid(grid: Grid, rows: Sequence[Row]) -> Figure:
    """Test accuracy with error bars (sample standard deviation), and the learning curves.

    Accuracy stands over the first field of numbers that varies and that at least half of the rows
    have, with a line for each combination of the others, or else beside each row's name. A curve is
    the mean over the runs, between the least and the largest.
    """
    shown = [row for row in rows if row.results]
    x = _number_field(shown)
    marks = _marks(shown, x)
    figure = Figure(figsize=(11, max(4.2, 0.3 * len(shown) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    if x is None:
        _draw_names(left, shown, marks)
    else:
        _draw_against(left, shown, x, marks)
    _draw_curves(right, shown, x, marks)
    for axes in (left, right):
        tidy(axes)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle(grid.text, x=0.01, ha="left", fontsize=11)
    return figure


def _number_field(rows: Sequence[Row]) -> str | None:
    for name in dict.fromkeys(name for row in rows for name in row.fields):
        named = [row.fields[name] for row in rows if name in row.fields]
        values = set(named)
        if (
            len(values) > 1
            and 2 * len(named) >= len(rows)
            and all(type(value) in (int, float) for value in values)
        ):
            return name
    return None


def _label(row: Row, x: str | None = None) -> str:
    """The fields but `x`; with their names where a value does not speak for itself."""
    return ", ".join(
        _text(value) if isinstance(value, str | tuple) else f"{name} {_text(value)}"
        for name, value in row.fields.items()
        if name != x
    )


def _marks(rows: Sequence[Row], x: str | None) -> dict[str, Mark]:
    """Of each series of rows, which are those that differ in `x` only.

    Attentions have a mark of their own everywhere; where nothing but other fields tells series
    apart, they are told by their place.
    """
    named = {_label(row, x): row.fields.get("attention") for row in rows}
    own = {label: MARKS[name] for label, name in named.items() if name in MARKS}
    if len(set(own.values())) == len(named):
        return own
    return {label: OTHERS[place % len(OTHERS)] for place, label in enumerate(named)}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _draw_names(axes: Axes, rows: Sequence[Row], marks: Mapping[str, Mark]) -> None:
    for place, row in enumerate(rows):
        colour, _, marker = marks[_label(row)]
        mean, deviation = statistics.mean(row.accuracies), _deviation(row.accuracies)
        axes.errorbar(mean, place, xerr=deviation, color=colour, marker=marker, capsize=3)
        axes.plot(row.accuracies, [place] * len(row.accuracies), "|", color=colour, alpha=0.6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")


def _draw_against(axes: Axes, rows: Sequence[Row], x: str, marks: Mapping[str, Mark]) -> None:
    for label, (colour, line, marker) in marks.items():
        series = [row for row in rows if _label(row, x) == label]
        points = sorted((row.fields[x], row.accuracies) for row in series if x in row.fields)
        axes.errorbar(
            [value for value, _ in points],
            [statistics.mean(accuracies) for _, accuracies in points],
            yerr=[_deviation(accuracies) for _, accuracies in points],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=5,
            capsize=3,
        )
        for row in series:
            if x not in row.fields:  # the same whatever x is
                mean, deviation = statistics.mean(row.accuracies), _deviation(row.accuracies)
                axes.axhline(mean, color=colour, linestyle=line)
                axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.1)
    values = sorted({row.fields[x] for row in rows if x in row.fields})
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [_text(value) for value in values])
    axes.set_xlabel(x)
    axes.set_ylabel("test accuracy, %")


def _draw_curves(axes: Axes, rows: Sequence[Row], x: str | None, marks: Mapping[str, Mark]) -> None:
    values = sorted({row.fields[x] for row in rows if x in row.fields}) if x is not None else []
    for row in rows:
        colour, line, marker = marks[_label(row, x)]
        # Of one series, the larger x is, the darker is the curve.
        place = values.index(row.fields[x]) + 1 if x is not None and x in row.fields else None
        alpha = 1.0 if place is None else 0.3 + 0.7 * place / len(values)
        by_step = list(zip(*row.curves, strict=True))
        steps = [at[0].step for at in by_step]
        accuracies = [[100 * point.accuracy for point in at] for at in by_step]
        means = [statistics.mean(at) for at in accuracies]
        axes.plot(
            *(steps, means),
            color=colour,
            linestyle=line,
            alpha=alpha,
            marker=marker,
            markersize=4,
            label=_label(row),
        )
        axes.fill_between(
            steps, [*map(min, accuracies)], [*map(max, accuracies)], color=colour, alpha=0.1
        )
    axes.set_xlabel("step")
    axes.set_ylabel("validation accuracy, %")

"""Studies: grids of runs, made side by side, and what they came to."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.learning.study.report import tables, update_page, write_files, write_summary
from benchmarks.learning.study.runner import Progress, execute
from benchmarks.learning.study.spec import Combination, Grid, Study, load_study, run_id

__all__ = ["Combination", "Grid", "Progress", "Study", "load_study", "run_id", "run_study"]


def run_study(
    path: Path, out: Path, *, jobs: int, budget: float = math.inf, page: Path | None = None
) -> tuple[Progress, dict[str, str]]:
    """Makes the runs of a study that are not finished, and writes what all of them came to.

    NAME.md, NAME.json and the plots NAME-GRID.png go into `out`, beside the directories of the
    runs; NAME is that of the study's file without its ending.

    Args:
        path: the study; see `benchmarks.learning.study.spec`.
        out: directory of its runs, which studies may share.
        jobs: processes side by side.
        budget: seconds after which no run is started and those that run are stopped.
        page: Markdown whose marked tables (see `benchmarks.common.markdown`; the name is that of
            a grid) are replaced where a run is finished. Plots and JSON are written again into the
            directory of the page's name, without its ending.

    Returns:
        where the runs stand, and the tables by grid.

    Raises:
        ValueError: the study, or a marker of the page, is not what it must be; nothing was run.
        RunError: the result of a run is damaged, or of other data than those it is averaged with.
        OSError: a file cannot be read or written.
        Interrupted: after Ctrl-C, when all runs have stopped.
    """
    study = load_study(path)
    if page is not None:
        _update(page, study, {})
    progress = execute(study.runs, out, jobs=jobs, budget=budget)
    made = tables(study, progress.finished, f"python -m benchmarks.learning study {path}")
    write_files(study, progress.finished, out)
    write_summary(study, made, out)
    if page is not None and made:
        write_files(study, progress.finished, page.with_suffix(""))
        page.write_text(_update(page, study, made))
    return progress, made


def _update(page: Path, study: Study, made: dict[str, str]) -> str:
    try:
        return update_page(page.read_text(), study, made)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error

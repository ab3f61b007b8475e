"""Several processes compute what one does. The cases are in rank_cases.py."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import rank_cases as cases
from ranks import run_on_ranks

CASES = {
    2: (
        cases.data_parallel_training_is_that_of_one_process,
        cases.context_parallel_training_is_that_of_one_process,
        cases.what_is_not_served_is_refused,
        cases.the_page_runs,
        cases.ranks_are_sent_what_the_page_says,
        cases.dtensors_are_gathered_where_they_lie,
        cases.an_error_on_one_rank_ends_the_wait_of_the_others,
    ),
    3: (),
    4: (
        cases.ranks_are_sent_what_the_page_says,
        cases.context_and_data_parallel_training_is_that_of_one_process,
        cases.dtensors_are_gathered_where_they_lie,
        cases.dtensors_on_a_mesh_of_two_dimensions,
    ),
}


@pytest.mark.parametrize("size", CASES)
def test_ranks_are_one_process(size: int, tmp_path: Path) -> None:
    run_on_ranks(size, (*cases.every_number_of_ranks(), *CASES[size]), tmp_path)


@pytest.mark.slow
def test_ranks_run_graphs(tmp_path: Path) -> None:
    run_on_ranks(2, (cases.compiled_layers_are_the_same,), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_fifty_steps_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    case = functools.partial(cases.data_parallel_training_is_that_of_one_process, 50)
    run_on_ranks(size, (case,), tmp_path)

"""What a study asks: a TOML file of grids of runs.

.. code-block:: toml

    title = "Associative recall"
    target_accuracy = 0.9      # what "steps to" counts to, on the validation split
    seeds = [0, 1, 2]

    [base]                     # of every run: fields of benchmarks.learning.tasks.Config
    task = "mqar"
    steps = 600

    [[grid]]                   # one question; its table and plot are called by its name
    name = "samples"
    text = "How many keys does recall need?"

    [[grid.product]]           # every combination of these values
    attention = ["smartbird", "window"]
    num_samples = [4, 8, 16]

    [[grid.product]]           # and of these
    attention = ["dense"]

A run that several combinations share is made once. The fields are those of `Config`, whichever it
has; `seed` and `out` are set by the study.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.learning.tasks import Config, default_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")

_HINTS = typing.get_type_hints(Config)
_SET_BY_THE_STUDY = {"seed": "seeds", "out": "--out"}
_NAME = re.compile(r"[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Combination:
    """One row of a grid's table.

    Attributes:
        fields: the values that its product names.
        runs: ids of its runs, by seed.
    """

    fields: Mapping[str, Any]
    runs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """One question of a study, and the combinations that answer it."""

    name: str
    text: str
    combinations: tuple[Combination, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as read from its file.

    Attributes:
        name: the file's, without its ending.
        title: in words.
        target_accuracy: on the validation split, in (0, 1].
        grids: the questions.
        runs: every run by its id, in the order to make them: the first seed of every combination
            comes before any second one, so that a study cut short has something on each question.
    """

    name: str
    title: str
    target_accuracy: float
    grids: tuple[Grid, ...]
    runs: Mapping[str, Config]


def load_study(path: Path) -> Study:
    """Reads a study.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, or says what a study or a run cannot be; names file and field.
    """
    try:
        return _study(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def run_id(config: Config) -> str:
    """The name of a run's directory; equal for equal runs, wherever they are.

    A field at its default in `Config` does not count, so that a field which comes later leaves the
    runs made before it where they are.
    """
    fields = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name != "out" and (value := getattr(config, field.name)) != field.default
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{config.task}-{config.attention}-{config.seed}-{digest[:10]}"


def _study(name: str, content: dict[str, Any]) -> Study:
    _check_keys(content, needed=("title", "seeds", "base", "grid"), others=("target_accuracy",))
    title = _checked("title", str, content["title"])
    target = _checked("target_accuracy", float, content.get("target_accuracy", 0.9))
    if not 0.0 < target <= 1.0:
        raise ValueError(f"target_accuracy must be in (0, 1], got {target}")
    seeds = _seeds(content["seeds"])
    # A run has one process, and as many of them as there are cores run side by side.
    base = {"threads": 1, **_in("base", _fields, content["base"], _checked)}
    runs: dict[str, Config] = {}
    grids: dict[str, Grid] = {}
    for place, table in enumerate(_tables("grid", content["grid"]), start=1):
        grid = _in(f"grid {table.get('name', place)}", _grid, table, base, seeds, runs)
        if grid.name in grids:
            raise ValueError(f"grid {grid.name}: there are two of this name")
        grids[grid.name] = grid
    return Study(name, title, target, tuple(grids.values()), _first_seeds_first(grids, runs))


def _grid(
    table: Mapping[str, Any],
    base: Mapping[str, Any],
    seeds: Sequence[int],
    runs: dict[str, Config],
) -> Grid:
    """Reads a grid; adds its runs to `runs`."""
    _check_keys(table, needed=("name", "text", "product"), others=("seeds",))
    name = _checked("name", str, table["name"])
    if not _NAME.fullmatch(name):  # it becomes part of a file's name and of a marker
        raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {name!r}")
    seeds = _seeds(table["seeds"]) if "seeds" in table else seeds
    combinations: dict[tuple[str, ...], Combination] = {}
    for product in _tables("product", table["product"]):
        values = _fields(product, _checked_list)
        for chosen in itertools.product(*values.values()):
            fields = dict(zip(values, chosen, strict=True))
            configs = [_config({**base, **fields, "seed": seed}) for seed in seeds]
            by_id = {run_id(config): config for config in configs}
            runs.update(by_id)
            ids = tuple(by_id)
            combinations.setdefault(ids, Combination(fields, ids))
    return Grid(name, _checked("text", str, table["text"]), tuple(combinations.values()))


def _config(fields: dict[str, Any]) -> Config:
    if "task" not in fields:
        raise ValueError("task must be given, in the base or in every product")
    return default_config(**fields)


def _first_seeds_first(grids: Mapping[str, Grid], runs: Mapping[str, Config]) -> dict[str, Config]:
    rows = [combination.runs for grid in grids.values() for combination in grid.combinations]
    by_seed = itertools.chain.from_iterable(itertools.zip_longest(*rows))
    return {run: runs[run] for run in by_seed if run is not None}


# --- Checks: messages name what is wrong, `_in` puts before them where it is. ---


def _in(where: str, read: Callable[..., _T], *arguments: Any) -> _T:
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(table: Mapping[str, Any], needed: Sequence[str], others: Sequence[str]) -> None:
    for key in table:
        if key not in needed and key not in others:
            raise ValueError(f"{key} must be one of {', '.join((*needed, *others))}")
    for key in needed:
        if key not in table:
            raise ValueError(f"{key} is missing")


def _tables(name: str, value: Any) -> list[dict[str, Any]]:
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        raise ValueError(f"{name} must be tables, each under a line of its own in [[ ]]")
    return value


def _seeds(value: Any) -> list[int]:
    return [_checked("seeds", int, seed) for seed in _list("seeds", value)]


def _fields(table: Any, check: Callable[[str, Any, Any], Any]) -> dict[str, Any]:
    """The fields of a run in `table`, each value passed through `check(name, hint, value)`."""
    if not isinstance(table, dict):
        raise ValueError(f"must be a table of fields, got {table!r}")
    for name in table:
        if name in _SET_BY_THE_STUDY:
            raise ValueError(f"{name} is no field to set here: use {_SET_BY_THE_STUDY[name]}")
        if name not in _HINTS:
            close = difflib.get_close_matches(name, _HINTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f": they are {', '.join(_HINTS)}"
            raise ValueError(f"{name} is no field of a run{hint}")
    return {name: check(name, _HINTS[name], value) for name, value in table.items()}


def _checked_list(name: str, hint: Any, value: Any) -> list[Any]:
    return [_checked(name, hint, item) for item in _list(name, value)]


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of values, got {value!r}")
    return value


def _checked(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint` of the field `name`; TOML's lists become tuples."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is float and type(value) is int:
            return float(value)
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_checked(name, typing.get_args(kind)[0], item) for item in value)
        if type(value) is kind:
            return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")

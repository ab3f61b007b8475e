"""The tasks by name, and configurations with their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.learning.tasks.attention import (
    ATTENTIONS,
    check_forced_keys,
    unused_by_attention,
    unused_by_options,
)
from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.continuation import Continuation
from benchmarks.learning.tasks.data import Task
from benchmarks.learning.tasks.listops import ListOps, ListOpsSmall
from benchmarks.learning.tasks.mqar import Mqar
from benchmarks.learning.tasks.sotu import Sotu

TASKS: dict[str, type[Task]] = {
    "sotu": Sotu,
    "mqar": Mqar,
    "continuation": Continuation,
    "listops": ListOps,
    "listops-small": ListOpsSmall,
}

_DEFAULTS: dict[str, Any] = {
    "attention": "smartbird",
    "window": 1,
    "sketch_dim": 16,
    "learning": ("distill",),
    "distill_temperature": 0.5,
    "dense_warmup": 0,
    "dropout": 0.1,
    "embedding_std": 0.02,
    "vocab_size": None,
    "num_pairs": None,
    "curriculum": 0.0,
    "seed": 0,
    "log_every": 50,
    "checkpoint_every": 100,
    "threads": None,
}


def default_config(task: str, **changes: Any) -> Config:
    """The configuration of `task`: its defaults with `changes` (fields of `Config`).

    `out` defaults to "runs/TASK-ATTENTION".

    Raises:
        ValueError: an unknown task or attention, a field out of its range, or a change that the
            task or other fields leave without a use. What the attention has no use for is not
            refused, as configurations that are compared share their changes: see `check_used`.
        TypeError: a change that is no field of `Config`.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    fields = {**_DEFAULTS, **TASKS[task].defaults, **changes}
    if fields["attention"] not in ATTENTIONS:
        raise ValueError(
            f"attention must be one of {', '.join(ATTENTIONS)}, got {fields['attention']!r}"
        )
    for name in ("vocab_size", "num_pairs", "curriculum"):
        if fields[name] != _DEFAULTS[name] and name not in TASKS[task].defaults:
            raise ValueError(f"{name} means nothing to task {task}, got {fields[name]}")
    fields.setdefault("out", f"runs/{task}-{fields['attention']}")
    config = Config(task=task, **fields)
    check_forced_keys(config, TASKS[task].is_causal)
    _refuse(unused_by_options(config), changes)
    return config


def check_used(config: Config, given: Mapping[str, Any]) -> None:
    """Refuse fields that were given, but mean nothing in this run.

    Args:
        config: the run.
        given: the fields that were asked for; one at its default in `Config` asks for nothing.

    Raises:
        ValueError: names the first such field, and why it means nothing.
    """
    _refuse(unused_by_attention(config) | unused_by_options(config), given)


def _refuse(unused: Mapping[str, str], given: Mapping[str, Any]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, because in unused.items():
        if name in given and given[name] != defaults[name]:
            raise ValueError(f"{name} means nothing with {because}, got {given[name]}")

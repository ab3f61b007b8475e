"""The tasks by name, and configurations with their defaults."""

from __future__ import annotations

from typing import Any

from benchmarks.learning.tasks.attention import (
    ATTENTIONS,
    check_forced_keys,
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
        ValueError: an unknown task or attention, a field out of its range, or one that the task has
            no use for.
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
    return config

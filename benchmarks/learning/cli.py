"""The command `python -m benchmarks.learning`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from tqdm import tqdm

from benchmarks.learning import tasks
from smartbird import build_info
from smartbird.functional import METHODS
from smartbird.nn import LEARNING_ROUTES
from smartbird.nn.attention import SKETCHES

PROG = "python -m benchmarks.learning"
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        the exit code: 0, 1 (a run failed, in one line on stderr) or 130 (Ctrl-C). A wrong
        argument exits with 2, as argparse does.
    """
    parser = _Parser(prog=PROG, description="Trains models with Smart Bird attention.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run: dict[str, Callable[..., int]] = {"train": _train, "inspect": _inspect, "study": _study}
    parsers = {
        "train": _add_train(commands),
        "inspect": _add_inspect(commands),
        "study": _add_study(commands),
    }
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        return run[command](parsers[command], **options)
    except (tasks.RunError, OSError) as error:
        # What a rank alone knows, it says; what all of them find, the first.
        if _is_first() or isinstance(error, tasks.LostRank):
            print(f"{PROG} {command}: error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt as interrupt:
        if _is_first():
            print(f"{PROG} {command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _version() -> str:
    info = build_info()
    return f"smartbird {info['version']} ({info['cpu_isa']}), torch {info['torch']}"


def _is_first() -> bool:
    """Of the processes of a run, as torchrun starts them."""
    return os.environ.get("RANK", "0") == "0"


def _add_train(commands: _Commands) -> argparse.ArgumentParser:
    # What is not given is not in the namespace: it comes from the task's defaults.
    train = commands.add_parser(
        "train",
        help="train a Transformer on a task",
        description="Trains a Transformer encoder. Flags left out take the defaults of the task, "
        "or those of the run that --resume goes on with. Under torchrun, its processes share every "
        "batch.",
        argument_default=argparse.SUPPRESS,
    )
    switch = argparse.BooleanOptionalAction

    def group(title: str) -> Callable[..., None]:
        """Adds options with their defaults to a group of this title."""
        section = train.add_argument_group(title)

        def add(flag: str, help: str, **options: Any) -> None:
            default = _default(flag.removeprefix("--").replace("-", "_"))
            section.add_argument(flag, help=f"{help}; {default}" if default else help, **options)

        return add

    add = group("the run")
    add("--task", "what to learn; needed unless --resume", choices=tuple(tasks.TASKS))
    add("--out", "directory of the run; default: runs/TASK-ATTENTION", metavar="DIR")
    add(
        "--resume",
        "go on with the run in --out, with more --steps also where it is finished",
        action="store_true",
        default=False,
    )
    add("--seed", "of weights, data order, sampling and dropout", type=int)
    add("--threads", "threads of a process; default: PyTorch's choice", type=int, metavar="T")
    add("--log-every", "interval of train rows in metrics.jsonl", type=int, metavar="STEPS")
    add("--eval-every", "interval of validations", type=int, metavar="STEPS")
    add("--checkpoint-every", "interval of checkpoints", type=int, metavar="STEPS")

    add = group("data and training")
    add("--seq-len", "longest sequence, in tokens", type=int, metavar="N")
    add("--vocab-size", "tokens (sotu, mqar, continuation)", type=int, metavar="V")
    add("--num-pairs", "questions per sequence (mqar, continuation)", type=int, metavar="P")
    add(
        "--curriculum",
        "of the steps on shorter data (the recall tasks)",
        type=float,
        metavar="SHARE",
    )
    add("--steps", "optimizer steps", type=int)
    add("--batch-size", "sequences per step", type=int, metavar="B")
    add("--lr", "peak learning rate", type=float)
    add("--dropout", "dropout probability", type=float, metavar="P")

    add = group("the model")
    add("--layers", "encoder layers", type=int)
    add("--dim", "model width", type=int)
    add("--heads", "attention heads per layer", type=int)
    add("--num-kv-heads", "heads of keys and values; default: heads", type=int, metavar="H")
    add("--embedding-std", "of new embeddings", type=float, metavar="STD")
    add("--attention", "how tokens attend", choices=tuple(tasks.ATTENTIONS))

    add = group("which keys are held")
    add("--num-samples", "keys per query and head", type=int, metavar="K")
    add("--window", "nearest keys that are always among the K", type=int, metavar="W")
    add("--num-sinks", "leading keys that are always among the K", type=int, metavar="N")
    add(
        "--num-index-heads",
        "sets of keys per query; default: key/value heads, or sketches where those are more",
        type=int,
        metavar="H",
    )
    add("--method", "how keys are drawn", choices=METHODS)
    add("--eval-method", "how keys are drawn in evaluation; default: --method", choices=METHODS)
    add("--correction", "estimate dense attention from the sample", action=switch)
    add("--temperature", "of drawing in training", type=float, metavar="T")
    add("--uniform-share", "of the K, drawn uniformly in training", type=float, metavar="R")
    add("--dense-warmup", "attend densely for so many steps first", type=int, metavar="STEPS")
    add("--anneal-samples", "keys at the first step, more than later", type=int, metavar="K")
    add("--anneal-steps", "steps until there are K", type=int, metavar="STEPS")
    add("--reuse", "draw keys in every L-th layer only", type=int, metavar="L")

    add = group("the sketch")
    add("--sketch-dim", "width of a sketch", type=int, metavar="S")
    add("--num-sketches", "whom each sketch is for", choices=SKETCHES)
    add("--share-sketch", "sketch in every L-th layer only", type=int, metavar="L")
    add("--learning", "how the sketch learns", nargs="+", choices=LEARNING_ROUTES)
    add("--distill-weight", "factor of the sketch's loss", type=float, metavar="W")
    add("--distill-temperature", "of the attention it learns from", type=float, metavar="T")
    add(
        "--distill-correction",
        "it learns from an estimate of dense attention; default: as --correction",
        action=switch,
    )

    add = group("processes of torchrun")
    add("--fsdp", "each process has a part of the weights", action=switch)
    add(
        "--context-parallel", "processes that share the tokens of a sequence", type=int, metavar="P"
    )
    add("--dcp", "each process writes its part of a checkpoint", action=switch)
    return train


@functools.cache
def _default_configs() -> dict[str, tasks.Config]:
    return {task: tasks.default_config(task) for task in tasks.TASKS}


def _default(name: str) -> str:
    """Of a field of `Config`, in words; empty where it has none, or the option tells itself."""
    values: dict[str, list[str]] = {}
    for task, config in _default_configs().items():
        value = getattr(config, name, None)
        if value is None or name in ("task", "out"):
            continue
        text = " ".join(value) if isinstance(value, tuple) else str(value)
        text = ("no", "yes")[value] if isinstance(value, bool) else text
        values.setdefault(text, []).append(task)
    if len(values) < 2:
        return "".join(f"default: {text}" for text in values)
    told = (f"{text} ({', '.join(names)})" for text, names in values.items())
    return f"default: {', '.join(told)}"


def _add_inspect(commands: _Commands) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        help="show which keys a trained model looks at",
        description="Shows which keys each layer and head of a trained model chooses in a document "
        "and how much of dense attention's mass they hold, as a page, pictures and numbers.",
    )
    add = inspect.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint.pt of `train`",
    )
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to read (tasks sotu and continuation); default: validation",
    )
    add("--out", type=Path, metavar="DIR", help="default: inspection, beside the checkpoint")
    return inspect


def _train(parser: argparse.ArgumentParser, resume: bool, **given: Any) -> int:
    if "learning" in given:
        given["learning"] = tuple(given["learning"])
    needed = "out" if resume else "task"
    if needed not in given:
        parser.error(f"--{needed} is needed" + (" with --resume" if resume else ""))
    try:
        if resume:
            config = dataclasses.replace(tasks.saved_config(given["out"]), **given)
        else:
            config = tasks.default_config(**given)
        tasks.check_used(config, given)
    except ValueError as error:
        parser.error(_as_option(str(error)))
    result = tasks.train(config, resume=resume, report=_print_evaluation)
    if not _is_first():
        return 0
    print(
        f"{config.task} {config.attention}: test accuracy {result.test_accuracy:.1%} "
        f"(majority class {result.majority_accuracy:.1%}), "
        f"{1e3 * result.seconds / config.steps:.0f} ms/step, "
        f"peak {result.peak_mib:.0f} MiB, metrics in {config.out}"
    )
    return 0


def _as_option(message: str) -> str:
    """A message that begins with a field of `Config`, with the field's option in its place."""
    name, space, rest = message.partition(" ")
    if name not in {field.name for field in dataclasses.fields(tasks.Config)}:
        return message
    return f"--{name.replace('_', '-')}{space}{rest}"


@contextlib.contextmanager
def _named_if_missing() -> Iterator[None]:
    """Around imports of what needs matplotlib, which `train` does not."""
    try:
        yield
    except ImportError as error:
        raise tasks.RunError(error) from error


def _inspect(
    parser: argparse.ArgumentParser, checkpoint: Path, text: Path | None, out: Path | None
) -> int:
    with _named_if_missing():
        from benchmarks.learning.tasks.inspection_report import inspect, summary_table

    out = checkpoint.parent / "inspection" if out is None else out
    print(summary_table(inspect(checkpoint, text, out)))
    print(f"page, pictures and numbers in {out}")
    return 0


def _print_evaluation(row: dict[str, Any]) -> None:
    if row["split"] == "valid":
        tqdm.write(f"step {row['step']}: valid loss {row['loss']:.4f} acc {row['accuracy']:.1%}")


def _add_study(commands: _Commands) -> argparse.ArgumentParser:
    study = commands.add_parser(
        "study",
        help="train grids of runs and compare them",
        description="Makes the runs that a TOML file names, each in a process of its own, and "
        "writes tables and plots of them. The same command goes on with a study that was stopped.",
    )
    add = study.add_argument
    cores = _num_cores()
    add("config", type=Path, metavar="CONFIG", help="the study, for example studies/quick.toml")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/study"),
        help="directory of the runs, which studies may share; default: %(default)s",
    )
    add("--jobs", type=int, metavar="N", help=f"runs at a time; default: {cores}, the cores")
    add("--budget", type=float, metavar="MINUTES", help="stop after this time; 0 only reports")
    add("--page", type=Path, metavar="MARKDOWN", help="update the marked tables of this page")
    return study


def _num_cores() -> int:
    # Not every system says which cores are ours.
    has_own = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_own else os.cpu_count() or 1


def _study(
    parser: argparse.ArgumentParser,
    config: Path,
    out: Path,
    jobs: int | None,
    budget: float | None,
    page: Path | None,
) -> int:
    with _named_if_missing():
        from benchmarks.learning.study import run_study

    if jobs is not None and jobs < 1:
        parser.error(f"--jobs must be at least 1, got {jobs}")
    if budget is not None and not budget >= 0.0:
        parser.error(f"--budget must not be negative, got {budget}")
    if budget == 0.0 and jobs is not None:
        parser.error(f"--jobs means nothing with --budget 0, which only reports, got {jobs}")
    seconds = math.inf if budget is None else 60 * budget
    try:
        progress, made = run_study(
            config, out, jobs=jobs or _num_cores(), budget=seconds, page=page
        )
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(f"{name}\n\n{table}" for name, table in made.items()))
    print(f"{len(progress.finished)} runs finished, {out / config.stem}.md has all tables")
    if progress.left:
        print(f"{len(progress.left)} runs are left; the same command goes on with them")
    for run, reason in progress.failed.items():
        print(f"{PROG} study: error: {run}: {reason}", file=sys.stderr)
    return EXIT_FAILURE if progress.failed else 0

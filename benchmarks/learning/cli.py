"""The command `python -m benchmarks.learning`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from tqdm import tqdm

from benchmarks.learning import tasks
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
    add, switch = train.add_argument, argparse.BooleanOptionalAction
    add("--task", choices=tuple(tasks.TASKS), help="what to learn; needed unless --resume")
    add("--attention", choices=tuple(tasks.ATTENTIONS), help="default: smartbird")
    add("--seq-len", type=int, metavar="N", help="longest sequence, in tokens")
    add("--num-samples", type=int, metavar="K", help="keys per query and head")
    add("--window", type=int, metavar="W", help="nearest keys that are always among the K")
    add("--num-sinks", type=int, metavar="N", help="leading keys that are always among the K")
    add("--num-index-heads", type=int, metavar="H", help="sets of keys per query")
    add("--sketch-dim", type=int, metavar="S", help="width of a sketch")
    add("--num-sketches", choices=SKETCHES, help="whom each sketch is for")
    add("--method", choices=METHODS, help="how keys are drawn")
    add("--eval-method", choices=METHODS, help="how keys are drawn in evaluation")
    add("--correction", action=switch, help="estimate dense attention from the sample")
    add("--temperature", type=float, metavar="T", help="of drawing in training")
    add("--uniform-share", type=float, metavar="R", help="of the K, drawn uniformly in training")
    add("--learning", nargs="+", choices=LEARNING_ROUTES, help="how the sketch learns")
    add("--distill-weight", type=float, metavar="W", help="factor of the sketch's loss")
    add("--distill-temperature", type=float, metavar="T", help="of the attention it learns from")
    add("--distill-correction", action=switch, help="it learns from an estimate of dense attention")
    add("--dense-warmup", type=int, metavar="STEPS", help="attend densely for so many steps first")
    add("--anneal-samples", type=int, metavar="K", help="keys at the first step, more than later")
    add("--anneal-steps", type=int, metavar="STEPS", help="steps until there are K")
    add("--share-sketch", type=int, metavar="L", help="sketch in every L-th layer only")
    add("--reuse", type=int, metavar="L", help="draw keys in every L-th layer only")
    add("--layers", type=int, help="encoder layers")
    add("--dim", type=int, help="model width")
    add("--heads", type=int, help="attention heads per layer")
    add("--num-kv-heads", type=int, metavar="H", help="heads of keys and values; default: heads")
    add("--dropout", type=float, metavar="P", help="dropout probability")
    add("--embedding-std", type=float, metavar="STD", help="of new embeddings")
    add("--vocab-size", type=int, metavar="V", help="tokens (sotu, mqar, continuation)")
    add("--num-pairs", type=int, metavar="P", help="questions per sequence (mqar, continuation)")
    add(
        "--curriculum",
        type=float,
        metavar="SHARE",
        help="of the steps on shorter data (the recall tasks)",
    )
    add("--steps", type=int, help="optimizer steps")
    add("--batch-size", type=int, metavar="B", help="sequences per step")
    add("--lr", type=float, help="peak learning rate")
    add("--seed", type=int, help="of weights, data order, sampling and dropout")
    add("--log-every", type=int, metavar="STEPS", help="interval of train rows in metrics.jsonl")
    add("--eval-every", type=int, metavar="STEPS", help="interval of validations")
    add("--checkpoint-every", type=int, metavar="STEPS", help="interval of checkpoints")
    add("--fsdp", action=switch, help="each process of torchrun has a part of the weights")
    add(
        "--context-parallel",
        type=int,
        metavar="P",
        help="processes of torchrun that share the tokens of a sequence",
    )
    add("--dcp", action=switch, help="each process writes its part of a checkpoint")
    add("--threads", type=int, metavar="T", help="threads of a process; default: PyTorch's choice")
    add("--out", metavar="DIR", help="directory of the run; default: runs/TASK-ATTENTION")
    add("--resume", action="store_true", default=False, help="go on with the run in --out")
    return train


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
    # Not every system says which cores are ours.
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    add("config", type=Path, metavar="CONFIG", help="the study, for example studies/quick.toml")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/study"),
        help="directory of the runs, which studies may share; default: %(default)s",
    )
    add("--jobs", type=int, metavar="N", default=cores, help="runs at a time; default: %(default)s")
    add("--budget", type=float, metavar="MINUTES", help="stop after this time; 0 only reports")
    add("--page", type=Path, metavar="MARKDOWN", help="update the marked tables of this page")
    return study


def _study(
    parser: argparse.ArgumentParser,
    config: Path,
    out: Path,
    jobs: int,
    budget: float | None,
    page: Path | None,
) -> int:
    with _named_if_missing():
        from benchmarks.learning.study import run_study

    if jobs < 1:
        parser.error(f"--jobs must be at least 1, got {jobs}")
    if budget is not None and not budget >= 0.0:
        parser.error(f"--budget must not be negative, got {budget}")
    seconds = math.inf if budget is None else 60 * budget
    try:
        progress, made = run_study(config, out, jobs=jobs, budget=seconds, page=page)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(f"{name}\n\n{table}" for name, table in made.items()))
    print(f"{len(progress.finished)} runs finished, {out / config.stem}.md has all tables")
    if progress.left:
        print(f"{len(progress.left)} runs are left; the same command goes on with them")
    for run, reason in progress.failed.items():
        print(f"{PROG} study: error: {run}: {reason}", file=sys.stderr)
    return EXIT_FAILURE if progress.failed else 0

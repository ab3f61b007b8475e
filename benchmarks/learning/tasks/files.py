"""The files of a run: metrics that only grow, and checkpoints that are whole or not there."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.tasks.config import RunError

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"

_FORMAT = "smartbird-checkpoint-1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` holds the old checkpoint or the new one, whenever we die.

    Raises:
        OSError: the file cannot be written; a checkpoint already there is left as it was.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "wb") as file:
        torch.save({"format": _FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; executes no code from the file.

    Raises:
        RunError: there is no such file, or it is not a whole checkpoint.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise RunError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); it was left as it is"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise RunError(f"{path}: is not a checkpoint of a training; it was left as it is")
    del state["format"]
    return state


class MetricsFile:
    """JSON lines that only one process at a time can write.

    Args:
        path: the file, made where it is missing, locked until it is closed.

    Raises:
        RunError: another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the run is
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RunError(f"{path}: another process is training into this directory") from error

    def cut(self, length: int) -> None:
        """Drops what was written after a checkpoint, as the resumed run writes it again.

        Args:
            length: bytes that belong to the checkpoint; 0 where the run begins.

        Raises:
            RunError: the file is shorter.
        """
        size = self._file.seek(0, os.SEEK_END)
        if size < length:
            raise RunError(
                f"{self._path}: has {size} bytes, but {length} were there at the time of the "
                "checkpoint"
            )
        self._file.truncate(length)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row; it is in the file when this returns."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Makes the rows durable and returns their length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first.

    Raises:
        RunError: a line of it is broken.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise RunError(f"{path}: cannot be read ({error})") from error

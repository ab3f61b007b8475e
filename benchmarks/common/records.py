"""What measurements are kept in: JSON of dataclasses, and the commit that they are of."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["commit", "git", "rounded", "write_json"]


def write_json(path: Path, record: DataclassInstance) -> None:
    """A dataclass as JSON, :func:`rounded`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(dataclasses.asdict(record)), indent=1, ensure_ascii=False)
    # Lists of numbers, such as the repetitions of a timing, on one line.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(f"{text}\n", encoding="utf-8")


def git(directory: Path, *words: str) -> str | None:
    """What a git command says in ``directory``; None without git or a repository there."""
    command = ["git", "-C", str(directory), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """Of this source tree, with a plus if the library has changes; "unknown" without git."""
    root = Path(__file__).parents[2]
    head = git(root, "rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    sources = [str(root / name) for name in ("smartbird", "csrc")]
    changes = git(root, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return f"{head}+" if changes else head


def rounded(x: Any) -> Any:
    """With floats of six digits, more than a measurement has."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return x

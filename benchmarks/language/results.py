"""What a run measured, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.language.needle import Answer
from benchmarks.language.perplexity import Loss
from benchmarks.language.speed import CacheSize, Speed, Time, Writing


@dataclasses.dataclass
class Results:
    """Parts that were measured; each has an environment of its own under its name.

    Attributes:
        environments: by part of the program, on what and how it was run.
        losses: of passages of ordinary length.
        long_losses: of longer ones.
        answers: of the needle.
        speed: None: not measured.
    """

    environments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    losses: list[Loss] = dataclasses.field(default_factory=list)
    long_losses: list[Loss] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)
    speed: Speed | None = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(dataclasses.asdict(self)), indent=1, ensure_ascii=False)
        # Lists of numbers on one line.
        text = re.sub(r"\[[\s\d.,e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        path.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        fields = json.loads(path.read_text(encoding="utf-8"))
        speed = fields["speed"]
        return cls(
            environments=fields["environments"],
            losses=[Loss(**x) for x in fields["losses"]],
            long_losses=[Loss(**x) for x in fields["long_losses"]],
            answers=[Answer(**x) for x in fields["answers"]],
            speed=speed
            and Speed(
                num_samples=speed["num_samples"],
                times=[Time(**x) for x in speed["times"]],
                caches=[CacheSize(**x) for x in speed["caches"]],
                writing=Writing(**speed["writing"]),
            ),
        )


def _rounded(x: Any) -> Any:
    """Floats to six digits, more than any of the measurements has."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    return x

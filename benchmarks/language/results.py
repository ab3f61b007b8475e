"""What a run measured, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_json
from benchmarks.language.needle import Answer
from benchmarks.language.perplexity import Loss
from benchmarks.language.speed import CacheSize, Speed, Time, Writing


@dataclasses.dataclass
class Results:
    """Parts that were measured; each has an environment of its own under its name.

    Attributes:
        environments: by part of the program, on what and how it was run.
        losses: of passages of ordinary length.
        distilled: of them, dense and by sketches that were trained.
        long_losses: of longer ones.
        answers: of the needle.
        speed: None: not measured.
    """

    environments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    losses: list[Loss] = dataclasses.field(default_factory=list)
    distilled: list[Loss] = dataclasses.field(default_factory=list)
    long_losses: list[Loss] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)
    speed: Speed | None = None

    def save(self, path: Path) -> None:
        write_json(path, self)

    @classmethod
    def load(cls, path: Path) -> Results:
        fields = json.loads(path.read_text(encoding="utf-8"))
        speed = fields["speed"]
        return cls(
            environments=fields["environments"],
            losses=[Loss(**x) for x in fields["losses"]],
            distilled=[Loss(**x) for x in fields.get("distilled", [])],  # older files have none
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

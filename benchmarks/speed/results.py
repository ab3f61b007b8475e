"""What one run of the benchmark measured, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_json

ATTENTION, LAYER, MODEL = "attention", "layer", "model"


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem, or what attention is a part of, and how it is run.

    Attributes:
        length: N, queries and keys.
        batch: B.
        queries: where they are fewer than the keys, as of a decoder with a cache. None: N.
        kv_heads: H_kv. None: H.
        backward: the backward pass is run too.
        threads: of PyTorch and of the kernels.
        score_std: standard deviation of the sketch scores: how peaked the rows are.
        trained: the sketch is one that was trained, in place of random numbers.
        lengths: of the sequences of a padded batch, the longest first. None: all N.
        part: of a model that is timed, ``ATTENTION`` itself, a ``LAYER`` or a ``MODEL``.
    """

    length: int
    backward: bool
    threads: int
    batch: int = 1
    score_std: float = 1.0
    queries: int | None = None
    kv_heads: int | None = None
    trained: bool = False
    lengths: tuple[int, ...] | None = None
    part: str = ATTENTION

    def __str__(self) -> str:
        batch = f"B = {self.batch}, " if self.batch > 1 else ""
        size = f"N = {self.length}"
        if self.queries is not None:
            size = f"{self.queries} of {self.length} keys"
        if self.lengths is not None:
            size = f"N from {min(self.lengths)} to {self.length}"
        part = "" if self.part == ATTENTION else f"whole {self.part}, "
        grouped = f", {self.kv_heads} key/value heads" if self.kv_heads is not None else ""
        peaked = f", scores of deviation {self.score_std:g}" if self.score_std != 1 else ""
        trained = ", trained sketch" if self.trained else ""
        return f"{part}{batch}{size}, {pass_name(self.backward)}{grouped}{peaked}{trained}"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one attention on one case; or none, and the reason."""

    case: Case
    attention: str
    dtype: str
    seconds: list[float]
    missing: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of at least two repetitions."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> str:
        """Median and quartiles in ms."""
        first, third = self.quartiles
        return f"{ms(self.median)} [{ms(first)}, {ms(third)}]"

    def __str__(self) -> str:
        time = self.missing or f"{self.spread} ms, {len(self.seconds)} runs"
        return (
            f"{self.case}, {threads_name(self.case.threads)}, {self.attention} {self.dtype}: {time}"
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak resident bytes of one call beyond its inputs; -1 where not run, with the reason.

    ``output_bytes`` are those of the output and, with a backward pass, of the gradients.
    """

    attention: str
    dtype: str
    length: int
    backward: bool
    peak_bytes: int
    output_bytes: int
    missing: str | None = None

    def __str__(self) -> str:
        peak = self.missing or f"{self.peak_bytes / 2**20:.0f} MiB beyond the inputs"
        return (
            f"N = {self.length}, {pass_name(self.backward)}, {self.attention} {self.dtype}: {peak}"
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine reached with ``threads`` threads.

    Attributes:
        flops: by dtype, floating point operations per second of a matrix product.
        bandwidth: by level of the memory hierarchy, bytes per second read.
    """

    threads: int
    flops: dict[str, float]
    bandwidth: dict[str, float]

    def __str__(self) -> str:
        flops = [f"{name} {x / 1e9:.0f} GFLOP/s" for name, x in self.flops.items()]
        bandwidth = [f"{name} {x / 1e9:.0f} GB/s" for name, x in self.bandwidth.items()]
        return f"limits, {threads_name(self.threads)}: {', '.join(flops + bandwidth)}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Median time of one stage, its work by the formulas of ``stages``, and the least time for it.

    Attributes:
        flops: floating point operations.
        gathered_bytes: rows read one by one from a table of ``table_bytes``.
        streamed_bytes: read or written in order.
        limit_seconds: the least time the measured limits allow; None where none applies.
        bound: which of them decides.
    """

    name: str
    length: int
    dtype: str
    threads: int
    seconds: float
    flops: int
    gathered_bytes: int
    table_bytes: int
    streamed_bytes: int
    limit_seconds: float | None
    bound: str

    @property
    def disturbed(self) -> bool:
        """Whether it seems faster than the limit: one of the two was measured on a busy machine.

        Some stages are differences of times, which may even come out negative there.
        """
        return self.seconds <= (self.limit_seconds or 0.0)

    @property
    def fraction(self) -> float | None:
        """Of the limit that is reached; None where there is no limit, or a disturbed one."""
        if self.limit_seconds is None or self.disturbed:
            return None
        return self.limit_seconds / self.seconds

    @property
    def reached(self) -> str:
        """The fraction, or why there is none."""
        if self.disturbed:
            return "disturbed"
        return "-" if self.fraction is None else f"{self.fraction:.0%}"

    def __str__(self) -> str:
        limit = ""
        if self.disturbed:
            limit = ", disturbed: faster than the limit that was measured"
        elif self.fraction is not None:
            limit = f", {self.fraction:.0%} of the limit ({self.bound})"
        return (
            f"N = {self.length}, {threads_name(self.threads)}, {self.name}, {self.dtype}: "
            f"{ms(self.seconds)} ms{limit}"
        )


@dataclasses.dataclass
class Results:
    """A whole run. ``environment`` says on what and with which arguments.

    ``baseline`` are times of another version of smartbird, on cases of ``timings``.
    """

    environment: dict[str, Any]
    limits: list[Limits] = dataclasses.field(default_factory=list)
    timings: list[Timing] = dataclasses.field(default_factory=list)
    baseline: list[Timing] = dataclasses.field(default_factory=list)
    stages: list[Stage] = dataclasses.field(default_factory=list)
    memory: list[Memory] = dataclasses.field(default_factory=list)

    def save(self, path: Path) -> None:
        write_json(path, self)

    @classmethod
    def load(cls, path: Path) -> Results:
        fields = json.loads(path.read_text())
        return cls(
            environment=fields["environment"],
            limits=[Limits(**x) for x in fields["limits"]],
            timings=[timing_of(x) for x in fields["timings"]],
            baseline=[timing_of(x) for x in fields.get("baseline", [])],
            stages=[Stage(**x) for x in fields["stages"]],
            memory=[Memory(**x) for x in fields["memory"]],
        )


def timing_of(fields: dict[str, Any]) -> Timing:
    """From ``dataclasses.asdict`` by way of JSON."""
    return Timing(**fields | {"case": case_of(fields["case"])})


def case_of(fields: dict[str, Any]) -> Case:
    """Likewise; JSON has no tuples."""
    lengths = fields.get("lengths")
    return Case(**fields | {"lengths": None if lengths is None else tuple(lengths)})


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    x = seconds * 1e3
    if x < 0.1:
        return f"{x:.3g}"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def factor(ratio: float) -> str:
    """A speed-up, with two digits."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.{1 if ratio >= 0.995 else 2}f}x"


def pass_name(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def threads_name(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"

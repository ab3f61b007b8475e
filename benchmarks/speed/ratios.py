"""How Smart Bird stands to its rivals, as ratios of one run, and what is aimed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from benchmarks.speed.contenders import (
    BIGBIRD,
    COMPOSITION,
    DISTILL,
    DRAW,
    EXACT_TOPK,
    FLEX_WINDOWS,
    GUMBEL,
    LONGFORMER,
    ONE_BY_ONE,
    PACKED,
    QUERY_MASK,
    SDPA,
    SYSTEMATIC,
)
from benchmarks.speed.results import LAYER, MODEL, Case, Results, Timing, pass_name, threads_name

# Speed-up over SDPA in float32, for 2 cores with AVX2: by N, of the forward pass with `systematic`
# and with `gumbel`, and of forward and backward with `gumbel`.
AIMS_OVER_SDPA: dict[int, tuple[float, float, float | None]] = {
    256: (1.0, 1.0, None),
    1024: (2.5, 1.5, 2.0),
    4096: (11.0, 11.0, 14.0),
    16384: (22.0, 22.0, 20.0),
}

# The same with scores that deviate as those of a sketch that has learned may: by N, None: no aim.
LEARNED_SCORES = 4.0
AIMS_WHEN_LEARNED: dict[int, tuple[float | None, float | None, float | None]] = {
    4096: (10.0, 9.0, 12.0),
    16384: (None, 18.0, None),
}

# Key/value heads that the 12 query heads share, and the most that a call takes of the time with 12.
SHARED_HEADS = 3
MOST_OF_GROUPED = 0.4

# Batches and keys of caches that one query of each sequence reads; speed-up over SDPA with 1 thread
# that is aimed at, and the speed-up of 2 threads over 1.
DECODE = ((1, 1000), (1, 10_000), (1, 100_000), (1, 1_000_000), (16, 10_000))
AIMS_OF_DECODE = {(1, 10_000): 40.0, (1, 100_000): 60.0, (1, 1_000_000): 60.0}
AIM_OF_DECODE_THREADS = 0.85

# Lengths of a padded batch of which 22 % are tokens.
MIXED_LENGTHS = (4096, 1024, 768, 512, 384, 256, 128, 128)

# Speed-up of `sketch_sample` with `gumbel` over smartbird's commit d4b994f, by the deviation of its
# scores, at N = 4096.
AIMS_OVER_BASELINE = {1.0: 1.8, LEARNED_SCORES: 8.0}

# Time of a training step with distillation over that of one without, at N = 4096.
MOST_WITH_DISTILLATION = {GUMBEL: 1.4, SDPA: 1.5}


def mixed(threads: int) -> Case:
    """A padded batch of sequences of ``MIXED_LENGTHS``."""
    lengths = MIXED_LENGTHS
    return Case(lengths[0], False, threads, batch=len(lengths), lengths=lengths)


def whole(part: str, backward: bool, threads: int) -> Case:
    """A layer or a model at N = 4096 whose sketches have learned."""
    return Case(4096, backward, threads, score_std=LEARNED_SCORES, part=part)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A quotient of two medians (or GiB, by ``unit``), and its aim where there is one."""

    name: str
    value: float
    aim: float | None = None
    at_most: bool = False
    unit: str = "x"

    @property
    def aim_text(self) -> str:
        """Empty without an aim."""
        if self.aim is None:
            return ""
        met = self.value < self.aim if self.at_most else self.value >= self.aim
        bound = f"{'below' if self.at_most else 'at least'} {self.aim:g}{self.unit}"
        return f"{bound}: {'met' if met else 'missed'}"

    @property
    def value_text(self) -> str:
        return f"{self.value:.2f}{self.unit}"

    def __str__(self) -> str:
        aim = f"  ({self.aim_text})" if self.aim_text else ""
        return f"{self.value_text:>9}  {self.name}{aim}"


class _Ratios:
    """Collects the ratios of which ``results`` hold both sides."""

    def __init__(self, results: Results) -> None:
        self.found: list[Ratio] = []
        self._medians = {
            (t.attention, t.dtype, t.case): t.median for t in results.timings if not t.missing
        }

    def median(self, attention: str, case: Case, dtype: str = "float32") -> float | None:
        return self._medians.get((attention, dtype, case))

    def add(
        self,
        name: str,
        numerator: float | None,
        denominator: float | None,
        aim: float | None = None,
        *,
        at_most: bool = False,
    ) -> None:
        if numerator is not None and denominator is not None:
            self.found.append(Ratio(name, numerator / denominator, aim, at_most))

    def add_speed_up(
        self,
        ours: str,
        rival: str,
        case: Case,
        aim: float | None = None,
        *,
        dtype: str = "float32",
        note: str = "",
    ) -> None:
        name = f"{ours}, speed-up over {rival}{note}, {dtype}, {case}"
        self.add(name, self.median(rival, case, dtype), self.median(ours, case, dtype), aim)


def ratios(results: Results) -> list[Ratio]:
    """Those for which ``results`` hold what they need, in a fixed order."""
    threads = results.environment["threads"]
    table = _Ratios(results)
    for length, (systematic, gumbel, step) in AIMS_OVER_SDPA.items():
        table.add_speed_up(SYSTEMATIC, SDPA, Case(length, False, threads), systematic)
        table.add_speed_up(GUMBEL, SDPA, Case(length, False, threads), gumbel)
        table.add_speed_up(GUMBEL, SDPA, Case(length, True, threads), step)
    for backward in (False, True):
        trained = Case(4096, backward, threads, trained=True)
        for ours in (SYSTEMATIC, GUMBEL):
            table.add_speed_up(ours, SDPA, trained)
    for length, (*forward_aims, step) in AIMS_WHEN_LEARNED.items():
        learned = Case(length, False, threads, score_std=LEARNED_SCORES)
        for ours, aim in zip((SYSTEMATIC, GUMBEL), forward_aims, strict=True):
            table.add_speed_up(ours, SDPA, learned, aim)
        table.add_speed_up(GUMBEL, SDPA, dataclasses.replace(learned, backward=True), step)
    forward, step_case = Case(4096, False, threads), Case(4096, True, threads)
    table.add_speed_up(GUMBEL, SDPA, forward, dtype="bfloat16")
    table.add_speed_up(GUMBEL, SDPA, step_case, 30.0, dtype="bfloat16")

    windows = [name for name in FLEX_WINDOWS if table.median(name, forward) is not None]
    if windows:
        best = min(windows, key=lambda name: table.median(name, forward) or 0.0)
        table.add_speed_up(SYSTEMATIC, best, forward, 1.5, note=" (the best size)")
        table.add_speed_up(SYSTEMATIC, FLEX_WINDOWS[-1], forward, note=" (the default size)")
    table.add_speed_up(GUMBEL, COMPOSITION, forward, 100.0)
    table.add_speed_up(GUMBEL, COMPOSITION, step_case)
    for rival in (EXACT_TOPK, BIGBIRD, LONGFORMER):
        for case in (forward, step_case):
            table.add_speed_up(GUMBEL, rival, case)

    for length in sorted({timing.case.length for timing in results.timings}):
        for backward in (False, True):
            case = Case(length, backward, threads)
            for dtype in ("bfloat16", "float16"):
                name = f"{GUMBEL}, speed-up of {dtype} over float32, {case}"
                table.add(name, table.median(GUMBEL, case), table.median(GUMBEL, case, dtype), 1.0)
        for attention, most in MOST_WITH_DISTILLATION.items():
            name = f"{attention}, time with distillation over without, {case}"
            both = table.median(attention + DISTILL, case), table.median(attention, case)
            table.add(name, *both, most if length == 4096 else None, at_most=True)

    if threads > 1:
        for batch, length in ((64, 256), (1, 16384)):
            for backward in (False, True):
                one, all_cores = (Case(length, backward, n, batch) for n in (1, threads))
                name = f"{GUMBEL}, speed-up of {threads} threads over 1, {one}"
                aim = 0.9 * threads
                table.add(name, table.median(GUMBEL, one), table.median(GUMBEL, all_cores), aim)
    for backward in (False, True):
        alone = Case(4096, backward, threads)
        shared = dataclasses.replace(alone, kv_heads=SHARED_HEADS)
        name = f"{GUMBEL}, time of that on as many key/value heads as heads, {shared}"
        table.add(
            name,
            table.median(GUMBEL, shared),
            table.median(GUMBEL, alone),
            None if backward else MOST_OF_GROUPED,
            at_most=True,
        )
        for ours in (GUMBEL, SYSTEMATIC):
            table.add_speed_up(ours, SDPA, shared)
    for batch, keys in DECODE:
        one, all_cores = (Case(keys, False, n, batch, queries=1) for n in (1, threads))
        for ours in (GUMBEL, SYSTEMATIC):
            table.add_speed_up(ours, SDPA, one, AIMS_OF_DECODE.get((batch, keys)))
            if threads > 1:
                table.add_speed_up(ours, SDPA, all_cores, note=f" with {threads} threads")
        if threads > 1:
            name = f"{GUMBEL}, speed-up of {threads} threads over 1, {one}"
            least = AIM_OF_DECODE_THREADS * threads if keys >= 100_000 else None
            table.add(name, table.median(GUMBEL, one), table.median(GUMBEL, all_cores), least)
    for ours in (GUMBEL, GUMBEL + QUERY_MASK, GUMBEL + PACKED):
        table.add_speed_up(ours, SDPA, mixed(threads), note=" with a mask")
    table.add_speed_up(GUMBEL + PACKED, SDPA + ONE_BY_ONE, mixed(threads))
    for part in (LAYER, MODEL):
        for backward in (False, True):
            for ours in (GUMBEL, SYSTEMATIC):
                table.add_speed_up(ours, SDPA, whole(part, backward, threads))
    longer, shorter = (table.median(GUMBEL, Case(n, False, threads)) for n in (65536, 16384))
    table.add(f"{GUMBEL}, time at N = 65536 over 16384, forward", longer, shorter, 16, at_most=True)

    for memory in results.memory:
        if memory.attention == GUMBEL and memory.length == 65536 and memory.backward:
            beyond = (memory.peak_bytes - memory.output_bytes) / 2**30
            name = f"{GUMBEL}, peak memory beyond inputs and outputs, N = 65536, {pass_name(True)}"
            table.found.append(Ratio(name, beyond, 4.0, True, " GiB"))
    return table.found + [_gain(new, old) for new, old in versions(results)]


def versions(results: Results) -> Iterator[tuple[Timing, Timing]]:
    """The timings of this version of smartbird and of the other that was timed beside it."""
    timed = {(t.attention, t.dtype, t.case): t for t in results.timings}
    for old in results.baseline:
        yield timed[old.attention, old.dtype, old.case], old


def _gain(new: Timing, old: Timing) -> Ratio:
    case, aim = new.case, None
    if new.attention == DRAW + GUMBEL and case == Case(
        4096, False, case.threads, score_std=case.score_std
    ):
        aim = AIMS_OVER_BASELINE.get(case.score_std)
    name = f"{new.attention}, speed-up over the other version, {new.dtype}, {case}"
    if case.queries is not None:
        name += f", {threads_name(case.threads)}"
    return Ratio(name, old.median / new.median, aim)


@dataclasses.dataclass(frozen=True)
class Headline:
    """Smart Bird and dense attention in one case, in seconds; None where one was not timed."""

    name: str
    case: Case
    sdpa: float
    systematic: float | None
    gumbel: float | None


def headlines(results: Results) -> list[Headline]:
    """What a reader wants to know first, of what ``results`` hold; learned sketches before flat."""
    threads = results.environment["threads"]
    medians = _Ratios(results)
    cases = [
        ("trained sketch, N = 4096", Case(4096, False, threads, trained=True)),
        ("trained sketch, N = 4096", Case(4096, True, threads, trained=True)),
        *(
            (
                f"peaked sketch, N = {length}",
                Case(length, backward, threads, score_std=LEARNED_SCORES),
            )
            for length in (4096, 16384)
            for backward in (False, True)
        ),
        *(
            (f"flat sketch, N = {length}", Case(length, backward, threads))
            for length in (256, 1024, 4096, 16384)
            for backward in (False, True)
        ),
        *(
            (f"one query on {keys} keys", Case(keys, False, threads, queries=1))
            for batch, keys in DECODE
            if batch == 1
        ),
        ("8 sequences of 128 to 4096, packed", mixed(threads)),
        *(
            (f"a whole {part}, N = 4096", whole(part, backward, threads))
            for part in (LAYER, MODEL)
            for backward in (False, True)
        ),
    ]
    found = []
    for name, case in cases:
        padded = case.lengths is not None
        sdpa = medians.median(SDPA + ONE_BY_ONE if padded else SDPA, case)
        systematic, gumbel = (
            medians.median(ours + PACKED if padded else ours, case) for ours in (SYSTEMATIC, GUMBEL)
        )
        if sdpa is not None and (systematic is not None or gumbel is not None):
            name = f"{name}, {pass_name(case.backward)}"
            found.append(Headline(name, case, sdpa, systematic, gumbel))
    return found

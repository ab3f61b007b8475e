"""What a run measures: `quick` regularly, `floors` what is promised, `standard` and `full`.

`gains` is for two versions of smartbird.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.speed.contenders import (
    BIGBIRD,
    COMPOSITION,
    DISTILL,
    DRAW,
    EXACT_TOPK,
    FLEX_BLOCKS,
    FLEX_WINDOWS,
    GUMBEL,
    LONGFORMER,
    ONE_BY_ONE,
    PACKED,
    QUERY_MASK,
    SDPA,
    SYSTEMATIC,
)
from benchmarks.speed.ratios import DECODE, LEARNED_SCORES, SHARED_HEADS, mixed, whole
from benchmarks.speed.results import LAYER, MODEL, Case

FLOAT32, FLOAT16, BFLOAT16 = "float32", "float16", "bfloat16"
Contenders = tuple[tuple[str, str], ...]  # (attention, dtype)


@dataclasses.dataclass(frozen=True)
class StageCase:
    length: int
    dtype: str
    threads: int


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    attention: str
    length: int
    backward: bool


@dataclasses.dataclass(frozen=True)
class Preset:
    """``seconds`` are aimed at for the repetitions of each contender of a case or stage."""

    seconds: float
    cases: list[tuple[Case, Contenders]]
    stages: list[StageCase]
    memory: list[MemoryCase]


def _in(dtype: str, *attentions: str) -> Contenders:
    return tuple((attention, dtype) for attention in attentions)


OURS = (GUMBEL, SYSTEMATIC)
WHOLE_STEP = (SDPA + DISTILL, GUMBEL + DISTILL, SYSTEMATIC + DISTILL)
SPARSE_RIVALS = (*FLEX_WINDOWS, FLEX_BLOCKS, LONGFORMER)
SLOW_RIVALS = (BIGBIRD, COMPOSITION, EXACT_TOPK)
BEST_WINDOW = FLEX_WINDOWS[1]
# Where the slow rivals stop: beyond, one call takes a minute, or N x N numbers of each head.
SLOW_LENGTH = 4096


def quick(threads: int) -> Preset:
    cases = [
        (Case(1024, False, threads), _in(FLOAT32, SDPA, *OURS)),
        (Case(1024, True, threads), _in(FLOAT32, SDPA, GUMBEL)),
        (Case(4096, False, threads, trained=True), _in(FLOAT32, SDPA, *OURS)),
        (Case(4096, False, threads, score_std=LEARNED_SCORES), _in(FLOAT32, SDPA, *OURS)),
        (Case(4096, False, threads, kv_heads=SHARED_HEADS), _in(FLOAT32, GUMBEL)),
        (Case(100_000, False, threads, queries=1), _in(FLOAT32, SDPA, *OURS)),
        (mixed(threads), _in(FLOAT32, SDPA + ONE_BY_ONE, GUMBEL + PACKED)),
        (whole(LAYER, False, threads), _in(FLOAT32, SDPA, GUMBEL)),
        (
            Case(4096, False, threads),
            _in(FLOAT32, SDPA, BEST_WINDOW, LONGFORMER, *OURS) + _in(BFLOAT16, SDPA, *OURS),
        ),
        (
            Case(4096, True, threads),
            _in(FLOAT32, SDPA, GUMBEL, GUMBEL + DISTILL) + _in(BFLOAT16, GUMBEL),
        ),
    ]
    return Preset(seconds=0.5, cases=cases, stages=[StageCase(4096, FLOAT32, threads)], memory=[])


def floors(threads: int) -> Preset:
    """What the ratios of benchmarks/speed/ratios.py need, up to N = 16384, and the stages."""
    more = {
        Case(4096, False, threads): _in(FLOAT32, COMPOSITION, FLEX_WINDOWS[-1]),
        Case(4096, True, threads): _in(BFLOAT16, SDPA) + _in(FLOAT32, SDPA + DISTILL),
    }
    cases = [
        *((case, contenders + more.get(case, ())) for case, contenders in quick(threads).cases),
        (Case(16384, False, threads), _in(FLOAT32, SDPA, *OURS)),
        (Case(16384, True, threads), _in(FLOAT32, SDPA, GUMBEL)),
        (Case(4096, True, threads, score_std=LEARNED_SCORES), _in(FLOAT32, SDPA, GUMBEL)),
        (Case(16384, False, threads, score_std=LEARNED_SCORES), _in(FLOAT32, SDPA, GUMBEL)),
        (Case(256, False, threads), _in(FLOAT32, SDPA, *OURS)),
    ]
    return Preset(seconds=1.0, cases=cases, stages=quick(threads).stages, memory=[])


def gains(threads: int) -> Preset:
    """Where two versions may differ; SDPA, which does not, shows how far times can be trusted."""
    draws = (DRAW + GUMBEL, DRAW + SYSTEMATIC)
    cases = [
        (Case(256, False, threads), _in(FLOAT32, *OURS)),
        (Case(1024, False, threads), _in(FLOAT32, SDPA, *OURS)),
        *(
            (case, _in(FLOAT32, *(OURS if case.backward else (*OURS, *draws))))
            for backward in (False, True)
            for case in _sketches(Case(4096, backward, threads))
        ),
        *((case, _in(FLOAT32, *OURS)) for case in _sketches(Case(16384, False, threads))[:-1]),
        (Case(16384, True, threads), _in(FLOAT32, GUMBEL)),
        (Case(4096, False, threads), _in(BFLOAT16, *OURS)),
        (Case(4096, False, threads, kv_heads=SHARED_HEADS), _in(FLOAT32, *OURS)),
        *(
            (Case(keys, False, n, queries=1), _in(FLOAT32, GUMBEL))
            for keys in (10_000, 100_000, 1_000_000)
            for n in sorted({1, threads})
        ),
        (mixed(threads), _in(FLOAT32, GUMBEL)),
        (whole(LAYER, False, threads), _in(FLOAT32, GUMBEL)),
        (whole(LAYER, True, threads), _in(FLOAT32, GUMBEL)),
    ]
    return Preset(seconds=1.0, cases=cases, stages=[], memory=[])


def standard(threads: int) -> Preset:
    return Preset(
        seconds=1.0,
        cases=[
            *_lengths([256, 1024, 4096, 16384], threads),
            *_long(threads),
            *_of_other_kinds(threads),
        ],
        stages=_stages([1024, 4096, 16384], threads),
        memory=_memory([1024, 4096, 16384, 65536]),
    )


def full(threads: int) -> Preset:
    lengths = [2**n for n in range(8, 17)]
    long = [
        (Case(length, backward, threads), _in(FLOAT32, *OURS) + _in(BFLOAT16, *OURS))
        for length in (131072, 262144)
        for backward in (False, True)
    ]
    return Preset(
        seconds=5.0,
        cases=_lengths(lengths, threads) + long + _of_other_kinds(threads),
        stages=_stages([256, 1024, 4096, 16384, 65536], threads),
        memory=_memory([2**n for n in range(10, 18)]),
    )


PRESETS = {"quick": quick, "floors": floors, "standard": standard, "full": full, "gains": gains}


def _lengths(lengths: Sequence[int], threads: int) -> list[tuple[Case, Contenders]]:
    """Everything at each length."""
    return [
        (
            Case(length, backward, threads),
            _in(FLOAT32, SDPA, *SPARSE_RIVALS)
            + (_in(FLOAT32, *SLOW_RIVALS) if length <= SLOW_LENGTH else ())
            + _in(FLOAT32, *OURS)
            + (_in(FLOAT32, *WHOLE_STEP) if backward else ())
            # Without instructions for bfloat16 SDPA's backward pass takes minutes beyond N = 4096.
            + (_in(BFLOAT16, SDPA) if length <= 4096 or not backward else ())
            + _in(BFLOAT16, BEST_WINDOW, *OURS)
            + _in(FLOAT16, GUMBEL),
        )
        for length in lengths
        for backward in (False, True)
    ]


def _long(threads: int) -> list[tuple[Case, Contenders]]:
    """Growth beyond what dense attention is run at; the fast rivals only."""
    return [
        (Case(65536, False, threads), _in(FLOAT32, BEST_WINDOW, LONGFORMER, *OURS)),
        (Case(65536, True, threads), _in(FLOAT32, LONGFORMER, GUMBEL)),
    ]


def _of_other_kinds(threads: int) -> list[tuple[Case, Contenders]]:
    """What changes more than the length."""
    return [
        *_scaling(threads),
        *_peaked(threads),
        *_grouped(threads),
        *_decode(threads),
        *_padded(threads),
        *_whole(threads),
    ]


def _scaling(threads: int) -> list[tuple[Case, Contenders]]:
    """One thread against all, on many short sequences and on one."""
    both = _in(FLOAT32, SDPA, *OURS)
    short = [
        (Case(256, backward, n, batch=64), both)
        for backward in (False, True)
        for n in sorted({1, threads})
    ]
    one = [
        (Case(length, backward, 1), both if length < 16384 else _in(FLOAT32, *OURS))
        for length in (1024, 4096, 16384)
        for backward in (False, True)
        if threads > 1  # else they are there already
    ]
    return short + one


def _peaked(threads: int) -> list[tuple[Case, Contenders]]:
    """Sketches whose rows are more peaked: distinct keys are harder to draw, easier to read."""
    cases = [Case(4096, False, threads, score_std=2.0)]
    for backward in (False, True):
        cases += _sketches(Case(4096, backward, threads))[1:]
    cases.append(Case(16384, False, threads, score_std=LEARNED_SCORES))
    return [(case, _in(FLOAT32, SDPA, *OURS)) for case in cases]


def _sketches(flat: Case) -> list[Case]:
    """A case with sketches that are flat, as peaked as those that learn, and trained."""
    return [
        flat,
        dataclasses.replace(flat, score_std=LEARNED_SCORES),
        dataclasses.replace(flat, trained=True),
    ]


def _grouped(threads: int) -> list[tuple[Case, Contenders]]:
    """Query heads that share keys, values and what is drawn."""
    return [
        (Case(4096, backward, threads, kv_heads=SHARED_HEADS), _in(FLOAT32, SDPA, *OURS))
        for backward in (False, True)
    ]


def _decode(threads: int) -> list[tuple[Case, Contenders]]:
    """One query, or one of each sequence of a batch, on the keys of a cache."""
    return [
        (Case(keys, False, n, batch, queries=1), _in(FLOAT32, SDPA, *OURS))
        for batch, keys in DECODE
        for n in sorted({1, threads})
    ]


def _padded(threads: int) -> list[tuple[Case, Contenders]]:
    """Sequences of mixed lengths in one batch."""
    ours = (method + padding for method in OURS for padding in ("", QUERY_MASK, PACKED))
    return [(mixed(threads), _in(FLOAT32, SDPA, SDPA + ONE_BY_ONE, *ours))]


def _whole(threads: int) -> list[tuple[Case, Contenders]]:
    """What attention is a part of."""
    cases = [whole(LAYER, backward, threads) for backward in (False, True)]
    cases.append(dataclasses.replace(cases[0], length=16384))
    layers = [(case, _in(FLOAT32, SDPA, *OURS)) for case in cases]
    # A step of a model takes ten seconds, and its layers tell of `systematic` already.
    models = [
        (whole(MODEL, backward, threads), _in(FLOAT32, SDPA, GUMBEL)) for backward in (False, True)
    ]
    return layers + models


def _stages(lengths: Sequence[int], threads: int) -> list[StageCase]:
    return [
        StageCase(length, dtype, n)
        for n in sorted({1, threads}, reverse=True)
        for dtype in (FLOAT32, BFLOAT16)
        for length in lengths
        if n == threads or dtype == FLOAT32
    ]


def _memory(lengths: Sequence[int]) -> list[MemoryCase]:
    dense = (SDPA, SDPA + DISTILL)
    attentions = (*dense, BEST_WINDOW, LONGFORMER, *SLOW_RIVALS, GUMBEL, GUMBEL + DISTILL)
    return [
        MemoryCase(attention, length, backward)
        for attention in attentions
        for length in lengths
        for backward in (False, True)
        if not (attention in SLOW_RIVALS and length > SLOW_LENGTH)
        # SDPA's backward pass takes minutes beyond that.
        if not (attention in dense and backward and length > 16384)
        if backward or not attention.endswith(DISTILL)
    ]

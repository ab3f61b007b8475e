"""The tables of docs/language.md, from the JSON of a run.

A table goes between the lines ``<!-- table STEM:NAME -->`` and ``<!-- end -->``: STEM is the name
of the JSON file without its ending, NAME a key of ``TABLES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.language.attention import (
    DENSE,
    ORACLE,
    OURS,
    OURS_KV,
    OURS_LATE,
    OURS_LAYER,
    SKETCHES,
    WINDOW,
)
from benchmarks.language.model import KINDS
from benchmarks.language.needle import Answer
from benchmarks.language.perplexity import Loss, mean_factor
from benchmarks.language.results import Results
from benchmarks.language.speed import ATTENTION, PREFILL, STEP, Speed

_NOT_RUN = "Not measured.\n"
_MIB = 2**20


def summary(results: Results) -> str:
    """Where sampled attention wins and where dense attention is better, as a list."""
    lines = []
    ours = _select(results.losses, attention=OURS, seed=None) if results.losses else []
    if ours:
        factors = [
            f"{mean_factor(some):.3f} at K = {keys}" for keys, some in _by_keys(ours).items()
        ]
        lines.append(f"Perplexity, as a multiple of dense attention's: {', '.join(factors)}.")
    trained = _by_keys(_select(results.distilled, attention=OURS))
    if trained:
        factors = [f"{mean_factor(some):.3f} at K = {keys}" for keys, some in trained.items()]
        minutes = results.environments["distil"]["minutes"]
        lines.append(f"After {minutes:g} minutes of distil: {', '.join(factors)}.")
    if results.answers:
        counts = _counts(results)
        lines.append(
            "Facts found in a long text: "
            + "; ".join(f"{name}: {right} of {asked}" for name, (right, asked) in counts.items())
            + "."
        )
    if results.speed is not None:
        told = {PREFILL: "prefill", STEP: "a decoded token", ATTENTION: "its attention"}
        faster: list[str] = []
        slower: list[str] = []
        for what, name in told.items():
            for (threads, length), times in _medians(results.speed, what).items():
                if threads != results.environments["speed"]["threads"]:
                    continue
                for way in (one for one in SKETCHES if one in times):
                    ratio = times[DENSE] / times[way]
                    how = way.removeprefix(OURS)
                    text = f"{name} at {length} tokens{how} ({ratio:.2f}x)"
                    (faster if ratio > 1 else slower).append(text)
        lines.append(f"Faster than SDPA: {', '.join(faster) or 'nothing'}.")
        lines.append(f"Slower than SDPA: {', '.join(slower) or 'nowhere'}.")
    return "".join(f"- {line}\n" for line in lines) or _NOT_RUN


def machine(results: Results) -> str:
    rows = []
    for part, last in results.environments.items():
        runs = [last]
        while "before" in runs[-1]:  # which it resumed
            runs.append(runs[-1]["before"])
        rows += [_run(part, e) for e in reversed(runs)]
    return table(["part", "processor", "run with", "versions", "date", "took"], rows)


def _run(part: str, e: dict[str, Any]) -> list[str]:
    """A row of :func:`machine`, from the environment of a run."""
    return [
        part,
        f"{e['cpu']}, {e['cores']} cores",
        f"{e['threads']} threads, {e['smartbird']['cpu_isa']}",
        f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}",
        f"{e['date'][:16].replace('T', ' ')}, commit {e['commit']}",
        f"{e['seconds'] / 60:.1f} minutes, load {e['load_before'][0]:.1f} before",
    ]


def perplexity(results: Results) -> str:
    """Factors on dense perplexity by attention and K."""
    if not results.losses:
        return _NOT_RUN
    losses = results.losses
    ours = _select(losses, attention=OURS, seed=None)
    every = {loss.passage for loss in ours}
    some = {loss.passage for loss in losses if loss.attention == ORACLE}
    few = [loss for loss in losses if loss.passage in some]
    rows = []

    def add(name: str, read: set[str], chosen: list[Loss]) -> None:
        rows.append((name, len(read), _cells(chosen, len(read))))

    if every != some:
        add(f"{OURS}, all passages", every, ours)
    trained = _select(results.distilled, attention=OURS)
    if trained:
        steps = results.environments["distil"]["steps"]
        add(f"{OURS}, after {steps} steps of distil", {x.passage for x in trained}, trained)
    add(OURS, some, _select(few, attention=OURS, seed=None))
    for seed in sorted({loss.seed for loss in few if loss.seed is not None}):
        add(f"{OURS}, seed {seed} of sampling", some, _select(few, attention=OURS, seed=seed))
    for rival in (OURS_KV, OURS_LAYER, ORACLE, WINDOW):
        add(rival, some, _select(few, attention=rival))
    keys = sorted(_by_keys(ours))
    return table(
        ["perplexity over dense", "passages", *(f"K = {k}" for k in keys)],
        [[name, str(count), *(cells.get(k, "-") for k in keys)] for name, count, cells in rows],
    )


def passages(results: Results) -> str:
    """Each passage: dense perplexity, and factors of ours by K."""
    if not results.losses:
        return _NOT_RUN
    losses = results.losses
    keys = sorted(_by_keys(losses))
    rows = []
    for kind in KINDS:
        dense = _select(losses, attention=DENSE, kind=kind)
        for one in dense:
            ours = _by_keys(_select(losses, attention=OURS, seed=None, passage=one.passage))
            cells = [f"{mean_factor(ours[k]):.3f}" if k in ours else "-" for k in keys]
            rows.append([kind, one.passage, f"{math.exp(one.loss):.2f}", *cells])
        if dense:
            every = _by_keys(_select(losses, attention=OURS, seed=None, kind=kind))
            cells = [f"**{mean_factor(every[k]):.3f}**" if k in every else "-" for k in keys]
            rows.append([kind, "**mean**", "", *cells])
    return table(["kind", "passage", "dense perplexity", *(f"K = {k}" for k in keys)], rows)


def long(results: Results) -> str:
    """Factors for the longer passages."""
    if not results.long_losses:
        return _NOT_RUN
    losses = results.long_losses
    keys = sorted(_by_keys(losses))
    rows = []
    for one in _select(losses, attention=DENSE):
        for name in (OURS, OURS_LATE):
            read = _by_keys(_select(losses, attention=name, passage=one.passage))
            cells = [f"{mean_factor(read[k]):.3f}" if k in read else "-" for k in keys]
            if read:
                rows.append([one.kind, one.passage, f"{math.exp(one.loss):.2f}", name, *cells])
    length = losses[0].length
    header = [f"{length} tokens", "passage", "dense perplexity", "read with"]
    return table([*header, *(f"K = {k}" for k in keys)], rows)


def needle(results: Results) -> str:
    """Right answers by depth."""
    if not results.answers:
        return _NOT_RUN
    depths = sorted({answer.depth for answer in results.answers})
    rows = []
    for name, (right, asked) in _counts(results).items():
        cells = []
        for depth in depths:
            some = [a.right for a in results.answers if _name(a) == name and a.depth == depth]
            cells.append(f"{sum(some)} of {len(some)}")
        rows.append([name, *cells, f"**{right} of {asked}**"])
    return table(["planted at", *(f"{depth:.0%}" for depth in depths), "all"], rows)


def prefill(results: Results) -> str:
    """Seconds to read a text whole."""
    if results.speed is None:
        return _NOT_RUN
    rows = [
        [str(length), str(threads), name, f"{times[DENSE]:.1f}", f"{times[name]:.1f}", ratio]
        for (threads, length), times in sorted(_medians(results.speed, PREFILL).items())
        for name, ratio in _ratios(times)
    ]
    header = ["tokens", "threads", "ours", "SDPA, s", "ours, s", "SDPA / ours"]
    return table(header, rows) if rows else _NOT_RUN


def decode(results: Results) -> str:
    """Milliseconds for a token: its attention, and the whole step."""
    if results.speed is None:
        return _NOT_RUN
    steps = _medians(results.speed, STEP)
    rows = []
    for (threads, length), part in sorted(_medians(results.speed, ATTENTION).items()):
        step = steps[threads, length]
        for (name, faster), (_, whole) in zip(_ratios(part), _ratios(step), strict=True):
            milliseconds = [f"{x * 1e3:.1f}" for x in (part[DENSE], part[name])]
            whole_step = [f"{x * 1e3:.1f}" for x in (step[DENSE], step[name])]
            rows.append(
                [str(length), str(threads), name, *milliseconds, faster, *whole_step, whole]
            )
    header = ["attention: SDPA, ms", "ours, ms", "SDPA / ours"]
    whole_header = ["whole step: SDPA, ms", "ours, ms", "SDPA / ours"]
    return table(["context", "threads", "ours", *header, *whole_header], rows)


def cache(results: Results) -> str:
    """MiB of the caches."""
    if results.speed is None:
        return _NOT_RUN
    rows = [
        [
            str(one.length),
            "DynamicCache" if one.attention == DENSE else "SketchCache",
            f"{one.filled / _MIB:.0f}",
            f"{one.allocated / _MIB:.0f}",
        ]
        for one in sorted(results.speed.caches, key=lambda c: (c.length, c.attention != DENSE))
    ]
    header = ["tokens", "cache", "MiB of these tokens", "MiB allocated once it grew by one more"]
    return table(header, rows)


def writing(results: Results) -> str:
    """What the model wrote."""
    if results.speed is None:
        return _NOT_RUN
    one = results.speed.writing
    titles = {"document": "The document", DENSE: "Dense attention", OURS: "Sampled keys"}
    parts = [f"It read the first {one.read} tokens of {one.passage}. What follows them:\n"]
    for name, title in titles.items():
        text = " ".join(one.texts[name].split())
        parts.append(f"- {title}: ... {text} ...\n")
    return "".join([parts[0], "\n", *parts[1:]])


TABLES: dict[str, Callable[[Results], str]] = {
    "summary": summary,
    "machine": machine,
    "perplexity": perplexity,
    "passages": passages,
    "long": long,
    "needle": needle,
    "prefill": prefill,
    "decode": decode,
    "cache": cache,
    "writing": writing,
}


# ---- choosing -----------------------------------------------------------------------------------


def _select(losses: Iterable[Loss], **wanted: object) -> list[Loss]:
    """Losses whose attributes are these."""
    return [
        loss
        for loss in losses
        if all(getattr(loss, name) == value for name, value in wanted.items())
    ]


def _by_keys(losses: Iterable[Loss]) -> dict[int, list[Loss]]:
    found: dict[int, list[Loss]] = {}
    for loss in losses:
        if loss.num_samples is not None:
            found.setdefault(loss.num_samples, []).append(loss)
    return found


def _cells(losses: Sequence[Loss], passages: int) -> dict[int, str]:
    """Mean and range over passages for each K that was read with all of them."""
    cells = {}
    for keys, some in _by_keys(losses).items():
        if len(some) == passages:
            factors = [loss.factor for loss in some]
            cells[keys] = f"{mean_factor(some):.3f} [{min(factors):.3f}, {max(factors):.3f}]"
    return cells


def _name(answer: Answer) -> str:
    """Of a row of the needle's table."""
    keys = answer.num_samples
    return answer.attention if keys is None else f"{answer.attention}, K = {keys}"


def _counts(results: Results) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each attention."""
    counts: dict[str, tuple[int, int]] = {}
    for answer in results.answers:
        right, asked = counts.get(_name(answer), (0, 0))
        counts[_name(answer)] = right + answer.right, asked + 1
    return counts


def _medians(speed: Speed, what: str) -> dict[tuple[int, int], dict[str, float]]:
    """Medians of each attention by threads and length."""
    medians: dict[tuple[int, int], dict[str, float]] = {}
    for one in speed.times:
        if one.what == what:
            medians.setdefault((one.threads, one.length), {})[one.attention] = one.median
    return medians


def _ratios(times: dict[str, float]) -> list[tuple[str, str]]:
    """Ours that were timed, and how many times as fast as dense attention they are."""
    return [(name, f"{times[DENSE] / times[name]:.2f}x") for name in SKETCHES if name in times]

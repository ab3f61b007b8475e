"""The report: words and pictures made from what was measured, in one file without links."""

from __future__ import annotations

import dataclasses
import html
import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.axes import tidy
from benchmarks.common.marks import MARKS
from benchmarks.common.page import (
    html_page,
    html_table,
    marked_text,
    png_figure,
    side_by_side,
    svg_figure,
    text_table,
)
from benchmarks.learning.demo.measure import (
    DRAWS,
    HEAD_DIM,
    HEADS,
    NUM_SAMPLES,
    SKETCH_DIM,
    Passage,
    Timing,
)
from benchmarks.learning.tasks import Result
from benchmarks.learning.tasks.attention import forced_keys
from benchmarks.learning.tasks.draws import key_rates
from smartbird import build_info
from smartbird.plot import plot_arcs, plot_heat_map

NAMES = {"dense": "dense", "smartbird": "Smart Bird"}
ARC_TOKENS, MAX_ARCS = 36, 80
SHOWN_TOKENS = 400
SHOWN_WORDS = 16


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a report tells.

    Attributes:
        results: of the trainings, by attention.
        rows: of their metrics, by attention.
        timings: of one attention call, by length.
        passage: what the trained sketches draw in a passage.
    """

    results: Mapping[str, Result]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    timings: Sequence[Timing]
    passage: Passage


# --- Numbers ---


def summary(findings: Findings) -> list[list[str]]:
    """The table, first row its head."""
    head = ["attention", "test accuracy", "majority class", "step time", "peak memory", "weights"]
    return [
        head,
        *(
            [
                NAMES[attention],
                f"{result.test_accuracy:.1%}",
                f"{result.majority_accuracy:.1%}",
                f"{result.seconds / result.config.steps:.2f} s",
                f"{result.peak_mib:.0f} MiB",
                f"{result.parameters:,}",
            ]
            for attention, result in findings.results.items()
        ),
    ]


def summary_table(findings: Findings) -> str:
    """The table as text."""
    return text_table(summary(findings))


def verdicts(findings: Findings) -> list[str]:
    """What the numbers say, in sentences: which of the two is better, and by how much."""
    dense, bird = findings.results["dense"], findings.results["smartbird"]
    steps = [result.seconds / result.config.steps for result in (dense, bird)]
    return [
        _accuracy_verdict(dense, bird, findings.passage.test_passages),
        _ratio_verdict("A training step", "takes", "time", *steps),
        _ratio_verdict("The process that trains", "needs", "memory", dense.peak_mib, bird.peak_mib),
        _length_verdict(
            "forward", [(t.length, t.dense_forward, t.smartbird_forward) for t in findings.timings]
        ),
        _length_verdict(
            "forward and backward",
            [(t.length, t.dense_backward, t.smartbird_backward) for t in findings.timings],
        ),
    ]


def _accuracy_verdict(dense: Result, bird: Result, passages: int) -> str:
    better, other = (dense, bird) if dense.test_accuracy > bird.test_accuracy else (bird, dense)
    names = [NAMES[result.config.attention] for result in (better, other)]
    gap = better.test_accuracy - other.test_accuracy
    # Two independent shares of as many passages: an upper bound, as both read the same ones.
    variance = sum(r.test_accuracy * (1 - r.test_accuracy) for r in (dense, bird)) / passages
    noise = math.sqrt(variance)
    if gap == 0.0:
        says = "Both are right equally often"
    else:
        says = f"{names[0]} is right {100 * gap:.1f} points more often than {names[1]}"
    doubt = "within" if gap <= 2 * noise else "beyond"
    text = (
        f"{says} on the {passages} test passages; that is {doubt} what chance alone makes of two "
        f"equal models (twice the standard error is {200 * noise:.1f} points). "
        "One run each, one seed."
    )
    for result in (dense, bird):
        if result.test_accuracy <= result.majority_accuracy:
            name = NAMES[result.config.attention]
            text += f" {name} has not learned to beat the majority class in this run."
    return text[0].upper() + text[1:]


def _ratio_verdict(subject: str, verb: str, what: str, dense: float, bird: float) -> str:
    ratio = max(dense, bird) / min(dense, bird)
    if ratio < 1.05:
        return f"{subject} {verb} about as much {what} with either (a factor of {ratio:.2f})."
    if bird < dense:
        return f"{subject} {verb} {ratio:.2f} times less {what} with Smart Bird."
    return f"{subject} {verb} {ratio:.2f} times more {what} with Smart Bird: dense is better here."


def _length_verdict(what: str, seconds: Sequence[tuple[int, float, float]]) -> str:
    slower = [length for length, dense, bird in seconds if bird > dense]
    length, dense, bird = seconds[-1]
    ratio = f"{dense / bird:.2f} times as fast as dense at {length} tokens"
    if not slower:
        return (
            f"One attention call, {what}: Smart Bird is faster at every length measured, {ratio}."
        )
    listed = ", ".join(map(str, slower))
    return f"One attention call, {what}: dense is faster at {listed} tokens; Smart Bird is {ratio}."


# --- Pictures ---


def learning_curves(findings: Findings) -> dict[str, Figure]:
    """Loss and accuracy over steps, and accuracy over training time, by what they show."""
    figures = {}
    majority = 100 * findings.results["dense"].majority_accuracy
    for title, split, x, y in (
        ("Training loss over steps", "train", "step", "loss"),
        ("Validation accuracy over steps", "valid", "step", "accuracy"),
        ("Validation accuracy over the seconds of training steps", "valid", "seconds", "accuracy"),
    ):
        figures[title], axis = _panel()
        for attention, rows in findings.rows.items():
            told = [row for row in rows if row["split"] == split]
            factor = 100 if y == "accuracy" else 1
            marked = _style(attention) if split == "valid" else _style(attention) | {"marker": ""}
            axis.plot([row[x] for row in told], [factor * row[y] for row in told], **marked)
        if y == "accuracy":
            axis.axhline(majority, color="gray", linestyle=":", label="majority class")
        axis.set(xlabel=x, ylabel="accuracy, %" if y == "accuracy" else "loss, nats")
        axis.legend()
    return figures


def time_curves(timings: Sequence[Timing]) -> dict[str, Figure]:
    """Seconds of one attention call over the number of tokens, by what they show."""
    figures = {}
    lengths = [timing.length for timing in timings]
    for kind, title in {"forward": "Forward", "backward": "Forward and backward"}.items():
        figures[title], axis = _panel()
        for attention in NAMES:
            seconds = [getattr(timing, f"{attention}_{kind}") for timing in timings]
            axis.loglog(lengths, seconds, base=2, **_style(attention))
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(xlabel="tokens", ylabel="seconds")
        axis.legend()
    return figures


def _panel() -> tuple[Figure, Axes]:
    """Small enough for a narrow screen."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def _style(attention: str) -> dict[str, Any]:
    mark = MARKS[attention]
    return {
        "color": mark.colour,
        "linestyle": mark.line,
        "marker": mark.marker,
        "label": NAMES[attention],
    }


def busiest_stretch(indices: Tensor, length: int) -> int:
    """Start of the `length` tokens that draw each other most, drawing oneself aside."""
    num_tokens = indices.shape[-2]
    query = torch.arange(num_tokens)[:, None]
    best, start_of_best = -1, 0
    for start in range(0, max(1, num_tokens - length + 1), length // 2):
        rows = indices[..., start : start + length, :]
        inside = (rows >= start) & (rows < start + length) & (rows != query[start : start + length])
        if (count := int(inside.sum())) > best:
            best, start_of_best = count, start
    return start_of_best


def arcs(passage: Passage, layer: str) -> Figure:
    """What the tokens of the busiest stretch draw within it."""
    indices = passage.draws[layer]
    start = busiest_stretch(indices, ARC_TOKENS)
    pieces = passage.pieces[start : start + ARC_TOKENS]
    rows = indices[..., start : start + len(pieces), :] - start
    outside = (rows < 0) | (rows >= len(pieces)) | (rows == torch.arange(len(pieces))[:, None])
    return plot_arcs(rows.masked_fill(outside, -1), pieces, max_arcs=MAX_ARCS)


def highlighted(findings: Findings, layer: str) -> str:
    """The beginning of the passage, each token the darker the more often it is drawn."""
    passage = findings.passage
    rates = layer_rates(findings, layer)
    return marked_text(passage.pieces, passage.begins, rates, SHOWN_TOKENS)


def favourite_words(findings: Findings, layer: str) -> list[tuple[str, float, int]]:
    """The words that are drawn most, with their rate and how often they stand in the passage.

    The rate is a mean over the places of a word; words that are nowhere drawn more than chance
    gives are left out.
    """
    passage = findings.passage
    rates: dict[str, list[float]] = defaultdict(list)
    words = iter(_words(passage))
    for begin, rate in zip(passage.begins, layer_rates(findings, layer), strict=True):
        if begin or not rates:
            places = rates[next(words).lower()]
            places.append(rate)
        else:  # a further piece of the same word
            places[-1] = max(places[-1], rate)
    means = [(word, sum(r) / len(r), len(r)) for word, r in rates.items() if max(r) > 1.0]
    return sorted(means, key=lambda entry: -entry[1])[:SHOWN_WORDS]


def _words(passage: Passage) -> list[str]:
    """The words of the passage, in order."""
    pairs = zip(passage.words, passage.begins, strict=True)
    return [word for place, (word, begin) in enumerate(pairs) if begin or place == 0]


def layer_rates(findings: Findings, layer: str) -> list[float]:
    """How often each token of the passage is drawn by all, see `key_rates`."""
    forced = forced_keys(findings.results["smartbird"].config)
    passage = findings.passage
    return key_rates(passage.draws[layer], len(passage.pieces), forced=forced)


# --- The page ---


def write_report(path: Path, findings: Findings) -> None:
    """Writes the page to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(findings), encoding="utf-8")


def page(findings: Findings) -> str:
    """The page, complete in itself."""
    passage, config = findings.passage, findings.results["smartbird"].config
    says = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdicts(findings))
    layers = "\n".join(_layer_section(findings, layer) for layer in passage.draws)
    heat_map = plot_heat_map(passage.draws, len(passage.pieces))
    body = f"""<p>Two Transformers that differ in their attention only were trained to tell from
{config.seq_len} tokens of a State of the Union address in which of eight periods it was given
(numbers masked, no year in two splits). Dense attention looks at every token; Smart Bird lets
every head of every token sample {config.num_samples} others by a sketch of {config.sketch_dim}
dimensions. Everything below was measured in this run{_machine()}.</p>
{html_table(summary(findings))}
<ul>{says}</ul>
<p class="note">{config.steps} steps of {config.batch_size} passages, {config.layers} layers, width
{config.dim}, {config.heads} heads, seed {config.seed}. Accuracy is that of the last weights. Step
time includes drawing the batch and the optimizer; peak memory is the largest resident set of the
training process, with Python, PyTorch and the data in it. Smart Bird has more weights by its
sketches.</p>
<h2>Learning</h2>
{_row(learning_curves(findings))}
<h2>Time against length</h2>
<p>One attention call on one sequence, float32: {HEADS} heads of {HEAD_DIM} dimensions, and for
Smart Bird {NUM_SAMPLES} keys per head and a sketch of {SKETCH_DIM} dimensions. Backward includes
the loss that teaches the sketch. Medians; both axes are logarithmic.</p>
{_row(time_curves(findings.timings))}
<h2>What the sketch looks at</h2>
<p>The beginning of the address of {passage.address.year}
({html.escape(passage.address.president)}), from the test split. The right answer is
{passage.period}; the model says {passage.answer}. Pictures pool {DRAWS} draws of all heads.</p>
{png_figure(heat_map, "Which keys the queries of each layer draw.", wide=True)}
<p class="note">Queries down, keys across. A vertical stripe is a token that many others draw; the
diagonal is the token itself, which is always among its keys where the window is not 0.</p>
{layers}
<p class="note">Smart Bird is described in arXiv 2108.09193; this is an independent implementation
from its abstract, and no number here is one of that paper.</p>"""
    return html_page("Smart Bird beside dense attention", body)


def _row(figures: Mapping[str, Figure]) -> str:
    return side_by_side([svg_figure(figure, f"{title}.") for title, figure in figures.items()])


def _layer_section(findings: Findings, layer: str) -> str:
    passage = findings.passage
    words = ", ".join(
        f"{html.escape(word)}&nbsp;({rate:.1f}{f', {count} times' if count > 1 else ''})"
        for word, rate, count in favourite_words(findings, layer)
    )
    return f"""<h3>{layer.capitalize()}</h3>
<p>The first {min(SHOWN_TOKENS, len(passage.pieces))} tokens; a dark one is drawn by the whole
passage 8 times as often as by chance at its place or more, an unmarked one no more often than
chance may give. Keys that every row must hold are left out.</p>
<blockquote>{highlighted(findings, layer)}</blockquote>
<p>Drawn most, times chance: {words or "no word more than by chance"}.</p>
<p>The stretch of {min(ARC_TOKENS, len(passage.pieces))} tokens that draw each other most, and the
{MAX_ARCS} pairs drawn most in it, the token itself aside. Arcs go from a token to a key it draws:
above the text to an earlier one, below to a later one.</p>
{svg_figure(arcs(passage, layer), f"What tokens of {layer} draw from each other.", wide=True)}"""


def _machine() -> str:
    info = build_info()
    return (
        f", on {platform.machine()} ({info['cpu_isa']} kernels) with {torch.get_num_threads()} "
        f"threads, PyTorch {html.escape(info['torch'])} and smartbird {info['version']}"
    )

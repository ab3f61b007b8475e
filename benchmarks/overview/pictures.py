"""The pictures of ``docs/pictures``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.language.attention import DENSE, ORACLE, OURS, WINDOW
from benchmarks.language.perplexity import mean_factor
from benchmarks.language.speed import ATTENTION, PREFILL, STEP
from benchmarks.overview.draw import Drawn
from benchmarks.overview.svg import Drawing, code_width
from benchmarks.overview.tables import Evidence
from benchmarks.speed.contenders import GUMBEL, SDPA
from benchmarks.speed.ratios import LEARNED_SCORES
from benchmarks.speed.results import Case

_WIDTH = 640
_MARKS = (("circle", "ours"), ("triangle", "blue"), ("square", "green"))


# ---- a sentence ---------------------------------------------------------------------------------


def _lines(pieces: Sequence[str], width: float) -> list[tuple[float, int]]:
    """Where each token stands: its x and the line it is in, broken before words."""
    places, x, line = [], 0.0, 0
    for piece in pieces:
        wide = code_width(piece)
        if x + wide > width and piece.startswith(" "):
            x, line = -code_width(" "), line + 1
        places.append((x, line))
        x += wide
    return places


def draw(drawn: Drawn, evidence: Evidence) -> str:
    """Sketch, sample, gather: the sentence three times."""
    margin, pitch, title = 16, 32, 40
    places = _lines(drawn.pieces, _WIDTH - 2 * margin)
    height = title + pitch * (1 + max(line for _, line in places)) + 6
    query = len(drawn.pieces) - 1
    last = drawn.pieces[query].strip()
    k = drawn.num_samples
    picture = Drawing(
        _WIDTH,
        3 * height + 48,
        "Sketch, sample, gather",
        f"A sentence three times, for its last word, {last!r}: each token shaded by the sketch's "
        f"probability; the {k} keys that each of {len(drawn.heads)} heads drew; and the attention "
        "of one head over its keys.",
    )
    for panel, (name, told) in enumerate(
        (
            (
                "1  Sketch",
                f"{drawn.sketch_dim} of {drawn.head_dim} features score all tokens for the last",
            ),
            ("2  Sample", f"each head draws its own {k} keys"),
            ("3  Gather", "attention over these keys alone, here of the first head"),
        )
    ):
        top = panel * height + 10
        picture.text(margin, top + 16, name, bold=True, size=14)
        picture.text(margin + 92, top + 16, told, colour="quiet")
        for i, (piece, (x, line)) in enumerate(zip(drawn.pieces, places, strict=True)):
            left, y = margin + x, top + title + pitch * line
            # The space before a word is no part of its box.
            bare = piece.lstrip()
            left += code_width(piece) - code_width(bare)
            wide = code_width(bare)
            held = any(i in keys for keys in drawn.keys)
            if panel == 0:
                share = drawn.sketch[i] / max(drawn.sketch)
                picture.box(left - 1, y - 13, wide + 2, 18, fill="blue", opacity=0.6 * share**0.5)
            elif panel == 2 and i in drawn.keys[0]:
                share = drawn.weights[drawn.keys[0].index(i)] / max(drawn.weights)
                picture.box(left - 1, y - 13, wide + 2, 18, fill="ours", opacity=0.6 * share**0.5)
            if i == query:
                picture.box(left - 2, y - 14, wide + 4, 20, stroke="ink")
            faded = (panel == 1 and not held) or (panel == 2 and i not in drawn.keys[0])
            picture.code(left, y, bare, colour="quiet" if faded and i != query else "ink")
            if panel == 1:
                having = [mark for mark, keys in zip(_MARKS, drawn.keys, strict=True) if i in keys]
                middle = left + wide / 2
                for place, (shape, colour) in enumerate(having):
                    offset = 9 * (place - (len(having) - 1) / 2)
                    picture.mark(middle + offset, y + 11, shape, colour=colour, size=3.4)
    y = 3 * height + 18
    picture.text(
        *(margin, y),
        f"{drawn.model}, layer {drawn.layer + 1}; how much of dense attention their keys hold:",
        colour="quiet",
        size=12,
    )
    for place, ((shape, colour), head, mass) in enumerate(
        zip(_MARKS, drawn.heads, drawn.mass, strict=True)
    ):
        x = margin + 5 + 130 * place
        picture.mark(x, y + 16, shape, colour=colour)
        picture.text(x + 10, y + 20, f"head {head + 1}: {mass:.0%}", colour="quiet", size=12)
    return str(picture)


# ---- axes ---------------------------------------------------------------------------------------


class _Axes:
    """A panel of a drawing, with ticks by their labels and the values they stand at."""

    def __init__(
        self,
        drawing: Drawing,
        left: float,
        top: float,
        width: float,
        height: float,
        x_ticks: Mapping[float, str],
        y_ticks: Mapping[float, str],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        logarithmic: tuple[bool, bool],
    ) -> None:
        self.drawing, self.left, self.top = drawing, left, top
        self.width, self.height, self.logarithmic = width, height, logarithmic
        self.x_range, self.y_range = x_range, y_range
        for value, label in y_ticks.items():
            _, y = self.at(x_range[0], value)
            drawing.line([(left, y), (left + width, y)])
            drawing.text(left - 6, y + 4, label, colour="quiet", size=12, anchor="end")
        for value, label in x_ticks.items():
            x, _ = self.at(value, y_range[0])
            drawing.line([(x, top + height), (x, top + height + 4)])
            drawing.text(x, top + height + 17, label, colour="quiet", size=12, anchor="middle")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point stands in the drawing."""
        shares = []
        for value, ends, log in zip(
            (x, y), (self.x_range, self.y_range), self.logarithmic, strict=True
        ):
            value, low, high = (math.log(v) if log else v for v in (value, *ends))
            shares.append((value - low) / (high - low))
        return self.left + shares[0] * self.width, self.top + (1 - shares[1]) * self.height

    def series(
        self,
        points: Sequence[tuple[float, float]],
        shape: str,
        colour: str,
        *,
        dashes: str = "",
        width: float = 2,
        size: float = 4.5,
    ) -> None:
        placed = [self.at(x, y) for x, y in points]
        self.drawing.line(placed, colour=colour, width=width, dashes=dashes)
        for x, y in placed:
            self.drawing.mark(x, y, shape, colour=colour, size=size)


def _legend(
    drawing: Drawing, x: float, y: float, entries: Sequence[tuple[str, str, str, str]]
) -> None:
    """Lines of (words, shape, colour, dashes), one below the other."""
    for place, (words, shape, colour, dashes) in enumerate(entries):
        line = y + 18 * place
        drawing.line([(x, line), (x + 28, line)], colour=colour, width=2, dashes=dashes)
        drawing.mark(x + 14, line, shape, colour=colour)
        drawing.text(x + 36, line + 4, words, size=12)


# ---- laws ---------------------------------------------------------------------------------------


def laws(drawn: Drawn, evidence: Evidence) -> str:
    """How often each method draws the keys of one row."""
    shown = 24
    order = sorted(range(len(drawn.sketch)), key=lambda j: -drawn.sketch[j])[:shown]
    top = 1.25
    picture = Drawing(
        _WIDTH,
        330,
        "How often each method draws a key",
        f"The {shown} likeliest keys of a row, from the left. Shaded bars are the probabilities of "
        f"the sketch. topk draws the first {drawn.num_samples} always and no other; gumbel and "
        "systematic draw the likeliest almost always, the others now and then; multinomial draws "
        "the likeliest more than once.",
    )
    axes = _Axes(
        picture,
        *(56, 40, _WIDTH - 80, 210),
        {i + 1: str(i + 1) for i in range(0, shown, 1) if i % 4 == 3 or i == 0},
        {tick: f"{tick:g}" for tick in (0, 0.25, 0.5, 0.75, 1)},
        (0.4, shown + 0.6),
        (0, top),
        logarithmic=(False, False),
    )
    picture.text(12, 22, "Times that a key is among the K of a draw", bold=True)
    for place, j in enumerate(order, start=1):
        x, y = axes.at(place, drawn.sketch[j])
        _, floor = axes.at(place, 0)
        picture.box(x - 8, y, 16, floor - y, fill="quiet", opacity=0.3)
    styles = {
        "gumbel": ("circle", "ours", ""),
        "systematic": ("triangle", "blue", "7 3"),
        "multinomial": ("diamond", "pink", "2 3"),
        "topk": ("square", "green", "9 3 2 3"),
    }
    for name, (shape, colour, dashes) in styles.items():
        values = drawn.inclusion[name]
        points = [(place, min(values[j], top)) for place, j in enumerate(order, start=1)]
        axes.series(points, shape, colour, dashes=dashes, width=1.5, size=3.6)
        for place, j in enumerate(order, start=1):
            if values[j] > top:  # more than the picture has room for
                x, y = axes.at(place, top)
                picture.text(x + 9, y + 5, f"{values[j]:.1f}", colour=colour, size=12)
    _legend(picture, 400, 52, [(name, *style) for name, style in styles.items()])
    picture.box(406, 52 + 18 * 4 - 7, 16, 14, fill="quiet", opacity=0.3)
    picture.text(436, 52 + 18 * 4 + 4, "probability of the sketch", size=12)
    picture.text(
        *(_WIDTH / 2, 288),
        f"keys, the likeliest first; K = {drawn.num_samples}",
        size=12,
        anchor="middle",
    )
    where = f"{drawn.model}, layer {drawn.layer + 1}, head {drawn.heads[0] + 1}"
    words = f"The last word of the sentence, {where}."
    picture.text(12, 316, words, colour="quiet", size=12)
    return str(picture)


# ---- one law ------------------------------------------------------------------------------------


def one_law(drawn: Drawn, evidence: Evidence) -> str:
    """The keys of one query, by how the call was made."""
    left, pitch, top = 220, 30, 60
    length = len(drawn.pieces)
    picture = Drawing(
        _WIDTH,
        top + pitch * len(drawn.forms) + 22,
        "One law per sequence",
        f"The {drawn.num_samples} keys that the last of {length} queries draws are the same in "
        f"each of {len(drawn.forms)} ways to compute it: {', '.join(drawn.forms)}.",
    )
    picture.text(12, 22, "Keys drawn by the last query of a sequence", bold=True)
    picture.text(12, 42, "however the sequence is computed", colour="quiet")
    step = (_WIDTH - left - 20) / length
    for place, (name, keys) in enumerate(drawn.forms.items()):
        y = top + pitch * place + 10
        picture.text(12, y + 4, name)
        picture.line([(left, y), (left + step * length, y)], width=2)
        for key in keys:
            picture.mark(left + step * (key + 0.5), y, "circle", colour="ours")
    y = top + pitch * len(drawn.forms) + 12
    picture.text(left, y, "first key", colour="quiet", size=12)
    picture.text(left + step * length, y, "last key", colour="quiet", size=12, anchor="end")
    return str(picture)


# ---- speed and quality --------------------------------------------------------------------------


def speed_and_quality(drawn: Drawn, evidence: Evidence) -> str:
    """How many times as fast as dense attention, over N; and the perplexity, over K."""
    threads = evidence.speed.environment["threads"]
    medians = {
        (t.attention, t.case): t.median
        for t in evidence.speed.timings
        if not t.missing and t.dtype == "float32"
    }

    def of_attention(backward: bool) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        for length in sorted({case.length for _, case in medians}):
            case = Case(length, backward, threads, score_std=LEARNED_SCORES)
            if (SDPA, case) in medians and (GUMBEL, case) in medians:
                found.append((length, medians[SDPA, case] / medians[GUMBEL, case]))
        return found

    def of_model(what: str) -> list[tuple[float, float]]:
        times = evidence.times(what)
        return [(n, times[n][DENSE] / times[n][OURS]) for n in sorted(times) if OURS in times[n]]

    lines = [
        ("attention, forward", "circle", "ours", "", of_attention(False)),
        ("attention, forward and backward", "square", "ours", "7 3", of_attention(True)),
        ("SmolLM2 decodes: its attention", "triangle", "blue", "7 3", of_model(ATTENTION)),
        ("SmolLM2 decodes: the whole step", "triangle", "blue", "", of_model(STEP)),
        ("SmolLM2 reads: the whole model", "diamond", "green", "", of_model(PREFILL)),
    ]
    points = [point for *_, series in lines for point in series]
    lengths = sorted({x for x, _ in points})
    fastest = max(y for _, y in points)
    picture = Drawing(
        _WIDTH,
        640,
        "Speed and quality of sampled attention",
        "Above: how many times as fast as dense attention, against the length, with sketches that "
        "have learned. Below: perplexity of SmolLM2 over that of dense attention, against K, of "
        "4096 keys.",
    )
    picture.text(12, 22, "Times as fast as dense attention, against N", bold=True)
    picture.text(
        12, 41, "learned sketches, CPU, float32; below 1 it is slower", colour="quiet", size=12
    )
    rates = [r for r in (0.5, 1, 2, 4, 8, 16, 32) if r / 2 < fastest]
    axes = _Axes(
        picture,
        *(56, 56, _WIDTH - 80, 200),
        {n: f"{n:g}" for n in lengths},
        {r: f"{r:g}x" for r in rates},
        (lengths[0] / 1.15, lengths[-1] * 1.15),
        (rates[0], rates[-1]),
        logarithmic=(True, True),
    )
    even = [axes.at(x, 1) for x in axes.x_range]
    picture.line(even, colour="ink", width=1.5)
    for _, shape, colour, dashes, series in lines:
        axes.series(series, shape, colour, dashes=dashes)
    _legend(picture, 56, 300, [line[:4] for line in lines if line[4]])

    picture.text(
        12, 414, "Perplexity of SmolLM2-135M over that of dense attention, against K", bold=True
    )
    ways = [
        ("sampled keys", "circle", "ours", "", OURS),
        ("the exact K largest scores", "diamond", "pink", "7 3", ORACLE),
        ("sinks and a window of K keys", "square", "ink", "2 3", WINDOW),
    ]
    compared = evidence.compared
    keys = sorted({x.num_samples for x in evidence.language.losses if x.num_samples})
    read: list[list[tuple[float, float]]] = [
        [
            (k, mean_factor(found))
            for k in keys
            if (found := evidence.losses(way, k, passages=compared))
        ]
        for *_, way in ways
    ]
    worst = max(y for series in read for _, y in series)
    axes = _Axes(
        picture,
        *(56, 452, _WIDTH - 80, 120),
        {k: str(k) for k in keys},
        {y: f"{y:g}" for y in (1, 1.2, 1.4, 1.6, 1.8, 2) if y < worst + 0.1},
        (keys[0] / 1.1, keys[-1] * 1.1),
        (0.98, worst + 0.04),
        logarithmic=(True, False),
    )
    n = evidence.losses(OURS, keys[0])[0].length
    words = (
        f"{n} keys, all layers, nothing trained, {len(compared)} passages; 1 is as good as dense"
    )
    picture.text(12, 433, words, colour="quiet", size=12)
    for (_, shape, colour, dashes, _), series in zip(ways, read, strict=True):
        axes.series(series, shape, colour, dashes=dashes)
    _legend(picture, 400, 470, [way[:4] for way in ways])
    picture.text(
        12,
        626,
        "Tables and machines: docs/performance.md, docs/language.md.",
        colour="quiet",
        size=12,
    )
    return str(picture)


PICTURES: dict[str, Callable[[Drawn, Evidence], str]] = {
    "draw.svg": draw,
    "laws.svg": laws,
    "one-law.svg": one_law,
    "speed-quality.svg": speed_and_quality,
}

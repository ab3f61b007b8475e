"""The tables, from what the benchmarks left in ``docs``.

A table goes between the lines ``<!-- table overview:NAME -->`` and ``<!-- end -->`` of a Markdown
file: NAME is a key of ``TABLES``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import table, update_tables
from benchmarks.language.attention import DENSE, ORACLE, OURS, OURS_KV, OURS_LATE, OURS_LAYER
from benchmarks.language.embeddings import Embeddings
from benchmarks.language.perplexity import Loss, mean_factor
from benchmarks.language.results import Results as Language
from benchmarks.language.speed import ATTENTION, PREFILL, STEP
from benchmarks.speed.contenders import DISTILL, FLEX_WINDOWS, GUMBEL, SYSTEMATIC
from benchmarks.speed.ratios import headlines
from benchmarks.speed.results import ATTENTION as ATTENTION_ALONE
from benchmarks.speed.results import Results as Speed
from benchmarks.speed.results import factor, ms

STUDIES = ("mqar", "options", "continuation", "long")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured.

    Attributes:
        speed: on this machine with its best instruction set.
        language: of a pretrained causal model.
        embeddings: of an encoder.
        studies: of layers that were trained from the start, by name, as in their JSON.
    """

    speed: Speed
    language: Language
    embeddings: Embeddings
    studies: Mapping[str, Any]

    @classmethod
    def load(cls, docs: Path) -> Evidence:
        return cls(
            Speed.load(docs / "performance" / "attention-native.json"),
            Language.load(docs / "language" / "smollm2.json"),
            Embeddings.load(docs / "language" / "minilm.json"),
            {
                name: json.loads((docs / "learning" / f"{name}.json").read_text(encoding="utf-8"))
                for name in STUDIES
            },
        )

    def accuracy(self, study: str, grid: str, **fields: Any) -> str:
        """Percent on the test split, mean and sample deviation over seeds."""
        (found,) = (one for one in self.studies[study]["grids"] if one["name"] == grid)
        wanted = {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}
        (runs,) = (one["runs"] for one in found["combinations"] if one["fields"] == wanted)
        results = self.studies[study]["runs"]
        values = [100 * results[run]["test_accuracy"] for run in runs if run in results]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    def losses(
        self, attention: str, num_samples: int, *, passages: Sequence[str] = ()
    ) -> list[Loss]:
        """Of a way to read at K, without further seeds; of these passages, or all."""
        return [
            loss
            for loss in self.language.losses
            if (loss.attention, loss.num_samples, loss.seed) == (attention, num_samples, None)
            and (not passages or loss.passage in passages)
        ]

    @property
    def compared(self) -> list[str]:
        """The passages that rivals read, too."""
        return sorted({x.passage for x in self.language.losses if x.attention == ORACLE})

    def times(self, what: str) -> dict[int, dict[str, float]]:
        """Median seconds of the pretrained model by length and attention."""
        if self.language.speed is None:
            return {}
        found: dict[int, dict[str, float]] = {}
        for one in self.language.speed.times:
            if one.what == what and one.threads == self.language.environments["speed"]["threads"]:
                found.setdefault(one.length, {})[one.attention] = one.median
        return found


# ---- README -------------------------------------------------------------------------------------

# Of the headlines of performance.md, in which a sketch that has learned stands before others.
_TOLD = (
    "trained sketch, N = 4096, forward",
    "trained sketch, N = 4096, forward + backward",
    "peaked sketch, N = 16384, forward",
    "peaked sketch, N = 16384, forward + backward",
    "one query on 100000 keys, forward",
    "a whole layer, N = 4096, forward + backward",
    "a whole model, N = 4096, forward",
    "a whole model, N = 4096, forward + backward",
)


def speed(evidence: Evidence) -> str:
    """Attention alone, and the layer and the model that it is a part of, beside dense attention."""
    rows = []
    for line in headlines(evidence.speed):
        if line.name in _TOLD and line.gumbel is not None:
            ours = [
                "-" if seconds is None else f"{ms(seconds)} ({factor(line.sdpa / seconds)})"
                for seconds in (line.systematic, line.gumbel)
            ]
            rows.append([line.name, ms(line.sdpa), *ours])
    for what, name in ((PREFILL, "SmolLM2 reads {} tokens"), (STEP, "SmolLM2 writes one after {}")):
        if times := evidence.times(what):
            length = max(times)
            dense, ours_ = (times[length].get(x) for x in (DENSE, OURS))
            if dense is not None and ours_ is not None:
                cell = f"{ms(ours_)} ({factor(dense / ours_)})"
                rows.append([name.format(length), ms(dense), cell, "-"])
    return table(["", "dense, ms", "`systematic`, ms", "`gumbel`, ms"], rows)


def losses(evidence: Evidence) -> str:
    """Rivals that were faster than ``gumbel``: by how much, and at which lengths."""
    medians = {
        (t.case, t.dtype, t.attention): t.median
        for t in evidence.speed.timings
        if not t.missing and t.case.part == ATTENTION_ALONE and t.case.lengths is None
    }
    lost: dict[str, list[tuple[int, float, float | None]]] = {}
    for (case, dtype, rival), seconds in medians.items():
        if rival.startswith((GUMBEL, SYSTEMATIC)) or DISTILL in rival:
            continue
        name = "FlexAttention, a window" if rival in FLEX_WINDOWS else rival
        gumbel, systematic = (medians.get((case, dtype, one)) for one in (GUMBEL, SYSTEMATIC))
        if gumbel is not None and seconds < gumbel:
            other = None if systematic is None else seconds / systematic
            lost.setdefault(name, []).append((case.length, seconds / gumbel, other))
    rows = []
    for name, found in lost.items():
        lengths = sorted({length for length, _, _ in found})
        columns = [[x for _, x, _ in found], [x for _, _, x in found if x is not None]]
        cells = [f"{min(x):.2f} to {max(x):.2f}" if x else "-" for x in columns]
        rows.append([name, ", ".join(map(str, lengths)), *cells])
    return table(["faster", "N", "its time over `gumbel`'s", "over `systematic`'s"], rows)


def quality(evidence: Evidence) -> str:
    """What sampled attention keeps, in sentences."""
    keys = 256
    every = evidence.losses(OURS, keys)
    lines = [
        f"**Pretrained**: SmolLM2-135M, all layers converted, {keys} of {every[0].length} keys: "
        f"{mean_factor(every):.3f} times the perplexity of dense attention "
        f"({len(every)} passages, nothing trained)"
    ]
    trained = [
        x for x in evidence.language.distilled if x.attention == OURS and x.num_samples == keys
    ]
    if trained:
        minutes = evidence.language.environments["distil"]["minutes"]
        lines[0] += f", {mean_factor(trained):.3f} after {minutes:g} minutes of `distil`"
    exact = evidence.losses(ORACLE, keys)
    ours = evidence.losses(OURS, keys, passages=evidence.compared)
    lines[0] += (
        f". On {len(exact)} of them, keeping the exact {keys} largest scores of each head gives "
        f"{mean_factor(exact):.3f} where sampling gives {mean_factor(ours):.3f}."
    )
    recall = [
        evidence.accuracy("mqar", "attention", attention=name)
        for name in ("smartbird", "dense", "random", "window")
    ]
    copied = [
        evidence.accuracy("continuation", "attention", attention=name)
        for name in ("smartbird", "dense", "random", "window")
    ]
    lines.append(
        "**Trained from the start**, 16 keys of 256: recall of pairs "
        f"{recall[0]} % right (dense {recall[1]}, random keys {recall[2]}, a window {recall[3]}); "
        f"what followed a word in real text {copied[0]} % ({copied[1]}, {copied[2]}, {copied[3]})."
    )
    return "".join(f"- {line}\n" for line in lines)


def limits(evidence: Evidence) -> str:
    """Where dense attention is the better choice, in sentences."""
    counts: dict[str, list[int]] = {}
    for answer in evidence.language.answers:
        counts.setdefault(answer.attention, []).append(answer.right)
    lines = []
    if {DENSE, OURS} <= counts.keys():
        dense, ours = (f"{sum(counts[x])} of {len(counts[x])}" for x in (DENSE, OURS))
        lines.append(
            f"**Single facts**: SmolLM2 finds {ours} planted in a long text, with dense attention "
            f"{dense}."
        )
    few = mean_factor(evidence.losses(OURS, 64))
    lines.append(f"**Few keys**: with 64 of 4096 its perplexity is {few:.3f} times the dense one.")
    times = {
        one.way.num_samples: statistics.median(one.seconds)
        for one in evidence.embeddings.times
        if not one.way.window
    }
    ratios = [times[None] / seconds for keys, seconds in times.items() if keys is not None]
    lines.append(
        "**Short texts**: an encoder of 512 tokens is slower with sampled keys, "
        f"{factor(min(ratios))} to {factor(max(ratios))} the speed of dense attention."
    )
    return "".join(f"- {line}\n" for line in lines)


# ---- settings -----------------------------------------------------------------------------------

# Name, default, study, grid, what follows, and by value the fields of a row of the grid.
_Values = Sequence[tuple[str, Mapping[str, Any]]]
_SETTINGS: Sequence[tuple[str, str, str, str, str, _Values]] = (
    (
        *("`num_samples`", "64", "options", "samples"),
        "the first thing to raise: with 4 keys three points are missing, from 8 on none",
        (
            ("4", {"attention": "smartbird", "num_samples": 4}),
            ("8", {"attention": "smartbird", "num_samples": 8}),
            ("16", {"attention": "smartbird", "num_samples": 16}),
            ("dense", {"attention": "dense"}),
        ),
    ),
    (
        *("`distill_temperature`", "0.5", "options", "sharpness"),
        "five points with few keys, other settings matter less, nothing lost elsewhere",
        tuple((f"{x:g}", {"distill_temperature": x}) for x in (0.25, 0.5, 1.0)),
    ),
    (
        *("`learning`", "distill", "options", "learning"),
        "`bias` alone fails with some seeds, `value` is no longer sparse",
        (
            ("distill", {"learning": ("distill",)}),
            ("bias", {"learning": ("bias",)}),
            ("value + bias", {"learning": ("value", "bias")}),
            ("distill + bias", {"learning": ("distill", "bias")}),
        ),
    ),
    (
        *("weight of the loss", "1", "options", "learning"),
        "0.3 to 3 are alike",
        (
            ("0.3", {"distill_weight": 0.3}),
            ("1", {"learning": ("distill",)}),
            ("3", {"distill_weight": 3.0}),
        ),
    ),
    (
        *("`num_index_heads`", "one per key/value head (here 4)", "options", "sketch"),
        "heads that share keys look at fewer of them",
        (
            ("1", {"num_index_heads": 1}),
            ("2", {"num_index_heads": 2}),
            ("4", {"sketch_dim": 16}),
        ),
    ),
    (
        *("`sketch_dim`", "16", "options", "sketch"),
        "costs in proportion to the scores of all pairs",
        tuple((str(x), {"sketch_dim": x}) for x in (8, 16, 32)),
    ),
    (
        *("`method`", "gumbel", "options", "drawing"),
        "plain sampling without replacement is the default; `systematic` is as good and faster",
        tuple((x, {"method": x}) for x in ("gumbel", "systematic")),
    ),
    (
        *("`eval_method`", "as `method`", "options", "drawing"),
        "nothing is won by another one",
        (
            ("gumbel", {"method": "gumbel"}),
            *((x, {"eval_method": x}) for x in ("systematic", "topk", "dealt")),
        ),
    ),
    (
        *("`correction`", "off", "options", "drawing"),
        "noise with few keys; on where the output must estimate dense attention",
        (("off", {"method": "gumbel"}), ("on", {"correction": True})),
    ),
    (
        *("`window`, the nearest keys held", "0", "options", "drawing"),
        "the right key is worth five points, a wrong one costs as much: for whoever knows the task",
        (("0", {"window": 0}), ("1", {"window": 1}), ("2", {"method": "gumbel"})),
    ),
    (
        *("`temperature`, `uniform_share`", "off", "options", "drawing"),
        "exploring takes the place of keys that are needed",
        (
            ("off", {"method": "gumbel"}),
            ("temperature 2", {"temperature": 2.0}),
            ("a quarter uniform", {"uniform_share": 0.25}),
        ),
    ),
    (
        *("`SampleAnneal`, `DenseWarmup`", "off", "options", "drawing"),
        "they help with very few keys, and cost time",
        (
            ("off", {"method": "gumbel"}),
            ("from 16 keys", {"anneal_samples": 16, "anneal_steps": 300}),
        ),
    ),
)


def settings(evidence: Evidence) -> str:
    """Settings of layers that are trained from the start, and the accuracy with each value."""
    rows = []
    for name, default, study, grid, follows, values in _SETTINGS:
        found = [f"{value}: {evidence.accuracy(study, grid, **fields)}" for value, fields in values]
        rows.append([name, default, "; ".join(found), follows])
    warm = evidence.accuracy("options", "learning", dense_warmup=200)
    rows[-1][2] += f"; dense for 200 of 600 steps: {warm}"
    return table(["setting", "default", "accuracy on recall, %, by value", "so"], rows)


def pretrained(evidence: Evidence) -> str:
    """Settings of ``convert``, and the perplexity with each value."""
    few = evidence.compared

    def told(attention: str, keys: int) -> str:
        return f"{mean_factor(evidence.losses(attention, keys, passages=few)):.3f}"

    steps, alone = evidence.times(STEP), evidence.times(ATTENTION)
    length = max(steps)

    def faster(attention: str) -> str:
        ratios = (times[length][DENSE] / times[length][attention] for times in (alone, steps))
        return ", ".join(factor(x) for x in ratios)

    rows = [
        [
            "`num_samples`",
            "256",
            "; ".join(f"{k}: {told(OURS, k)}" for k in (64, 128, 256, 512)),
            "-",
        ],
        [
            *("`num_sketches`", "head"),
            f"head: {told(OURS, 256)}; kv: {told(OURS_KV, 256)}; layer: {told(OURS_LAYER, 256)}",
            f"head: {faster(OURS)}; kv: {faster(OURS_KV)}",
        ],
        ["`min_length`", "as `num_samples`", "-", f"4096: {faster(OURS_LATE)}"],
    ]
    trained = [x for x in evidence.language.distilled if x.attention == OURS]
    if trained:
        keys = trained[0].num_samples
        before = mean_factor(evidence.losses(OURS, keys or 0))
        minutes = evidence.language.environments["distil"]["minutes"]
        text = f"none: {before:.3f}; {minutes:g} minutes: {mean_factor(trained):.3f}"
        rows.append([f"`distil`, at K = {keys}, all passages", "none", text, "-"])
    header = "perplexity over dense, 4096 tokens, K = 256"
    decoded = f"a token after {length}: its attention and all of it, over dense"
    return table(["setting", "default", header, decoded], rows)


TABLES: dict[str, Callable[[Evidence], str]] = {
    "speed": speed,
    "losses": losses,
    "quality": quality,
    "limits": limits,
    "settings": settings,
    "pretrained": pretrained,
}


def update_page(markdown: str, evidence: Evidence) -> str:
    """``markdown`` with its tables ``overview:NAME`` made anew; others stay.

    Raises:
        ValueError: a marker names a table that does not exist, or has no end.
    """

    def make(stem: str, name: str) -> str | None:
        if stem != "overview":
            return None
        if name not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
        return TABLES[name](evidence)

    return update_tables(markdown, make)

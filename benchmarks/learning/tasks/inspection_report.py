"""What the command `inspect` writes: pictures, a page and the numbers of one document."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common.page import (
    html_page,
    html_table,
    marked_text,
    png_figure,
    svg_figure,
    text_table,
)
from benchmarks.learning.tasks.attention import forced_keys
from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.draws import drawn_words, key_rates
from benchmarks.learning.tasks.inspection import Document, look, read_document
from benchmarks.learning.tasks.training import load_model
from smartbird.inspection import LayerKeys
from smartbird.plot import plot_heat_map, plot_recall

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_TOKENS = 400
SHOWN_KEYS = 12
LABELLED_TOKENS = 48  # as many labels can be read along an axis


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model was seen to do with a document.

    Attributes:
        config: of the model.
        document: what it read.
        layers: what each of its attention layers chose.
    """

    config: Config
    document: Document
    layers: list[LayerKeys]


def inspect(checkpoint: Path, text: Path | None, out: Path) -> Inspection:
    """Lets the model of a checkpoint read a document and writes what it looked at into `out`.

    Writes `inspection.json` (the numbers), `recall.png`, `keys.png` (not for dense attention, which
    leaves no key out) and `inspection.html`, which holds both pictures and is complete in itself.

    Args:
        checkpoint: a file of the command `train`.
        text: a document in UTF-8. None: the first sequence of the validation split.
        out: a directory, made where it is missing.

    Raises:
        RunError: the checkpoint or the text cannot be used.
        OSError: a file cannot be read or written.
    """
    model, task = load_model(checkpoint)
    document = read_document(task, text)
    found = Inspection(model.config, document, look(model, document.tokens))
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspection.json").write_text(json.dumps(numbers(found), indent=1) + "\n")
    (out / "inspection.html").write_text(page(found), encoding="utf-8")
    recall_picture(found).savefig(out / "recall.png", dpi=150)
    if (keys := keys_picture(found)) is not None:
        keys.savefig(out / "keys.png", dpi=150)
    return found


# --- Numbers ---


def numbers(found: Inspection) -> dict[str, Any]:
    """Everything measured, as plain values: shares are means over the queries of the document."""
    config = found.config
    return {
        "task": config.task,
        "attention": config.attention,
        "num_samples": _num_samples(found),
        "document": found.document.source,
        "num_tokens": len(found.document.pieces),
        "layers": [
            [
                {
                    "recall": recall,
                    "best": best,
                    "chance": chance,
                    "drawn_most": drawn_most(found, layer, head),
                }
                for head, (recall, best, chance) in enumerate(
                    zip(*(_means(x) for x in (layer.recall, layer.best, layer.chance)), strict=True)
                )
            ]
            for layer in found.layers
        ],
    }


def summary(found: Inspection) -> list[list[str]]:
    """A table of the layers, first row its head: means over heads, and the range of recall."""
    rows = [["layer", "recall", "of its heads", "best possible", "chance"]]
    for number, layer in enumerate(found.layers, start=1):
        recall, best, chance = (_means(x) for x in (layer.recall, layer.best, layer.chance))
        rows.append(
            [
                str(number),
                f"{sum(recall) / len(recall):.1%}",
                f"{min(recall):.1%} to {max(recall):.1%}",
                f"{sum(best) / len(best):.1%}",
                f"{sum(chance) / len(chance):.1%}",
            ]
        )
    return rows


def summary_table(found: Inspection) -> str:
    """The table as text."""
    return text_table(summary(found))


def drawn_most(found: Inspection, layer: LayerKeys, head: int) -> list[dict[str, Any]]:
    """The words that a head draws more than by chance, the most drawn first; none if dense."""
    rates = head_rates(found, layer, head)
    document = found.document
    return [
        {"position": position, "word": word, "times_chance": rate}
        for word, position, rate in drawn_words(document.pieces, document.begins, rates)
    ][:SHOWN_KEYS]


def head_rates(found: Inspection, layer: LayerKeys, head: int) -> list[float]:
    """Of each key and a head, see `key_rates`; all 1 for dense attention."""
    config, num_keys = found.config, len(found.document.pieces)
    if layer.indices is None:
        return [1.0] * num_keys
    return key_rates(
        head_indices(layer.indices, layer.recall.shape[1], head),
        num_keys,
        forced=forced_keys(config),
        is_causal=layer.is_causal,
    )


def head_indices(indices: Tensor, heads: int, head: int) -> Tensor:
    """[B, N, K]: the keys of one of the H heads that share the indices [B, H_i, N, K]."""
    return indices[:, head // (heads // indices.shape[1])]


def _num_samples(found: Inspection) -> int | None:
    """K; None where every layer attends to all keys."""
    return max((x.indices.shape[-1] for x in found.layers if x.indices is not None), default=None)


def _means(shares: Tensor) -> list[float]:
    """By head, the mean of [B, H, N] over the queries that count."""
    means: list[float] = shares.nanmean((0, 2)).tolist()
    return means


# --- Pictures ---


def recall_picture(found: Inspection) -> Figure:
    """Recall of every layer and head, between what is possible and what chance gives."""
    recall, best, chance = (
        torch.stack([getattr(layer, name).nanmean((0, 2)) for layer in found.layers])
        for name in ("recall", "best", "chance")
    )
    return plot_recall(recall, best=best, chance=chance)


def keys_picture(found: Inspection) -> Figure | None:
    """A heat map of the keys of every layer and head; None for dense attention."""
    pieces = found.document.pieces
    panels = {}
    for number, layer in enumerate(found.layers, start=1):
        if layer.indices is None:
            continue
        for head, recall in enumerate(_means(layer.recall)):
            title = f"layer {number}, head {head + 1}: recall {recall:.0%}"
            panels[title] = head_indices(layer.indices, layer.recall.shape[1], head)
    if not panels:
        return None
    return plot_heat_map(
        panels,
        len(pieces),
        is_causal=found.layers[0].is_causal,
        tokens=pieces if len(pieces) <= LABELLED_TOKENS else None,
        columns=found.config.heads,
    )


# --- The page ---


def page(found: Inspection) -> str:
    """The page, complete in itself."""
    config, document = found.config, found.document
    num_samples = _num_samples(found)
    num_keys = "all" if num_samples is None else f"at most {num_samples}"
    keys = keys_picture(found)
    if keys is None:
        chosen = "<p>Its attention is dense: every query sees every key, so there is no choice.</p>"
    else:
        chosen = f"""<p>One panel for each layer and head. Queries down, keys across; 1 is what
drawing all keys that a query sees alike would give.</p>
{png_figure(keys, "Which keys the queries of each layer and head draw.", wide=True)}
{"".join(_layer_section(found, number) for number in range(len(found.layers)))}"""
    body = f"""<p>A model of task {html.escape(config.task)} with attention
{html.escape(config.attention)}, {num_keys} keys for each query and head, {config.layers}
layers and {config.heads} heads, of a training of {config.steps} steps with seed {config.seed},
reads {html.escape(document.source)}: {len(document.pieces)} tokens.</p>
<h2>How much of dense attention the chosen keys hold</h2>
<p>Recall at K: the sum of dense attention's probabilities over the keys that a head chose, mean
over queries. Dense attention is the softmax of that head's own queries and keys, all valid ones.
Best possible is the recall of the K keys with the largest probabilities; chance that of as many
random keys.</p>
{html_table(summary(found))}
{svg_figure(recall_picture(found), "Recall of each layer and head.", wide=True)}
<h2>Which keys were chosen</h2>
{chosen}"""
    return html_page(f"Keys of {config.attention} attention", body)


def _layer_section(found: Inspection, number: int) -> str:
    layer, document = found.layers[number], found.document
    heads = []
    for head, recall in enumerate(_means(layer.recall)):
        most = ", ".join(
            f"{html.escape(key['word'])}&nbsp;({key['times_chance']:.1f}, at {key['position']})"
            for key in drawn_most(found, layer, head)
        )
        rates = head_rates(found, layer, head)
        text = marked_text(document.pieces, document.begins, rates, SHOWN_TOKENS)
        heads.append(
            f"""<details{" open" if head == 0 else ""}>
<summary>Head {head + 1}, recall {recall:.1%}</summary>
<blockquote>{text}</blockquote>
<p>Drawn most, times chance: {most or "no word more than by chance"}.</p>
</details>"""
        )
    return f"""<h3>Layer {number + 1}</h3>
<p class="note">The first {min(SHOWN_TOKENS, len(document.pieces))} tokens; a dark one is drawn 8
times as often as by chance at its place or more, an unmarked one no more often than chance may
give. Keys that every row must hold are left out.</p>
{"".join(heads)}"""

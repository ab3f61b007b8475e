"""Perplexity of the second half of whole passages, for each attention and number of keys."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.language.attention import (
    DENSE,
    ORACLE,
    OURS,
    OURS_KV,
    OURS_LATE,
    OURS_LAYER,
    WINDOW,
    attending,
)
from benchmarks.language.model import Passage
from smartbird.hf import convert

_ROWS = 256  # tokens whose logits are made at a time


@dataclass(frozen=True)
class Loss:
    """Of one passage that was read in one way.

    Attributes:
        kind, passage: which passage.
        length: its tokens.
        attention: how it was read.
        num_samples: K. None: dense.
        seed: of sampling. None: what ``convert`` leaves.
        loss: mean negative log likelihood of the tokens of its second half, in nats.
        dense: what it is with dense attention.
    """

    kind: str
    passage: str
    length: int
    attention: str
    num_samples: int | None
    seed: int | None
    loss: float
    dense: float

    @property
    def factor(self) -> float:
        """Perplexity over that of dense attention."""
        return math.exp(self.loss - self.dense)

    def __str__(self) -> str:
        keys = "" if self.num_samples is None else f", K = {self.num_samples}"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return (
            f"{self.passage}, {self.length} tokens, {self.attention}{keys}{seed}: "
            f"perplexity {math.exp(self.loss):.3f}, {self.factor:.4f} of dense"
        )


def mean_factor(losses: Iterable[Loss]) -> float:
    """The geometric mean: of perplexities over all tokens, where passages are equally long."""
    differences = [loss.loss - loss.dense for loss in losses]
    return math.exp(sum(differences) / len(differences))


@torch.no_grad()
def second_half_loss(model: Any, passage: Passage) -> float:
    """Mean negative log likelihood of the tokens from N / 2 on, each given all before it."""
    tokens = passage.tokens
    length = tokens.shape[1]
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    total = 0.0
    for start in range(length // 2, length, _ROWS):
        stop = min(start + _ROWS, length)
        logits = head(hidden[start - 1 : stop - 1])
        total += float(cross_entropy(logits, tokens[0, start:stop], reduction="sum"))
    return total / (length - length // 2)


def measure_perplexity(
    model: Any,
    passages: Sequence[Passage],
    num_samples: Sequence[int],
    *,
    calibration: torch.Tensor | None = None,
    rival_passages: int = 0,
    seeds: Sequence[int] = (),
    late: bool = False,
    known: Sequence[Loss] = (),
) -> Iterator[Loss]:
    """Of every passage: dense, and ours for each K; of some also the rivals and further seeds.

    Args:
        model: converted; it is left with another number of samples.
        passages: to be read whole.
        num_samples: K, each below the length of the passages.
        calibration: int64 [B, N], what a sketch for a whole layer begins with.
        rival_passages: the first so many are read by the rivals and with ``seeds`` too.
        seeds: of sampling.
        late: also ``OURS_LATE``.
        known: of another run, which are not measured again.
    """
    dense: dict[str, float] = {}
    before = {(x.passage, x.length, x.attention, x.num_samples, x.seed): x for x in known}
    layered = None
    if rival_passages > 0:
        layered = copy.deepcopy(model)
        convert(layered, num_sketches="layer", calibration=calibration)

    def read(
        some: Sequence[Passage], attention: str, keys: int | None = None, seed: int | None = None
    ) -> Iterator[Loss]:
        reader = layered if attention == OURS_LAYER else model
        with attending(reader, attention, keys, seed=seed):
            for passage in some:
                length = passage.tokens.shape[1]
                one = before.get((passage.name, length, attention, keys, seed))
                loss = second_half_loss(reader, passage) if one is None else one.loss
                compared = dense.setdefault(passage.name, loss)
                yield Loss(
                    passage.kind, passage.name, length, attention, keys, seed, loss, compared
                )

    yield from read(passages, DENSE)
    for keys in num_samples:
        yield from read(passages, OURS, keys)
        if late:
            yield from read(passages, OURS_LATE, keys)
        if rival_passages > 0:
            for rival in (OURS_KV, OURS_LAYER, ORACLE, WINDOW):
                yield from read(passages[:rival_passages], rival, keys)
            for seed in seeds:
                yield from read(passages[:rival_passages], OURS, keys, seed)

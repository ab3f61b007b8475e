"""Perplexity of the second half of whole passages, for each attention and number of keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.language.attention import DENSE, ORACLE, OURS, OURS_KV, WINDOW, attending
from benchmarks.language.model import Passage

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
    rival_passages: int,
    seeds: Sequence[int],
) -> Iterator[Loss]:
    """Of every passage: dense, and ours for each K; of some also the rivals and further seeds.

    Args:
        model: converted; it is left with another number of samples.
        passages: to be read whole.
        num_samples: K, each below the length of the passages.
        rival_passages: the first so many are read by the rivals and with ``seeds`` too.
        seeds: of sampling.
    """
    dense: dict[str, float] = {}

    def read(
        some: Sequence[Passage], attention: str, keys: int | None = None, seed: int | None = None
    ) -> Iterator[Loss]:
        with attending(model, attention, keys, seed=seed):
            for passage in some:
                loss = second_half_loss(model, passage)
                compared = dense.setdefault(passage.name, loss)
                where = passage.kind, passage.name, passage.tokens.shape[1]
                yield Loss(*where, attention, keys, seed, loss, compared)

    yield from read(passages, DENSE)
    for keys in num_samples:
        yield from read(passages, OURS, keys)
        if rival_passages > 0:
            for rival in (OURS_KV, ORACLE, WINDOW):
                yield from read(passages[:rival_passages], rival, keys)
            for seed in seeds:
                yield from read(passages[:rival_passages], OURS, keys, seed)

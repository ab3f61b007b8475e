"""ListOps: nested lists of digits under MIN, MAX, MED and sum modulo 10, to be worked out.

The long version of Tay et al., "Long Range Arena" (arXiv 2011.04006), after Nangia and Bowman
(arXiv 1804.06028).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.data import Batch, majority_share, pad, stream

MAX_DEPTH = 10
MAX_ARGUMENTS = 10
OPERATOR_PROBABILITY = 0.25
OPERATORS: tuple[tuple[str, Callable[[list[int]], int]], ...] = (
    ("[MIN", min),
    ("[MAX", max),
    ("[MED", lambda values: int(statistics.median(values))),
    ("[SM", lambda values: sum(values) % 10),
)
# Ids: 0 padding, 1 + v a digit v, then the operators, then the closing bracket.
PADDING = 0
FIRST_DIGIT = 1
FIRST_OPERATOR = FIRST_DIGIT + 10
CLOSE = FIRST_OPERATOR + len(OPERATORS)
TOKENS = ("[PAD]", *map(str, range(10)), *(name for name, _ in OPERATORS), "]")

_DATA_SEED = 0  # the examples are the same for every run


class ListOps:
    """The Long Range Arena's data: expressions of 500 to 2000 tokens (both exclusive), 10 classes.

    An expression is a digit, or, above depth 10 and with probability 1/4, an operator with 2 to 10
    arguments; a token is a digit, an operator with its opening bracket, or a closing bracket.
    96000 / 2000 / 2000 distinct expressions. `seq_len` is the upper limit of the length (exclusive)
    and a quarter of it the lower one. Generating them takes a minute or two.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "seq_len": 2000,
        "num_samples": 64,
        "layers": 4,
        "dim": 128,
        "heads": 4,
        "steps": 5000,
        "batch_size": 32,
        "lr": 1e-3,
        "eval_every": 500,
    }
    sizes: ClassVar[dict[str, int]] = {"train": 96000, "valid": 2000, "test": 2000}
    vocab_size = len(TOKENS)
    num_classes = 10
    per_position = False
    is_causal = False

    def __init__(self, config: Config) -> None:
        self.batch_size, self.seed = config.batch_size, config.seed
        expressions, values = generate(
            sum(self.sizes.values()), config.seq_len // 4, config.seq_len, _DATA_SEED
        )
        self._expressions: dict[str, list[npt.NDArray[np.uint8]]] = {}
        self._values: dict[str, npt.NDArray[np.int64]] = {}
        start = 0
        for split, size in self.sizes.items():
            self._expressions[split] = expressions[start : start + size]
            self._values[split] = values[start : start + size]
            start += size
        self.majority_accuracy = majority_share(self._values["test"])
        self.fingerprint = f"listops-1 {config.seq_len} {start}"

    def train_batch(self, step: int) -> Batch:
        """The next examples of the epoch's own shuffle; its incomplete last batch is left out."""
        size = len(self._values["train"])
        per_epoch = max(1, size // self.batch_size)
        epoch, place = divmod(step, per_epoch)
        order = stream(self.seed, epoch).permutation(size)
        return self._batch("train", order[place * self.batch_size :][: self.batch_size])

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Every example once."""
        order = np.arange(len(self._values[split]))
        for start in range(0, len(order), self.batch_size):
            yield self._batch(split, order[start : start + self.batch_size])

    def token_name(self, token: int) -> str:
        """The token as it stands in an expression."""
        return TOKENS[token]

    def _batch(self, split: str, chosen: npt.NDArray[np.int64]) -> Batch:
        tokens, key_mask = pad([self._expressions[split][i] for i in chosen], PADDING)
        return Batch(tokens, torch.from_numpy(self._values[split][chosen]), key_mask)


class ListOpsSmall(ListOps):
    """A tier for a CPU: the same grammar, 64 to 256 tokens, 20000 / 2000 / 2000 examples."""

    defaults: ClassVar[dict[str, Any]] = {
        "seq_len": 256,
        "num_samples": 16,
        "layers": 2,
        "dim": 64,
        "heads": 4,
        "steps": 3000,
        "batch_size": 32,
        "lr": 1e-3,
        "eval_every": 500,
    }
    sizes: ClassVar[dict[str, int]] = {"train": 20000, "valid": 2000, "test": 2000}


def generate(
    count: int, min_length: int, max_length: int, seed: int
) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int64]]:
    """Draws distinct expressions whose length lies strictly between the two limits.

    Args:
        count: number of expressions.
        min_length, max_length: limits in tokens, both exclusive.
        seed: of the generator.

    Returns:
        token ids (uint8 [length] each) and values (int64 [count]).

    Raises:
        ValueError: `max_length` leaves too few expressions to find `count` distinct ones.
    """
    if max_length < 32:
        raise ValueError(f"max_length (seq_len) must be at least 32, got {max_length}")
    source = random.Random(seed)
    found: dict[bytes, int] = {}
    with tqdm(total=count, desc="listops", unit="", leave=False, disable=None) as progress:
        while len(found) < count:
            tokens = bytearray()
            value = _grow(source, tokens, 1, max_length)
            key = bytes(tokens)
            if min_length < len(key) < max_length and key not in found:
                found[key] = value
                progress.update()
    return [np.frombuffer(key, dtype=np.uint8) for key in found], np.array(list(found.values()))


def _grow(source: random.Random, tokens: bytearray, depth: int, max_length: int) -> int:
    """Appends a random expression to `tokens` and returns its value.

    Gives up once `tokens` is as long as `max_length`: it will be thrown away anyway.
    """
    if depth == MAX_DEPTH or source.random() > OPERATOR_PROBABILITY:
        digit = int(10 * source.random())  # much faster than randrange, which this file lives on
        tokens.append(FIRST_DIGIT + digit)
        return digit
    place = len(tokens)
    tokens.append(FIRST_OPERATOR)
    values = []
    for _ in range(2 + int((MAX_ARGUMENTS - 1) * source.random())):
        values.append(_grow(source, tokens, depth + 1, max_length))
        if len(tokens) >= max_length:
            break
    operator = int(len(OPERATORS) * source.random())
    tokens[place] += operator
    tokens.append(CLOSE)
    return OPERATORS[operator][1](values)

"""Multi-query associative recall: key-value pairs first, then keys that ask for their values.

The task of Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models"
(arXiv 2312.04927). It is solved only by looking up content at a distance that the content decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from smartbird.tasks.config import Config
from smartbird.tasks.data import IGNORED, Batch, stream

# Power-law exponent of the gap between a pair and its question: small gaps are commoner, as
# repetitions in text are.
GAP_POWER = 0.01
EVAL_EXAMPLES = 1024
# First words of the random streams; training uses (TRAIN, seed, step), the others (split, batch).
TRAIN, VALID, TEST = range(3)


class Mqar:
    """Generated sequences of N tokens: P key-value pairs, then each key once more.

    The first 2 P positions hold key, value, key, value, ...; keys are distinct, values are drawn
    with replacement. Among the later positions, at even offsets, each key comes a second time, and
    its target there is the value it stood beside; what is left is filled with random tokens of the
    whole vocabulary. Ids below V / 2 are keys, the others values. Loss and accuracy are those of
    the P positions that ask. The model is causal.

    Recall is found soonest among few pairs. Over the first `curriculum` of the steps N and P double
    from stage to stage, from one pair up, in stages of equally many steps; B sequences of N tokens
    become 2 B of N / 2, so that no step costs more than a full one, and begin at random positions,
    so that all positions are learned from the first stage on: without that, recall from those that
    a stage adds starts at guessing again. Evaluation is at full size always.

    Raises:
        ValueError: `seq_len`, `num_pairs` and `vocab_size` do not fit together.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "seq_len": 256,
        "num_samples": 16,
        "window": 2,  # itself and the one before: a value sees its key
        "layers": 2,
        "dim": 64,
        "heads": 4,
        "dropout": 0.0,
        # From 0.02, recall stays at guessing among the values for thousands of steps.
        "embedding_std": 0.5,
        "vocab_size": 128,
        "num_pairs": 32,
        "curriculum": 0.8,
        "steps": 1000,
        "batch_size": 16,
        "lr": 3e-3,
        "eval_every": 200,
    }
    per_position = True
    is_causal = True

    def __init__(self, config: Config) -> None:
        if config.vocab_size is None or config.num_pairs is None:
            raise ValueError("mqar needs vocab_size and num_pairs, got None")
        self.seq_len, self.num_pairs = config.seq_len, config.num_pairs
        self.vocab_size = self.num_classes = config.vocab_size
        self.batch_size, self.seed = config.batch_size, config.seed
        if 4 * self.num_pairs > self.seq_len:
            raise ValueError(
                f"num_pairs must be at most seq_len / 4 = {self.seq_len // 4}, got {self.num_pairs}"
            )
        if self.vocab_size < 2 * self.num_pairs:
            raise ValueError(
                f"vocab_size must be at least 2 * num_pairs = {2 * self.num_pairs}, "
                f"got {self.vocab_size}"
            )
        self.majority_accuracy = 1.0 / (self.vocab_size - self.vocab_size // 2)
        self.fingerprint = f"mqar-1 {self.seq_len} {self.num_pairs} {self.vocab_size}"
        self._growing_steps = config.curriculum * config.steps

    def train_batch(self, step: int) -> Batch:
        """Fresh sequences for every step, shorter while the curriculum lasts."""
        random, halvings = stream(TRAIN, self.seed, step), self.halvings(step)
        count, seq_len = self.batch_size << halvings, self.seq_len >> halvings
        batch = self._generate(random, count, seq_len, self.num_pairs >> halvings)
        start = random.integers(0, self.seq_len - seq_len, count, endpoint=True)
        return dataclasses.replace(batch, start=torch.from_numpy(start))

    def halvings(self, step: int) -> int:
        """How often N and P are halved in training step `step`."""
        if step >= self._growing_steps:
            return 0
        return math.ceil((1.0 - step / self._growing_steps) * (self.num_pairs.bit_length() - 1))

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """`EVAL_EXAMPLES` sequences, the same for every seed and batch size."""
        first_word = {"valid": VALID, "test": TEST}[split]
        random = stream(first_word, 0)
        whole = self._generate(random, EVAL_EXAMPLES, self.seq_len, self.num_pairs)
        for start in range(0, EVAL_EXAMPLES, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield Batch(whole.tokens[rows], whole.targets[rows])

    def token_name(self, token: int) -> str:
        """`k3` for the key 3, `v3` for the value 3 (ids from V / 2 on are values)."""
        first_value = self.vocab_size // 2
        return f"k{token}" if token < first_value else f"v{token - first_value}"

    def _generate(self, random: np.random.Generator, count: int, seq_len: int, pairs: int) -> Batch:
        first_value = self.vocab_size // 2
        tokens = random.integers(0, self.vocab_size, (count, seq_len))
        targets = np.full((count, seq_len), IGNORED, dtype=np.int64)
        keys = _draw_distinct(random, np.ones(first_value), count, pairs)
        values = random.integers(first_value, self.vocab_size, (count, pairs))
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        gaps = np.arange(1.0, (seq_len - 2 * pairs) // 2 + 1)
        slots = _draw_distinct(random, gaps ** (GAP_POWER - 1.0), count, pairs)
        asked = 2 * pairs + 2 * slots
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def _draw_distinct(
    random: np.random.Generator, weights: npt.NDArray[np.float64], count: int, size: int
) -> npt.NDArray[np.int64]:
    """Draws [count, size]: in each row `size` distinct places, successively, by `weights`."""
    arrival = random.exponential(size=(count, len(weights))) / weights
    return np.argsort(arrival, axis=1)[:, :size]

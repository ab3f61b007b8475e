"""What tasks of recall share: sequences that end in questions, and grow while the model trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.data import SPLITS, Batch, stream

# Sequences of an evaluation: the first, but no more tokens than the second.
EVAL_EXAMPLES, EVAL_TOKENS = 1024, 2**20


class Recall:
    """Sequences of N tokens with P questions, whose answers stand earlier in the sequence.

    Loss and accuracy are those of the P positions that ask. The model is causal.

    Recall is found soonest among few candidates. Over the first `curriculum` of the steps N and P
    double from stage to stage, from one question up, in stages of equally many steps; B sequences
    of N tokens become 2 B of N / 2, so that no step costs more than a full one, and begin at random
    positions, so that all positions are learned from the first stage on: without that, recall from
    those that a stage adds starts at guessing again. Evaluation is at full size always.

    A subclass sets the attributes of `Task` that are not set here and gives `_generate`.

    Raises:
        ValueError: `vocab_size` or `num_pairs` is None, or there are more questions than N / 4.
    """

    per_position = True
    is_causal = True

    def __init__(self, config: Config) -> None:
        if config.vocab_size is None or config.num_pairs is None:
            raise ValueError(f"{config.task} needs vocab_size and num_pairs, got None")
        self.seq_len, self.num_pairs = config.seq_len, config.num_pairs
        if 4 * self.num_pairs > self.seq_len:
            raise ValueError(
                f"num_pairs must be at most seq_len / 4 = {self.seq_len // 4}, got {self.num_pairs}"
            )
        self.vocab_size = self.num_classes = config.vocab_size
        self.batch_size, self.seed = config.batch_size, config.seed
        self.num_eval = max(1, min(EVAL_EXAMPLES, EVAL_TOKENS // self.seq_len))
        self._growing_steps = config.curriculum * config.steps

    def train_batch(self, step: int) -> Batch:
        """Fresh sequences for every step, shorter while the curriculum lasts."""
        random = stream(SPLITS.index("train"), self.seed, step)
        halvings = self.halvings(step)
        count, seq_len = self.batch_size << halvings, self.seq_len >> halvings
        batch = self._generate("train", random, count, seq_len, self.num_pairs >> halvings)
        start = random.integers(0, self.seq_len - seq_len, count, endpoint=True)
        positions = start[:, None] + np.arange(seq_len)
        return dataclasses.replace(batch, positions=torch.from_numpy(positions))

    def halvings(self, step: int) -> int:
        """How often N and P are halved in training step `step`."""
        if step >= self._growing_steps:
            return 0
        return math.ceil((1.0 - step / self._growing_steps) * (self.num_pairs.bit_length() - 1))

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Some sequences of full size, the same for every seed and batch size."""
        random = stream(SPLITS.index(split), 0)
        whole = self._generate(split, random, self.num_eval, self.seq_len, self.num_pairs)
        for start in range(0, self.num_eval, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield Batch(whole.tokens[rows], whole.targets[rows])

    def _generate(
        self, split: str, random: np.random.Generator, count: int, seq_len: int, questions: int
    ) -> Batch:
        """`count` sequences of `seq_len` tokens with `questions` questions each."""
        raise NotImplementedError


def draw_distinct(
    random: np.random.Generator, weights: npt.NDArray[np.float64], size: int
) -> npt.NDArray[np.int64]:
    """Draws [count, size]: from each row of `weights`, `size` distinct places one after another.

    Places of weight 0 come last.
    """
    with np.errstate(divide="ignore"):
        arrival = random.exponential(size=weights.shape) / weights
    return np.argsort(arrival, axis=1)[:, :size]

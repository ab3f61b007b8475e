"""Multi-query associative recall: key-value pairs first, then keys that ask for their values.

The task of Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models"
(arXiv 2312.04927). It is solved only by looking up content at a distance that the content decides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.data import IGNORED, Batch
from benchmarks.learning.tasks.recall import EVAL_EXAMPLES, Recall, draw_distinct

# Power-law exponent of the gap between a pair and its question: small gaps are commoner, as
# repetitions in text are.
GAP_POWER = 0.01


class Mqar(Recall):
    """Generated sequences of N tokens: P key-value pairs, then each key once more.

    The first 2 P positions hold key, value, key, value, ...; keys are distinct, values are drawn
    with replacement. Among the later positions, at even offsets, each key comes a second time, and
    its target there is the value it stood beside; what is left is filled with random tokens of the
    whole vocabulary. Ids below V / 2 are keys, the others values.

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

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.vocab_size < 2 * self.num_pairs:
            raise ValueError(
                f"vocab_size must be at least 2 * num_pairs = {2 * self.num_pairs}, "
                f"got {self.vocab_size}"
            )
        self.majority_accuracy = 1.0 / (self.vocab_size - self.vocab_size // 2)
        # The first version evaluated as many sequences of any length.
        version = 1 if self.num_eval == EVAL_EXAMPLES else 2
        self.fingerprint = f"mqar-{version} {self.seq_len} {self.num_pairs} {self.vocab_size}"

    def token_name(self, token: int) -> str:
        """`k3` for the key 3, `v3` for the value 3 (ids from V / 2 on are values)."""
        first_value = self.vocab_size // 2
        return f"k{token}" if token < first_value else f"v{token - first_value}"

    def _generate(
        self, split: str, random: np.random.Generator, count: int, seq_len: int, questions: int
    ) -> Batch:
        first_value = self.vocab_size // 2
        tokens = random.integers(0, self.vocab_size, (count, seq_len))
        targets = np.full((count, seq_len), IGNORED, dtype=np.int64)
        keys = draw_distinct(random, np.ones((count, first_value)), questions)
        values = random.integers(first_value, self.vocab_size, (count, questions))
        tokens[:, 0 : 2 * questions : 2] = keys
        tokens[:, 1 : 2 * questions : 2] = values
        gaps = np.arange(1.0, (seq_len - 2 * questions) // 2 + 1)
        weights = np.broadcast_to(gaps ** (GAP_POWER - 1.0), (count, len(gaps)))
        slots = draw_distinct(random, weights, questions)
        asked = 2 * questions + 2 * slots
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

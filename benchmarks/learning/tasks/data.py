"""What a task gives to the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.learning.tasks.config import Config

IGNORED = -100  # target of a position without a loss; ignore_index of torch's cross_entropy
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with their targets.

    Attributes:
        tokens: int64 [B, N].
        targets: int64 [B], or [B, N] with `IGNORED` where no answer is asked.
        key_mask: bool [B, N], True where there is a token; None if there is one everywhere.
        positions: int64 [B, N], where the tokens stand; None if all rows begin at 0.
    """

    tokens: Tensor
    targets: Tensor
    key_mask: Tensor | None = None
    positions: Tensor | None = None


class Task(Protocol):
    """A data set with what a model must know about it.

    Batches are pure functions of their arguments, so a resumed run needs no state of the data.

    Attributes:
        defaults: fields of `Config` that suit the task.
        vocab_size: number of token ids.
        num_classes: number of targets.
        per_position: targets are [B, N], not [B].
        is_causal: a position may look at itself and earlier ones only.
        majority_accuracy: share of the commonest target in the test split.
        fingerprint: changes when the data does.
    """

    defaults: ClassVar[dict[str, Any]]
    vocab_size: int
    num_classes: int
    per_position: bool
    is_causal: bool
    majority_accuracy: float
    fingerprint: str

    def __init__(self, config: Config) -> None: ...

    def train_batch(self, step: int) -> Batch:
        """The batch of training step `step`."""
        ...

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Every example of `split` ("valid" or "test") once, in a fixed order."""
        ...

    def token_name(self, token: int) -> str:
        """A token id as people read it."""
        ...


def stream(*key: int) -> np.random.Generator:
    """Random numbers that depend on `key` alone; different keys are independent."""
    return np.random.default_rng(key)


def pad(
    sequences: Sequence[npt.NDArray[np.integer[Any]]], padding: int
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, longest] and their key_mask, None where nothing had to be padded."""
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.full((len(sequences), lengths.max()), padding, dtype=np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    if (lengths == lengths.max()).all():
        return torch.from_numpy(tokens), None
    return torch.from_numpy(tokens), torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])


def majority_share(labels: npt.NDArray[np.integer[Any]]) -> float:
    """Share of the commonest label."""
    return float(np.bincount(labels).max() / len(labels))

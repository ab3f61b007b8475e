"""What one training run is, as one frozen record, and the error of a run that cannot go on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from smartbird.modules import LEARNING_ROUTES

LARGEST_COUNT = 2**31 - 1  # of int32, as are the indices of keys and the threads of PyTorch


class RunError(Exception):
    """A run cannot start or go on; the message is one line that says what is wrong and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the outcome of a run.

    Two runs with equal configurations on one machine give equal weights, bit for bit. `threads`,
    `out` and the three intervals (`log_every`, `eval_every`, `checkpoint_every`) say how a run is
    carried out; see `RESUMABLE` for those that may change when it is resumed. The defaults of a
    task are those of `default_config(task)`.

    Args:
        task: a name in `smartbird.tasks.TASKS`.
        attention: a name in `smartbird.tasks.ATTENTIONS`.
        seq_len: longest sequence, in tokens (N).
        num_samples: keys per query and head (K), forced keys included; dense attention ignores it.
        window: nearest keys that are always among the K of `smartbird` and `random`.
        sketch_dim: width of the sketch (S) of `smartbird`.
        learning: how the sketch learns, of `LEARNING_ROUTES`.
        dense_warmup: steps that `smartbird` attends densely before it samples.
        layers: encoder layers.
        dim: model width.
        heads: attention heads per layer; must divide `dim`.
        dropout: probability, in [0, 1), on embeddings, attention output and feed-forward output.
        embedding_std: standard deviation of new token and position embeddings.
        vocab_size: tokens the task knows; only for tasks that have such a choice.
        num_pairs: key-value pairs per sequence; only for `mqar`.
        curriculum: share of the steps, in [0, 1], in which sequences grow to their full size; 0 for
            tasks that have no such choice.
        steps: optimizer steps.
        batch_size: sequences per step.
        lr: peak learning rate.
        seed: from 0 to 2**63 - 1; seeds the weights, the order of the training data, sampling and
            dropout. Which examples are validation and test examples does not depend on it.
        log_every, eval_every, checkpoint_every: intervals in steps.
        out: directory of the run.
        threads: threads PyTorch may use; None leaves its own choice.

    Raises:
        ValueError: a field is out of its range.
    """

    task: str
    attention: str
    seq_len: int
    num_samples: int
    window: int
    sketch_dim: int
    learning: tuple[str, ...]
    dense_warmup: int
    layers: int
    dim: int
    heads: int
    dropout: float
    embedding_std: float
    vocab_size: int | None
    num_pairs: int | None
    curriculum: float
    steps: int
    batch_size: int
    lr: float
    seed: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    out: str
    threads: int | None

    def __post_init__(self) -> None:
        for name in (
            *("seq_len", "num_samples", "sketch_dim", "layers", "dim", "heads", "steps"),
            *("batch_size", "log_every", "eval_every", "checkpoint_every", "threads"),
            *("vocab_size", "num_pairs"),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} must be from 1 to {LARGEST_COUNT}, got {value}")
        if self.window > 0 and 2 * (self.window // 2) + 1 > self.num_samples:
            raise ValueError(
                f"window must leave its keys room among num_samples={self.num_samples}, "
                f"got {self.window}"
            )
        for name in ("window", "dense_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0.0 <= self.curriculum <= 1.0:
            raise ValueError(f"curriculum must be in [0, 1], got {self.curriculum}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("lr", "embedding_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads}, dim={self.dim}")
        if unknown := set(self.learning) - set(LEARNING_ROUTES):
            raise ValueError(
                f"learning must name routes of {', '.join(LEARNING_ROUTES)}, "
                f"got {', '.join(sorted(unknown))}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that `torch.load(weights_only=True)` accepts."""
        return dataclasses.asdict(self)


# Fields that a resumed run may be given anew: they do not touch the arithmetic, except that
# another number of threads may round differently.
RESUMABLE = ("out", "threads")

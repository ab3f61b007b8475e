"""What one training run is, as one frozen record, and the error of a run that cannot go on."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from smartbird.functional import METHODS
from smartbird.nn import LEARNING_ROUTES
from smartbird.nn.attention import SKETCHES

LARGEST_COUNT = 2**31 - 1  # of int32, as are the indices of keys and the threads of PyTorch


class RunError(Exception):
    """A run cannot start or go on; the message is one line that says what is wrong and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the outcome of a run.

    Two runs with equal configurations on one machine give equal weights, bit for bit. The three
    intervals (`log_every`, `eval_every`, `checkpoint_every`) and what `RESUMABLE` lists, which may
    change when it is resumed, say how a run is carried out. The defaults of a task are those of
    `default_config(task)`. A field that has a default here came later than the first checkpoints:
    those that lack it were trained as the default says.

    What is listed from `num_sinks` to `reuse` concerns `smartbird`; other attentions ignore it, and
    `check_used` refuses it where it was asked for.

    Args:
        task: a name in `benchmarks.learning.tasks.TASKS`.
        attention: a name in `benchmarks.learning.tasks.ATTENTIONS`.
        seq_len: longest sequence, in tokens (N).
        num_samples: keys per query and head (K), forced keys included; dense attention ignores it.
        window: nearest keys that are always among the K of `smartbird` and `random`.
        num_sinks: leading keys that are always among the K.
        num_index_heads: sets of keys per query (H_i), divides `heads`; None: as many as key/value
            heads, or as sketches where those are more.
        sketch_dim: width of a sketch (S).
        num_sketches: one for the "layer", one for each key/value head ("kv") or one for each "head"
            on the side of the queries.
        method: how keys are drawn, of `METHODS`.
        eval_method: how they are drawn in evaluation, likewise; None: `method`.
        correction: whether the sample estimates dense attention.
        temperature: keys are drawn in training from sketch scores divided by it.
        uniform_share: share of the K that is drawn uniformly in training, in [0, 1).
        learning: how the sketch learns, of `LEARNING_ROUTES`.
        distill_weight: factor of the sketch's own loss.
        distill_temperature: of the attention that is distilled.
        distill_correction: whether that is an estimate of dense attention; None: `correction`.
        dense_warmup: steps that attend densely before keys are sampled.
        anneal_samples: keys per query and head at the first step, at least `num_samples`, which
            they fall to geometrically over `anneal_steps` steps; both 0: `num_samples` throughout.
        anneal_steps: see `anneal_samples`.
        share_sketch: of every so many layers the first sketches what it attends to, and the others
            draw keys of their own by the same sketch; not with the routes "bias" and "value".
        reuse: of every so many layers the first draws keys, and the others attend to the same; not
            with `correction`. Dense warm-up has no keys to reuse.
        layers: encoder layers.
        dim: model width.
        heads: attention heads per layer; must divide `dim`.
        num_kv_heads: heads of keys and values, divides `heads`; None: `heads`.
        dropout: probability, in [0, 1), on embeddings, attention output and feed-forward output.
        embedding_std: standard deviation of new token and position embeddings.
        vocab_size: tokens the task knows; only for tasks that have such a choice.
        num_pairs: questions per sequence, for `mqar` and `continuation` only: key-value pairs, or
            tokens that ask.
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
        fsdp: whether processes have a part of the weights each, by FSDP2, instead of all.
        context_parallel: processes that share the tokens of a sequence; divides their number.
        dcp: whether each process writes the weights that it has into a checkpoint of its own part,
            by torch.distributed.checkpoint, instead of the first all of them.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field is of another type.
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
    steps: int
    batch_size: int
    lr: float
    seed: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    out: str
    threads: int | None
    curriculum: float = 0.0
    num_sinks: int = 0
    num_index_heads: int | None = None
    method: str = "gumbel"
    eval_method: str | None = None
    correction: bool = False
    temperature: float = 1.0
    uniform_share: float = 0.0
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    distill_correction: bool | None = None
    anneal_samples: int = 0
    anneal_steps: int = 0
    reuse: int = 1
    share_sketch: int = 1
    num_sketches: str = "layer"
    num_kv_heads: int | None = None
    fsdp: bool = False
    context_parallel: int = 1
    dcp: bool = False

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Config).items():
            if not _is_a(getattr(self, name), hint):
                wanted = hint.__name__ if isinstance(hint, type) else hint
                raise TypeError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        for name in (
            *("seq_len", "num_samples", "sketch_dim", "layers", "dim", "heads", "steps"),
            *("batch_size", "log_every", "eval_every", "checkpoint_every", "threads"),
            *("vocab_size", "num_pairs", "num_index_heads", "reuse", "share_sketch"),
            *("num_kv_heads", "context_parallel"),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} must be from 1 to {LARGEST_COUNT}, got {value}")
        for name in ("window", "dense_warmup", "num_sinks", "anneal_samples", "anneal_steps"):
            value = getattr(self, name)
            if not 0 <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} must be from 0 to {LARGEST_COUNT}, got {value}")
        if self.anneal_samples and self.anneal_samples < self.num_samples:
            raise ValueError(
                f"anneal_samples must be 0 or at least num_samples={self.num_samples}, "
                f"got {self.anneal_samples}"
            )
        if bool(self.anneal_samples) != bool(self.anneal_steps):
            raise ValueError(
                "anneal_samples and anneal_steps must both be 0 or both not, "
                f"got {self.anneal_samples} and {self.anneal_steps}"
            )
        if self.share_sketch > 1 and set(self.learning) & {"bias", "value"}:
            raise ValueError(
                "share_sketch must be 1 with the routes bias and value, which train the layers "
                f"below a sketch, got {self.share_sketch}"
            )
        if self.reuse > 1 and self.correction:
            raise ValueError(f"reuse must be 1 with correction, got {self.reuse}")
        for name in ("method", "eval_method"):
            value = getattr(self, name)
            if value not in METHODS and (name, value) != ("eval_method", None):
                raise ValueError(f"{name} must be one of {', '.join(METHODS)}, got {value!r}")
        if self.num_sketches not in SKETCHES:
            raise ValueError(
                f"num_sketches must be one of {', '.join(SKETCHES)}, got {self.num_sketches!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0.0 <= self.curriculum <= 1.0:
            raise ValueError(f"curriculum must be in [0, 1], got {self.curriculum}")
        for name in ("dropout", "uniform_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not (math.isfinite(self.distill_weight) and self.distill_weight >= 0.0):
            raise ValueError(
                f"distill_weight must be finite and not negative, got {self.distill_weight}"
            )
        for name in ("lr", "embedding_std", "temperature", "distill_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads}, dim={self.dim}")
        if self.heads % (self.num_kv_heads or self.heads):
            raise ValueError(
                f"num_kv_heads must divide heads={self.heads}, got {self.num_kv_heads}"
            )
        if unknown := set(self.learning) - set(LEARNING_ROUTES):
            raise ValueError(
                f"learning must name routes of {', '.join(LEARNING_ROUTES)}, "
                f"got {', '.join(sorted(unknown))}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that `torch.load(weights_only=True)` accepts."""
        return dataclasses.asdict(self)


def _is_a(value: object, hint: Any) -> bool:
    """Whether `value` is of the type of a field; an int is a float, a bool is neither."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, kind) for kind in typing.get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return isinstance(value, (int, float) if hint is float else hint)


# Fields that a resumed run may be given anew: they do not touch the arithmetic, except that it may
# round differently, and more steps let it go on.
RESUMABLE = ("out", "threads", "steps", "fsdp", "context_parallel", "dcp")

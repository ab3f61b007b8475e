"""What a training does with the sketches of a model: schedules, their loss, how far they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smartbird._checks import check_count, check_int, check_scale
from smartbird._visible import Visible
from smartbird.nn.sampled import Observer, SampledAttention


class _Schedule:
    """What changes in the layers of ``model`` over the first ``steps`` steps of a training."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.steps = check_count("steps", steps, 0)
        self._steps_done = 0
        self._apply()

    def step(self) -> None:
        """Count one training step; call it after the optimizer's."""
        self._steps_done += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "steps_done": self._steps_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.steps = state_dict["steps"]
        self._steps_done = state_dict["steps_done"]
        self._apply()

    def _apply(self) -> None:
        """Set the layers to what they are after ``_steps_done`` steps."""
        raise NotImplementedError


class DenseWarmup(_Schedule):
    """Dense attention for the first steps of a training, then sampling.

    Every :class:`SampledAttention` of ``model`` attends to all valid keys, in training and in
    evaluation, and distils that dense attention into its sketch, until :meth:`step` was called
    ``steps`` times. Like a learning rate scheduler it has a ``state_dict`` to save and load.

    Args:
        model: holds the layers.
        steps: training steps to stay dense, at least 0.

    Raises:
        ValueError: ``steps`` is negative.
        TypeError: ``steps`` is no int.
    """

    def _apply(self) -> None:
        for _, layer in attention_layers(self.model):
            layer.dense = self._steps_done < self.steps


class SampleAnneal(_Schedule):
    """Many sampled keys at first, fewer with each step of a training.

    After t calls of :meth:`step` every :class:`SampledAttention` of ``model`` draws, in training
    and in evaluation, ``start * (K / start) ** (t / steps)`` keys, rounded, and from step ``steps``
    on K, the ``num_samples`` it had when this was made. Like a learning rate scheduler it has a
    ``state_dict`` to save and load. A compiled model is compiled three times in all: for the first
    number of keys, for any number, and for K.

    Args:
        model: holds the layers.
        start: ``num_samples`` of the first step, at least that of every layer.
        steps: training steps until every layer draws its own K, at least 0.

    Raises:
        ValueError: ``steps`` is negative, or ``start`` less than the ``num_samples`` of a layer.
        TypeError: ``steps`` or ``start`` is no int.
    """

    def __init__(self, model: nn.Module, start: int, steps: int) -> None:
        self._ends = [(layer, layer.num_samples) for _, layer in attention_layers(model)]
        self.start = check_count("start", start, 1)
        most = max((end for _, end in self._ends), default=start)
        if start < most:
            raise ValueError(f"start must be at least num_samples={most}, got {start}")
        super().__init__(model, steps)

    def state_dict(self) -> dict[str, int]:
        return {"start": self.start, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["start"]
        super().load_state_dict(state_dict)

    def _apply(self) -> None:
        left = 1 - self._steps_done / self.steps if self._steps_done < self.steps else 0.0
        for layer, end in self._ends:
            keys = round(end * (self.start / end) ** left)
            layer.anneal_samples(keys if left > 0 else None)


def sketch_loss(model: nn.Module) -> Tensor:
    """Collect and clear the sketch losses that the last training pass of ``model`` left.

    Add it to the training loss. It reaches what sketches were made of and nothing else. A layer
    that was called more than once since the last collection counts its last call. Losses that ride
    on an output (``loss_weight``) are taught by themselves: they are counted without a gradient,
    and not at all where the model is compiled.

    Args:
        model: holds :class:`SampledAttention` layers, compiled or not.

    Returns:
        Scalar, the sum over layers; zero where no layer has a loss.
    """
    total = None
    for name, layer in attention_layers(model):
        loss, cannot_teach = layer.take_loss()
        if loss is None:
            continue
        if cannot_teach and torch.is_grad_enabled():
            warnings.warn(
                f"{name or 'the layer'} ran without gradients, so its sketch loss cannot teach it "
                "(torch.no_grad, or torch.utils.checkpoint with use_reentrant=True?)",
                stacklevel=2,
            )
        total = loss if total is None else total + loss.to(total.device)
    if total is None:
        device = next((p.device for p in model.parameters()), None)
        total = torch.zeros((), device=device)
    return total


@dataclass
class SketchStats:
    """How far a sketch is, means over the calls of a layer within :func:`sketch_stats`.

    Attributes:
        loss: cross-entropy of the sketch against dense attention, what ``distill_loss`` gives for
            the judged rows.
        floor: the entropy of that attention, the least the loss can be.
        mass: of dense attention that the drawn keys of a head hold; 1 while a layer is dense.
    """

    loss: float = 0.0
    floor: float = 0.0
    mass: float = 0.0
    calls: int = 0

    @property
    def excess(self) -> float:
        """``loss - floor``, which is 0 where the sketch has learned all."""
        return self.loss - self.floor

    def add(self, loss: float, floor: float, mass: float) -> None:
        self.calls += 1
        self.loss += (loss - self.loss) / self.calls
        self.floor += (floor - self.floor) / self.calls
        self.mass += (mass - self.mass) / self.calls


@contextmanager
def sketch_stats(model: nn.Module, *, rows: int = 64) -> Iterator[dict[str, SketchStats]]:
    """Judge the sketches of ``model`` against dense attention while the context is open.

    ``with sketch_stats(model) as stats: model(tokens)`` leaves in ``stats`` the
    :class:`SketchStats` of each :class:`SampledAttention` that was called, by its name in
    ``model``, in training and in evaluation mode. Compiled models run without their graphs
    meanwhile. Outside of the context nothing is computed.

    Args:
        model: holds the layers.
        rows: queries of each call that are judged, spread evenly; all heads of one sequence (or
            pack) attend densely from them at a time, in float32.

    Raises:
        ValueError, TypeError: ``rows`` is not a positive int.
    """
    rows = check_count("rows", rows, 1)
    stats: dict[str, SketchStats] = {}
    with observed(model, lambda name, layer: partial(judge, stats, name, layer, rows)):
        yield stats


@contextmanager
def observed(
    model: nn.Module, observer: Callable[[str, SampledAttention], Observer]
) -> Iterator[None]:
    """Show the calls of the layers of ``model`` to an observer of each, beside those it has.

    Compiled models run without their graphs meanwhile.
    """
    layers = list(attention_layers(model))
    before = [layer.observer for _, layer in layers]
    for name, layer in layers:
        layer.observer = _both(layer.observer, observer(name, layer))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (_, layer), previous in zip(layers, before, strict=True):
            layer.observer = previous


def _both(first: Observer | None, second: Observer) -> Observer:
    def observe(*call: Any) -> None:
        if first is not None:
            first(*call)
        second(*call)

    return observe


@torch.no_grad()
def judge(
    stats: dict[str, SketchStats],
    name: str,
    layer: SampledAttention,
    num_rows: int,
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    visible: Visible,
    indices: Tensor | None,
) -> None:
    """Add a call of a layer, as its observer is told of it, to ``stats``."""
    num_rows = min(num_rows, visible.num_queries)
    row = torch.linspace(0, visible.num_queries - 1, num_rows, device=q.device).long()
    q, q_sketch = (x.index_select(2, row).float() for x in (q, q_sketch))
    seen = visible.at_rows(row)
    # [B, R, M]: the keys that a row sees, and those of them that it is not forced to hold.
    every_key = torch.arange(visible.num_keys, dtype=torch.int32, device=q.device)
    every_key = every_key.expand(visible.batch, 1, num_rows, -1)
    valid, free = (rows.free_slots(every_key).squeeze(1) for rows in (seen.free(), seen.residual()))
    scale = check_scale("scale", layer.scale, q.shape[3])
    sketch_scale = check_scale("sketch_scale", layer.sketch_scale, q_sketch.shape[3])

    sums = torch.zeros(3, device=q.device)
    counts = torch.zeros(2, device=q.device)
    for b in range(visible.batch):  # the scores of one sequence at a time
        logits = scale * _products(q[b], k[b].float())
        judged, judged_free = valid[b].any(-1), free[b].any(-1)
        mass = torch.ones_like(logits[..., 0])
        if indices is not None:
            attention = _softmax(logits, valid[b])
            mass = (attention * _held(indices[b, :, row], logits)).sum(-1)
        target = _softmax(logits / layer.distill_temperature, free[b])
        target = torch.unflatten(target, 0, (q_sketch.shape[1], -1)).mean(1)
        scores = sketch_scale * _products(q_sketch[b], k_sketch[b].float())
        log_p = scores.masked_fill(~free[b], -torch.inf).log_softmax(-1)
        loss = -torch.where(target > 0, target * log_p, 0.0).sum(-1)
        floor = torch.special.entr(target).sum(-1)
        sums += torch.stack(
            [
                loss[:, judged_free].mean(0).sum(),
                floor[:, judged_free].mean(0).sum(),
                mass[:, judged].mean(0).sum(),
            ]
        )
        counts += torch.stack([judged_free.sum(), judged.sum()])
    loss_sum, floor_sum, mass_sum = sums.tolist()
    num_free, num_valid = (max(count, 1.0) for count in counts.tolist())
    stats.setdefault(name, SketchStats()).add(
        loss_sum / num_free, floor_sum / num_free, mass_sum / num_valid
    )


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [H, R, D] times k [H_kv, M, D], [H, R, M]."""
    return q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).mT


def _softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Over the valid of the last dimension; zeros where there are none."""
    return logits.masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num(0.0)


def _held(indices: Tensor, logits: Tensor) -> Tensor:
    """bool [H, R, M]: which keys the indices [H_i, R, K] of the heads name."""
    num_keys = logits.shape[-1]
    held = logits.new_zeros((*indices.shape[:2], num_keys + 1), dtype=torch.bool)
    held = held.scatter(-1, indices.long().masked_fill(indices < 0, num_keys), True)
    return held[..., :-1].repeat_interleave(logits.shape[0] // indices.shape[0], 0)


def seed_evaluation(model: nn.Module, seed: int) -> None:
    """Choose what the layers of ``model`` draw in evaluation mode: another ``seed``, another draw.

    Layers differ from each other in their draws, which those of a new model do not. A seed is no
    part of the ``state_dict``, and a compiled model is compiled anew for another one.

    Raises:
        ValueError: ``seed`` is not an int64.
        TypeError: ``seed`` is no int.
    """
    seed = check_int("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be between -2^63 and 2^63 - 1, got {seed}")
    for position, (_, layer) in enumerate(attention_layers(model)):
        layer.eval_seed = (seed, position)


def attention_layers(model: nn.Module) -> Iterator[tuple[str, SampledAttention]]:
    """The layers that draw keys, and their names."""
    for name, module in model.named_modules():
        if isinstance(module, SampledAttention):
            yield name, module

"""distil: sketches learn which keys their pretrained model looks at."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from smartbird._checks import check_count, check_int, check_positive, default_index_heads
from smartbird._visible import Visible
from smartbird.functional import attend
from smartbird.hf.attention import SketchedAttention, select_rows
from smartbird.hf.conversion import (
    Batch,
    LayerReport,
    check_samples,
    children,
    read,
    record_of,
    report,
)
from smartbird.hf.files import check_base, fingerprints
from smartbird.hf.mask import Run
from smartbird.nn import SampledAttention, SketchStats
from smartbird.nn.training import judge
from smartbird.ops.distill import distill

FORMAT = 1
SECONDS = 60.0  # between two writings of a checkpoint
SHOWN = 16  # queries of a step that the progress bar judges


def distil(
    model: Any,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-2,
    rows: int = 32,
    updates: int = 8,
    dense_steps: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
) -> list[LayerReport]:
    """Teach the sketches of a converted model which keys its attention looks at, in place.

    Each step the model reads a batch without gradients, and the sketches of every converted module
    take some steps of Adam against :func:`smartbird.ops.distill_loss` of that module's own queries
    and keys, for a few queries each. So nothing goes backward through the model, whose parameters
    stay as they are, and no more than one module's queries and keys are kept. In the first
    ``dense_steps`` steps the model attends densely, then by its sketches, which so meet the queries
    and keys that errors of the layers below have changed; what they are taught is dense attention
    in either case. The learning rate falls to zero over the steps. Sketches of a model in half
    precision are taught in float32 and rounded at the end.

    Padding is left out. Queries that attend to all their keys (``min_length``) teach nothing.

    With ``checkpoint`` a training that was stopped goes on as if it had not been, to the last bit:
    call again with the same arguments, and ``batches`` that give the same from the first on; what
    was read before is passed over. The file is written every minute, at the end and where an
    exception, such as KeyboardInterrupt, ends the training.

    Args:
        model: converted by :func:`smartbird.hf.convert`, whose settings stay.
        batches: tokens, int64 [B, N], or what else the base model takes by name, such as
            ``{"input_ids": ..., "attention_mask": ...}`` (``labels`` are left out). Sequences must
            be longer than ``min_length`` and should be as long as those that the model is for: what
            sketches learn of 1024 tokens helps little beyond. They are gone through again where
            they end before ``steps``.
        steps: batches to read, at least 1.
        lr: learning rate of the first step.
        rows: queries of a sequence that an update judges, drawn at random.
        updates: of the sketches in a step, each with other queries: reading a batch takes longer.
        dense_steps: leading steps with dense attention. None: half of them.
        seed: of the queries that are drawn.
        checkpoint: a file. None: none is written.

    Returns:
        What :func:`smartbird.hf.report` says of the last batch.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range; ``model`` is not converted, or attends densely for
            now; ``batches`` are empty, or an iterator that ends before ``steps``, or hold no query
            that samples its keys; ``checkpoint`` is of another model or of other settings.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be an iterable of batches, got a {type(batches).__name__}")
    settings: dict[str, Any] = {
        "convert": record_of(model).settings,
        "steps": check_count("steps", steps, 1),
        "lr": check_positive("lr", lr),
        "rows": check_count("rows", rows, 1),
        "updates": check_count("updates", updates, 1),
        "dense_steps": (
            (steps + 1) // 2 if dense_steps is None else check_count("dense_steps", dense_steps, 0)
        ),
        "seed": check_int("seed", seed),
    }
    check_samples(model)
    sketches = dict(children(model))
    before = {
        name: (child.q_weight.dtype, child.q_weight.requires_grad, child.attention.dense)
        for name, child in sketches.items()
    }
    path = None if checkpoint is None else Path(checkpoint)
    try:
        for child in sketches.values():
            child.to(torch.promote_types(child.q_weight.dtype, torch.float32)).requires_grad_(True)
        last = _Teaching(model, sketches, settings, path).run(_endless(batches))
    finally:
        for name, child in sketches.items():
            dtype, requires_grad, child.attention.dense = before[name]
            child.to(dtype).requires_grad_(requires_grad)
            child.zero_grad()
    return report(model, last)


class _Teaching:
    """A training and its state.

    Args:
        model: converted.
        sketches: of its modules, by name, in the dtype that they learn in.
        settings: as :func:`distil` checked them.
        path: of the checkpoint.
    """

    def __init__(
        self,
        model: Any,
        sketches: dict[str, SketchedAttention],
        settings: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.model, self.sketches, self.settings, self.path = model, sketches, settings, path
        self.optimizers = {name: Adam(child.parameters()) for name, child in sketches.items()}
        self.generator = torch.Generator().manual_seed(settings["seed"])
        self.step = 0
        # A checkpoint is of the last step that was finished, wherever a later one was stopped.
        self.finished: dict[str, Any] = {}
        if path is not None:
            self.base = fingerprints(model, model.state_dict())
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._load(path)
            self.finished = self._state()

    def run(self, batches: Iterator[Batch]) -> Batch:
        """Take the steps that are left, and return the last batch."""
        steps = self.settings["steps"]
        written = time.monotonic()
        bar = tqdm(total=steps, initial=self.step, desc="distil", unit="step", disable=None)
        try:
            for place, batch in enumerate(islice(batches, steps)):
                if place < self.step:
                    continue
                self._read(batch, bar)
                self.step += 1
                bar.update()
                if self.path is not None:
                    self.finished = self._state()
                    if time.monotonic() - written > SECONDS:
                        self._save(self.path)
                        written = time.monotonic()
        finally:
            bar.close()
            if self.path is not None:
                self._save(self.path)
        return batch

    def _read(self, batch: Batch, bar: tqdm[Any]) -> None:
        """One step: every module teaches its sketches when its queries and keys come."""
        settings, taught = self.settings, []
        stats: dict[str, SketchStats] = {}
        shown = None if bar.disable else stats

        def hook(name: str, child: SketchedAttention, args: Any, keywords: Any) -> None:
            q, k, _, mask = args
            cu_seqlens = keywords["cu_seqlens"]
            runs = mask.runs if cu_seqlens is None else mask.packed_runs(cu_seqlens)
            sequences = _sequences(child, q, k, runs, mask.is_causal)
            if sequences:
                taught.append(name)
                self._teach(name, sequences, shown)

        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = settings["lr"] * (1 - self.step / settings["steps"])
        hooks = []
        for name, child in self.sketches.items():
            child.attention.dense = self.step < settings["dense_steps"]
            hooks.append(child.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        try:
            read(self.model, batch)
        finally:
            for one in hooks:
                one.remove()
        if not taught:
            raise ValueError(
                "batches must hold sequences longer than min_length="
                f"{settings['convert']['min_length']}, whose queries sample their keys, got one "
                "without"
            )
        if stats:
            loss, mass = (
                sum(getattr(one, what) for one in stats.values()) / len(stats)
                for what in ("excess", "mass")
            )
            bar.set_postfix(loss=f"{loss:.3f}", mass=f"{mass:.3f}", refresh=False)

    def _teach(
        self, name: str, sequences: list[_Sequences], shown: dict[str, SketchStats] | None
    ) -> None:
        """The updates of the sketches of one module."""
        child, optimizer = self.sketches[name], self.optimizers[name]
        core = child.attention
        for update in range(self.settings["updates"], 0, -1):
            losses, judged = [], 0
            for some in sequences:
                chosen = torch.randperm(some.rows.numel(), generator=self.generator)
                chosen = chosen[: self.settings["rows"]].sort().values
                rows = some.rows[chosen.to(some.rows.device)]
                q, visible = some.q.index_select(2, rows), some.visible.at_rows(rows)
                # In the sketches' own dtype, whatever the caller computes in.
                with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                    q_sketch, k_sketch = child.sketch_queries(q), child.sketch_keys(some.k)
                    loss = distill(
                        *(q, some.k, q_sketch, k_sketch),
                        visible,
                        scale=core.scale,
                        sketch_scale=core.sketch_scale,
                        reduction="sum",
                    )
                losses.append(loss)
                judged += q_sketch.shape[:3].numel()
                if shown is not None and update == 1:
                    call = q, some.k, q_sketch.detach(), k_sketch.detach()
                    drawn = _drawn(core, *call, visible)
                    judge(shown, name, core, SHOWN, *call, visible, drawn)
            optimizer.zero_grad()
            with torch.enable_grad():
                torch.autograd.backward(torch.stack(losses).sum() / judged)
            optimizer.step()

    # ---- the checkpoint ----

    def _state(self) -> dict[str, Any]:
        """A copy of all that the next step needs."""
        weights = {name: child.state_dict() for name, child in self.sketches.items()}
        state = {
            "step": self.step,
            "weights": weights,
            "optimizers": {name: one.state_dict() for name, one in self.optimizers.items()},
            "generator": self.generator.get_state(),
        }
        return copy.deepcopy(state)

    def _save(self, path: Path) -> None:
        whole = {"format": FORMAT, "settings": self.settings, "base": self.base, **self.finished}
        part = path.with_name(f"{path.name}.part")
        torch.save(whole, part)
        os.replace(part, path)

    def _load(self, path: Path) -> None:
        state = None
        if is_zipfile(path):  # as files of torch are
            with suppress(RuntimeError, UnpicklingError):  # of another program
                state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"checkpoint must be a file that distil wrote, got {path}")
        check_base(self.model, state["base"])
        for name, here in self.settings.items():
            if state["settings"][name] != here:
                raise ValueError(
                    f"checkpoint must be of the same settings, but {path} was written with "
                    f"{name}={state['settings'][name]!r}, and this is {name}={here!r}"
                )
        for name, child in self.sketches.items():
            child.load_state_dict(state["weights"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


@dataclass(frozen=True)
class _Sequences:
    """Sequences of a call that lie alike, and which of their queries sample their keys.

    Attributes:
        q: [B, H, N, D], in the dtype of the sketches.
        k: [B, H_kv, M, D].
        visible: of these.
        rows: int64 [R], ascending, at least one.
    """

    q: Tensor
    k: Tensor
    visible: Visible
    rows: Tensor


def _sequences(
    child: SketchedAttention, q: Tensor, k: Tensor, runs: Iterable[Run], is_causal: bool
) -> list[_Sequences]:
    """Of a call of ``child``, those with queries that sample their keys."""
    found = []
    for run in runs:
        one_q, one_k = (
            select_rows(x, run.batch, rows).to(child.q_weight.dtype)
            for x, rows in ((q, run.queries), (k, run.keys))
        )
        sizes = one_q.shape[0], one_q.shape[2], one_k.shape[2]
        visible = child.attention.visible(*sizes, q.device, is_causal=is_causal)
        positions = visible.query_positions()[0]
        last = positions if is_causal else torch.full_like(positions, sizes[2])
        rows = (last >= child.min_length).nonzero().squeeze(-1)
        if rows.numel() > 0:
            found.append(_Sequences(one_q, one_k, visible, rows))
    return found


def _drawn(
    layer: SampledAttention,
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    visible: Visible,
) -> Tensor | None:
    """The keys that a layer draws, whether it is dense for now or not."""
    return attend(
        *(q, k, k, q_sketch, k_sketch, layer.num_samples),
        visible,
        num_index_heads=default_index_heads(k.shape[1], q_sketch.shape[1]),
        method=layer.method,
        sketch_scale=layer.sketch_scale,
        seed=torch.tensor(layer.eval_seed, device=q.device),
        need_indices=True,
    ).indices


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches again and again."""
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise ValueError(
                "batches must hold as many batches as steps, or be gone through again by iter(), "
                "got an iterable that ends"
            )

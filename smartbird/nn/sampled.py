"""Sampled attention without projections: what layers and models put theirs around."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from smartbird._checks import (
    can_look,
    check_count,
    check_dropout,
    check_finite,
    check_flag,
    check_indices,
    check_inputs,
    check_number,
    check_positive,
    check_same_tokens,
    check_scale,
    check_sketches,
    check_tensor,
    default_index_heads,
    draw_seed,
)
from smartbird._visible import Visible, check_room, check_visible
from smartbird.functional import METHODS, attend, attend_densely
from smartbird.nn._layout import Layout, enter_indices, leave_indices, pack
from smartbird.ops.distill import distill

if TYPE_CHECKING:
    from smartbird.distributed import ContextParallel
    from smartbird.distributed._call import ShardedCall

_LOST_LOSS = (
    "a later pass replaced a sketch loss that nobody had collected, so it taught nothing: add "
    "smartbird.sketch_loss(model) to the training loss of each pass, or give the layers "
    "loss_weight, so that their losses ride on the output"
)
_LOSS_IN_VMAP = (
    "a sketch loss that is kept within torch.vmap cannot be collected outside of it: give the "
    "layers loss_weight, so that their losses ride on the output"
)
_told: set[str] = set()  # what this process was warned of

# Called with q, k, q_sketch, k_sketch, what rows see, and the keys drawn (None while dense).
Observer = Callable[[Tensor, Tensor, Tensor, Tensor, Visible, Tensor | None], None]


class SamplingOptions(TypedDict, total=False):
    """The keywords of :class:`SampledAttention` that the layers made of it hand on."""

    num_samples: int
    num_index_heads: int | None
    method: str
    eval_method: str | None
    correction: bool
    temperature: float
    uniform_share: float
    is_causal: bool
    window: int
    num_sinks: int
    dropout: float
    distill_temperature: float
    distill_correction: bool | None
    distill_rows: int | None
    loss_weight: float | None


class CallOptions(TypedDict, total=False):
    """The keywords of :meth:`SampledAttention.forward` but the last."""

    key_mask: Tensor | None
    query_mask: Tensor | None
    global_mask: Tensor | None
    query_offset: int | Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sequence_ids: Tensor | None
    first_head: int
    is_causal: bool | None
    indices: Tensor | None
    bias_sketch: tuple[Tensor, Tensor] | None


class SampledAttention(nn.Module):
    """Multi-head attention over keys that sketches sample (arXiv 2108.09193), without projections.

    For queries, keys, values and sketches made elsewhere; it has no parameters.
    :class:`smartbird.SmartBirdAttention` is this with projections around it.

    In training mode each call draws from PyTorch's global generator. In evaluation mode the draw is
    a function of the sequence: it uses the seed that :func:`smartbird.seed_evaluation` sets, and
    neither the place in the batch nor batch mates nor padding change anything. ``temperature`` and
    ``uniform_share`` make training explore keys that the sketch does not favour; evaluation draws
    without them.

    Which keys are drawn has no gradient. In training mode a sketch learns by **distillation**: the
    cross-entropy of its distribution, normalised over all valid keys, against the softmax of q . k
    over the drawn ones. Forced keys are left out of both, as they are held anyhow. The loss has a
    gradient for q_sketch and k_sketch only. Without ``loss_weight`` it waits for
    :func:`smartbird.sketch_loss`. With it the loss **rides on the output**: the output is
    unchanged, and whatever is computed from it hands the loss a gradient of ``loss_weight`` in the
    backward pass. Nothing then has to be collected, so that DistributedDataParallel (also with
    ``find_unused_parameters``), FSDP, activation checkpointing, ``torch.compile`` and
    ``torch.vmap`` need nothing more. That gradient does not depend on what becomes of the output:
    where the training loss is divided by the number of accumulated batches, divide ``loss_weight``,
    too, and where a ``GradScaler`` multiplies the training loss, set the attribute ``loss_weight``
    to ``weight * scaler.get_scale()`` before the forward pass. A loss that is left behind, as a
    later pass replaces it or ``torch.vmap`` ends, is warned of once; compiled graphs cannot warn.

    Args:
        num_heads: H.
        num_kv_heads: H_kv, divides H. None: H.
        num_samples: K, keys per query and index head.
        num_index_heads: H_i, sets of keys drawn per query, divides H; the number of sketches given
            in a call divides it. None: the least common multiple of H_kv and that number, so that
            heads which share keys and sketch share what is drawn.
        method: how keys are drawn, one of ``smartbird.functional.METHODS``.
        eval_method: how they are drawn in evaluation mode. None: ``method``.
        correction: estimate dense attention from the sample, see
            ``smartbird.functional.smart_bird_attention``.
        temperature: keys are drawn from the softmax of the sketch scores divided by it in training;
            above 1 it flattens. The sketch's loss does not divide by it.
        uniform_share: share of the K places, rounded down, that keys drawn uniformly take in
            training, in [0, 1); forced keys need room among the others. A place whose key the
            sketch draws as well stays empty. The inclusion probabilities of the two draws together
            are not known, so no correction goes with it.
        is_causal: a query sees the keys up to its position.
        window: keys nearest the query that are always among its K.
        num_sinks: leading valid keys that are always among the K.
        dropout: probability of dropping an attention weight in training, in [0, 1).
        scale: of the attention logits. None: ``D ** -0.5``.
        sketch_scale: of the sketch scores. None: ``S ** -0.5``.
        distill: whether the sketch learns by distillation.
        distill_temperature: the distilled attention is the softmax of q . k * scale divided by it.
            Below 1 it is sharper than what the heads compute, so that fewer draws go to keys that
            hardly count: see docs/learning.md.
        distill_correction: distil the estimate of dense attention, as ``correction`` makes it,
            instead of attention restricted to the sample. None: ``correction``.
        distill_rows: how many queries of a call, drawn at random, are judged. None: all.
        loss_weight: the loss rides on the output with this weight. None: it waits to be collected.

    Attributes:
        num_samples: K as above; :class:`smartbird.SampleAnneal` changes it.
        dense: attend to every valid key instead of a sample; :class:`smartbird.DenseWarmup` sets
            it.
        eval_seed: (seed, offset) of the draws in evaluation mode.
        context: where the tokens of a sequence lie on several ranks;
            :class:`smartbird.distributed.ContextParallel` sets it.

    Raises:
        ValueError: sizes that do not divide, or a value out of its range, by name.
        TypeError: an argument of another type, by name.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        num_samples: int = 64,
        num_index_heads: int | None = None,
        method: str = "gumbel",
        eval_method: str | None = None,
        correction: bool = False,
        temperature: float = 1.0,
        uniform_share: float = 0.0,
        is_causal: bool = False,
        window: int = 0,
        num_sinks: int = 0,
        dropout: float = 0.0,
        scale: float | None = None,
        sketch_scale: float | None = None,
        distill: bool = True,
        distill_temperature: float = 0.5,
        distill_correction: bool | None = None,
        distill_rows: int | None = None,
        loss_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = check_count("num_heads", num_heads, 1)
        self.num_kv_heads = check_kv_heads(num_kv_heads, num_heads)
        self.num_index_heads = (
            None
            if num_index_heads is None
            else _divisor("num_index_heads", num_index_heads, num_heads)
        )
        self.method, self.eval_method = method, eval_method
        for name, choice in {"method": method, "eval_method": eval_method}.items():
            if choice not in METHODS and (name, choice) != ("eval_method", None):
                raise ValueError(f"{name} must be one of {', '.join(METHODS)}, got {choice!r}")
        self.correction = check_flag("correction", correction)
        self.temperature = check_positive("temperature", temperature)
        self.uniform_share = check_number("uniform_share", uniform_share)
        if not 0.0 <= self.uniform_share < 1.0:
            raise ValueError(f"uniform_share must be in [0, 1), got {uniform_share}")
        self.is_causal = check_flag("is_causal", is_causal)
        self.window = check_count("window", window, 0)
        self.num_sinks = check_count("num_sinks", num_sinks, 0)
        self.dropout = check_dropout(dropout, "dropout")
        self.scale = None if scale is None else check_finite("scale", scale)
        self.sketch_scale = (
            None if sketch_scale is None else check_finite("sketch_scale", sketch_scale)
        )
        self.distill = check_flag("distill", distill)
        self.distill_temperature = check_positive("distill_temperature", distill_temperature)
        self.distill_correction = (
            self.correction
            if distill_correction is None
            else check_flag("distill_correction", distill_correction)
        )
        self.distill_rows = (
            None if distill_rows is None else check_count("distill_rows", distill_rows, 1)
        )
        self.loss_weight = None if loss_weight is None else check_finite("loss_weight", loss_weight)
        self.num_samples = num_samples
        check_room(
            self.num_samples - self._num_uniform(self.num_samples),
            self.window,
            self.num_sinks,
            self.is_causal,
        )
        if self.uniform_share > 0.0 and (self.correction or self.distill_correction):
            raise ValueError(
                "uniform_share must be 0 with correction or distill_correction, as uniform keys "
                f"have no inclusion probabilities, got {uniform_share}"
            )
        self.dense = False
        # Integers, not a buffer: a tensor that is not in the state_dict would be left undefined
        # where a model is made without memory and loaded.
        self.eval_seed = (0, 0)
        self.observer: Observer | None = None
        self.context: ContextParallel | None = None
        self._loss: Tensor | None = None
        self._loss_has_no_graph = False

    @property
    def num_samples(self) -> int:
        return self._num_samples if self._annealed is None else self._annealed.shape[0]

    @num_samples.setter
    def num_samples(self, num_samples: int) -> None:
        self._num_samples = check_count("num_samples", num_samples, 1)
        self.anneal_samples(None)

    def anneal_samples(self, num_samples: int | None) -> None:
        """Draw so many keys for now; None: as many as ``num_samples`` was set to."""
        if num_samples is not None:
            num_samples = check_count("num_samples", num_samples, 1)
        # The size of an empty tensor. torch.compile takes an attribute of a module for a constant
        # and compiles anew for each value, but the second size of a tensor for a variable.
        self._annealed = None if num_samples is None else torch.empty(num_samples, 0, device="cpu")

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        *,
        return_indices: Literal[False] = ...,
        **options: Unpack[CallOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        *,
        return_indices: Literal[True],
        **options: Unpack[CallOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        *,
        return_indices: bool,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        query_offset: int | Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        first_head: int = 0,
        is_causal: bool | None = None,
        indices: Tensor | None = None,
        bias_sketch: tuple[Tensor, Tensor] | None = None,
        return_indices: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``q`` to ``k`` and ``v``.

        Args:
            q: [B, H, N, D], floating point.
            k: [B, H_kv, M, D], dtype of ``q``.
            v: [B, H_kv, M, Dv], dtype of ``q``.
            q_sketch: [B, N, S], or [B, H_s, N, S] with H_s a divisor of H_i.
            k_sketch: [B, M, S], or [B, H_ks, M, S] with H_ks a divisor of H_s.
            key_mask: bool [B, M], True where a key may be attended.
            query_mask: bool [B, N], True where a query is real; the others give zeros and cost
                nothing. Tokens that the two masks leave out are taken out before anything is
                computed, so that padding on either side changes no number. In self-attention give
                one mask as both.
            global_mask: bool [B, M], True for keys that every query which sees them must hold.
            query_offset: position of query 0, int or int64 [B] (packed: [n]). None: M - N.
            cu_seqlens_q, cu_seqlens_k: int32 [n + 1], where packed sequences begin and end.
            sequence_ids: int64 [B] (packed: [n]) of sequences, which their draws follow. None:
                0, 1, ... in training, 0 for all in evaluation.
            first_head: number of index head 0, where a call has a part of the heads.
            is_causal: in place of the module's own setting. None: that setting.
            indices: keys to attend to, int32 [B, H_i, N, K] with any H_i that divides H and any K,
                -1 in unused places. Neither masks nor causality are applied to them, nothing is
                drawn and there is no loss. (With ``query_mask`` those that ``key_mask`` leaves out
                do not exist.) None: drawn.
            bias_sketch: (q_sketch, k_sketch) whose scores are added to the logits of attended
                pairs, so that they learn from the output.
            return_indices: also return the keys attended to.

        Returns:
            [B, H, N, Dv] in the dtype of ``q``; with ``return_indices`` also the indices, int32
            [B, H_i, N, K]; drawn ones are ascending, -1 in unused places.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        return_indices = check_flag("return_indices", return_indices)
        q, k, v, q_sketch, k_sketch = check_inputs(q, k, v, q_sketch, k_sketch)
        for name, x, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads)):
            if x.shape[1] != heads:
                raise ValueError(f"{name} must have {heads} heads, got {x.shape[1]}")
        if bias_sketch is not None:
            if not (isinstance(bias_sketch, (tuple, list)) and len(bias_sketch) == 2):
                raise TypeError(
                    f"bias_sketch must be (q_sketch, k_sketch), got {type(bias_sketch).__name__}"
                )
            for part in bias_sketch:
                if not isinstance(part, Tensor):
                    raise TypeError(f"bias_sketch must be two Tensors, got {type(part).__name__}")
            bias_sketch = check_sketches(*bias_sketch)
            check_same_tokens(*bias_sketch, q, k)
        if self.context is not None:
            self.context.refuse(query_mask=query_mask)
            self.context.check_local("q", q, 2)
            self.context.check_local("k", k, 2)
        queries = keys = Layout()
        if query_mask is not None:
            if cu_seqlens_q is not None or cu_seqlens_k is not None:
                raise ValueError("query_mask must be None with cu_seqlens_q, got a Tensor")
            shapes = (q.shape[0], q.shape[2]), (k.shape[0], k.shape[2])
            queries, keys = pack(queries, keys, query_mask, key_mask, *shapes, q.device)
            cu_seqlens_q, cu_seqlens_k, key_mask = queries.cu_seqlens, keys.cu_seqlens, None
            if global_mask is not None:
                check_tensor("global_mask", global_mask, torch.bool, shapes[1], "[B, M]", q.device)
                global_mask = keys.enter(global_mask)
            q, q_sketch = (queries.enter_heads(x) for x in (q, q_sketch))
            k, v, k_sketch = (keys.enter_heads(x) for x in (k, v, k_sketch))
            if bias_sketch is not None:
                bias_sketch = queries.enter_heads(bias_sketch[0]), keys.enter_heads(bias_sketch[1])
        if indices is not None:
            check_indices(indices)
            indices = enter_indices(indices, queries, keys)
        visible = self.visible(
            q.shape[0],
            q.shape[2],
            k.shape[2],
            q.device,
            key_mask=key_mask,
            global_mask=global_mask,
            query_offset=query_offset,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            sequence_ids=sequence_ids,
            first_head=first_head,
            is_causal=is_causal,
        )
        out, held = self.attend(
            *(q, k, v, q_sketch, k_sketch),
            visible,
            indices=indices,
            bias_sketch=bias_sketch,
            need_indices=return_indices,
        )
        out = queries.leave_heads(out)
        if held is None or not return_indices:
            return out
        return out, leave_indices(held, queries, keys, visible)

    if TYPE_CHECKING:
        __call__ = forward

    def visible(
        self,
        batch: int,
        num_queries: int,
        num_keys: int,
        device: torch.device,
        *,
        is_causal: bool | None = None,
        **rows: Any,
    ) -> Visible:
        """What the rows of a call see by the module's settings and ``rows``, checked.

        With ``context`` it is what all rows of the sequence see.
        """
        if self.context is not None:
            num_queries = num_keys = self.context.whole_length(rows)
        visible = check_visible(
            batch,
            num_queries,
            num_keys,
            device,
            is_causal=self.is_causal if is_causal is None else is_causal,
            window=self.window,
            num_sinks=self.num_sinks,
            **rows,
        )
        if self.training or visible.sequence_ids is not None:
            return visible
        cu_seqlens = visible.cu_seqlens_q
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if sequences == 1:
            return visible  # the only one has number 0
        return replace(
            visible, sequence_ids=torch.zeros(sequences, dtype=torch.int64, device=device)
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        visible: Visible,
        *,
        indices: Tensor | None = None,
        bias_sketch: tuple[Tensor, Tensor] | None = None,
        need_indices: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` of checked tensors, sketches [B, H_s, N, S] and [B, H_ks, M, S].

        Returns:
            The output, and the indices where they are needed for anything.
        """
        if indices is not None and self.correction:
            raise ValueError(
                "indices must be None with correction=True: how likely each was to be drawn is not "
                "known, got a Tensor"
            )
        if self.dense and (indices is not None or need_indices):
            raise ValueError(
                "indices must be None and return_indices False while dense: no keys are sampled"
            )
        distills = self.training and self.distill and indices is None
        scale = check_scale("scale", self.scale, q.shape[3])
        sketch_scale = check_scale("sketch_scale", self.sketch_scale, q_sketch.shape[3])
        dropout_p = self.dropout if self.training else 0.0
        log_inclusion = None
        call = None if self.context is None else self.context.call(visible)
        if call is not None:
            if self.observer is not None:
                raise ValueError(
                    "observer must be None under ContextParallel, which has a part of the queries "
                    "on each rank: leave sketch_stats and record for one process"
                )
            visible = call.visible
            q, q_sketch, k_sketch = call.cut(q), call.cut(q_sketch), call.gather(k_sketch)
            indices = None if indices is None else call.cut(indices)
            if bias_sketch is not None:
                bias_sketch = call.cut(bias_sketch[0]), call.gather(bias_sketch[1])
        if bias_sketch is not None and self.sketch_scale is not None:
            # Scores that join the logits are scaled by S ** -0.5 where they are made.
            factor = self.sketch_scale * math.sqrt(q_sketch.shape[3])
            bias_sketch = bias_sketch[0] * factor, bias_sketch[1]
        if self.dense:
            qkv = (q, k, v) if call is None else (q, call.gather(k), call.gather(v))
            if bias_sketch is not None:
                qkv, scale = _join_bias(*qkv, bias_sketch, scale), 1.0
            out = attend_densely_by_sequence(*qkv, visible, dropout_p=dropout_p, scale=scale)
        else:
            attended = attend(
                *(q, k, v, q_sketch, k_sketch, self.num_samples),
                visible,
                num_index_heads=self.num_index_heads
                or default_index_heads(k.shape[1], q_sketch.shape[1]),
                method=self.method if self.training else self.eval_method or self.method,
                correction=self.correction,
                scale=scale,
                sketch_scale=sketch_scale / (self.temperature if self.training else 1.0),
                dropout_p=dropout_p,
                seed=self._seed(q.device, call),
                indices=indices,
                num_uniform=self._num_uniform(self.num_samples) if self.training else 0,
                bias_sketch=bias_sketch,
                need_indices=need_indices or distills or self.observer is not None,
                need_log_inclusion=distills and self.distill_correction,
                attend_keys=None if call is None else call.attend_to,
            )
            out, indices, log_inclusion = attended.out, attended.indices, attended.log_inclusion
        if self.observer is not None:
            self.observer(q, k, q_sketch, k_sketch, visible, indices)
        if distills:
            loss = self.distill_loss(
                q, k, q_sketch, k_sketch, visible, indices, log_inclusion, call=call
            )
            if self.loss_weight is not None:
                out = _ride(out, loss, self.loss_weight)
                loss = loss.detach()
            self._keep_loss(loss)
        if call is not None:
            out = call.fill(out)
            indices = None if indices is None else call.fill(indices, -1)
        return out, indices

    def distill_loss(
        self,
        q: Tensor,
        k: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        visible: Visible,
        indices: Tensor | None,
        log_inclusion: Tensor | None,
        *,
        call: ShardedCall | None = None,
    ) -> Tensor:
        """What distillation minimises; ``indices`` are None while dense.

        ``log_inclusion`` is there if and only if ``distill_correction`` or ``correction`` is set.
        With ``call``, queries and k are those of this rank.
        """
        num_rows = q.shape[2] if call is None else call.whole.num_queries
        rows = None
        if self.distill_rows is not None and self.distill_rows < num_rows:
            rows = torch.randperm(num_rows, device=q.device)[: self.distill_rows]
            rows = rows if call is None else call.of_first_rank(rows)
        scale = check_scale("scale", self.scale, q.shape[3])
        return (distill if call is None else call.distill)(
            *(q, k, q_sketch, k_sketch),
            visible,
            indices=indices,
            log_inclusion=log_inclusion if self.distill_correction else None,
            scale=scale / self.distill_temperature,
            sketch_scale=self.sketch_scale,
            rows=rows,
        )

    def take_loss(self) -> tuple[Tensor | None, bool]:
        """The loss of the last training pass, which is cleared, and whether it cannot teach.

        It cannot where gradients were off in that pass.
        """
        loss, self._loss = self._loss, None
        return loss, self._loss_has_no_graph

    def _keep_loss(self, loss: Tensor) -> None:
        rides = self.loss_weight is not None
        if torch.compiler.is_compiling():
            if rides:
                return  # so that the graph has no side effect
        elif _inside_backward():
            return  # a checkpoint recomputes this call, whose loss was collected before
        elif self._loss is not None and self._loss.requires_grad and self.observer is None:
            _warn_once(_LOST_LOSS)
        elif not rides and torch._C._functorch.is_batchedtensor(loss):
            _warn_once(_LOSS_IN_VMAP)
        self._loss = loss
        self._loss_has_no_graph = not rides and not torch.is_grad_enabled()

    def _seed(self, device: torch.device, call: ShardedCall | None) -> Tensor:
        if self.training:
            drawn = draw_seed(device)
            return drawn if call is None else call.of_first_rank(drawn)
        # Filled on the device: a tensor made of a list would be copied to it, which waits for it.
        seed = [torch.full((1,), n, dtype=torch.int64, device=device) for n in self.eval_seed]
        return torch.cat(seed)

    def _num_uniform(self, num_samples: int) -> int:
        """The share of the places, rounded down but for the rounding of the product."""
        return math.floor(self.uniform_share * num_samples + 1e-9)

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_kv_heads={self.num_kv_heads}, num_samples={self.num_samples}, "
            f"num_index_heads={self.num_index_heads}, method={self.method!r}, "
            f"distill={self.distill}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A loss that nobody collected hangs on its graph and can be neither copied nor pickled.
        return {**self.__dict__, "_loss": None, "observer": None}

    # What the weights around this module were trained with stands in the metadata of a state_dict,
    # so that its keys are those of the dense layer.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]].update(self._trained_with())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *args: Any,
    ) -> None:
        for name, here in self._trained_with().items():
            there = local_metadata.get(name, here)
            if there != here:
                warnings.warn(
                    f"the weights of {prefix[:-1] or 'the layer'} come from {name}={there!r} and "
                    f"are loaded into a layer with {name}={here!r}",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _trained_with(self) -> dict[str, Any]:
        return {"num_samples": self._num_samples, "method": self.method}


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=2)


def check_kv_heads(num_kv_heads: int | None, num_heads: int) -> int:
    """A divisor of ``num_heads``; None: ``num_heads``."""
    return num_heads if num_kv_heads is None else _divisor("num_kv_heads", num_kv_heads, num_heads)


def _divisor(name: str, heads: int, num_heads: int) -> int:
    heads = check_count(name, heads, 1)
    if num_heads % heads:
        raise ValueError(f"{name} must divide num_heads {num_heads}, got {heads}")
    return heads


class _Rider(torch.autograd.Function):
    """``out`` unchanged; in the backward pass ``loss`` has the gradient ``weight``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, loss: Tensor, weight: float) -> Tensor:
        return out.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, loss, ctx.weight = inputs
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return dout, dout.new_full((), ctx.weight, dtype=ctx.loss_dtype), None


def _ride(out: Tensor, loss: Tensor, weight: float) -> Tensor:
    ridden: Tensor = _Rider.apply(out, loss, weight)  # type: ignore[no-untyped-call]
    return ridden


def attend_densely_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, dropout_p: float, scale: float
) -> Tensor:
    """``smartbird.functional.attend_densely``, of a pack without scores between sequences.

    In a graph, whose shapes cannot follow from data, those scores are made and masked.
    """
    if visible.cu_seqlens_q is None or not can_look(q):
        return attend_densely(q, k, v, visible, dropout_p=dropout_p, scale=scale)
    parts = []
    for queries, keys, alone in _sequences(visible):
        one = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        parts.append(attend_densely(*one, alone, dropout_p=dropout_p, scale=scale))
    rest = q.shape[2] - sum(part.shape[2] for part in parts)
    return torch.cat([*parts, q.new_zeros((*q.shape[:2], rest, v.shape[3]))], dim=2)


def _join_bias(
    q: Tensor, k: Tensor, v: Tensor, bias_sketch: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose scores without a scale are q . k * scale + q_sketch . k_sketch * S ** -0.5.

    One dot product of longer vectors, so that no N x M bias is made.
    """
    q_sketch, k_sketch = bias_sketch
    q_sketch = _for_heads(q_sketch, q.shape[1]) * q_sketch.shape[3] ** -0.5
    num_keys = math.lcm(k.shape[1], k_sketch.shape[1])
    return (
        torch.cat([q * scale, q_sketch], dim=-1),
        torch.cat([_for_heads(k, num_keys), _for_heads(k_sketch, num_keys)], dim=-1),
        _for_heads(v, num_keys),
    )


def _sequences(visible: Visible) -> Iterator[tuple[slice, slice, Visible]]:
    """The queries and the keys of each packed sequence, and what it sees alone."""
    assert visible.cu_seqlens_q is not None
    assert visible.cu_seqlens_k is not None
    bounds = (cu.tolist() for cu in (visible.cu_seqlens_q, visible.cu_seqlens_k))
    for (q_begin, q_end), (k_begin, k_end) in zip(*map(pairwise, bounds), strict=True):
        queries, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        key_mask, positions = visible.key_mask, visible.positions
        yield (
            queries,
            keys,
            replace(
                visible,
                key_mask=None if key_mask is None else key_mask[:, keys],
                positions=None if positions is None else positions[:, queries],
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                num_queries=q_end - q_begin,
                num_keys=k_end - k_begin,
            ),
        )


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, H_x, ...] for so many heads: head h has that of h // (heads / H_x)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _inside_backward() -> bool:
    # Private to torch. Without it a recomputed loss stays until the next pass replaces it.
    graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)
    return bool(graph_task_id() != -1)

"""Smart Bird attention (arXiv 2108.09193) as layers that stand where PyTorch's own stand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartbird import ops
from smartbird.functional import (
    METHODS,
    add_uniform_keys,
    dense_attention,
    needs_grad,
    sample_keys,
)
from smartbird.ops import check_count, check_flag, check_key_mask, check_number, check_room

__all__ = [
    "DenseWarmup",
    "SampleAnneal",
    "SmartBirdAttention",
    "SmartBirdEncoderLayer",
    "seed_evaluation",
    "sketch_loss",
]

LEARNING_ROUTES = ("distill", "bias", "value")


class _Masks(TypedDict):
    """Which keys are valid, as every op takes it."""

    is_causal: bool
    key_mask: Tensor | None


class SmartBirdAttention(nn.Module):
    """Multi-head attention over keys that a low-dimensional sketch samples (arXiv 2108.09193).

    Takes the place of ``nn.MultiheadAttention`` and loads its ``state_dict`` where
    ``num_kv_heads == num_heads``: only the sketch parameters are missing from it. One sketch serves
    all heads; each index head draws its own ``num_samples`` keys per query.

    Which keys are drawn has no gradient, so the sketch learns by the routes named in ``learning``:

    - ``"distill"``: cross-entropy of the sketch, normalised over all valid keys, against the
      softmax of q . k over the drawn ones (without what the route ``"bias"`` adds, or the sketch
      would follow itself). :func:`sketch_loss` collects it for the training loss. It moves the
      sketch only: the tokens enter the sketch detached, since the trunk could otherwise lower this
      loss by making its attention easy to predict rather than useful.
    - ``"bias"``: the sketch score of a drawn pair is added to its attention logit.
    - ``"value"``: the sketch runs as a small attention head of its own over all keys; its output,
      projected up by a matrix that starts at zero, joins the layer's output.

    In training mode each call draws from PyTorch's global generator. In evaluation mode the draw is
    a function of the input: it uses the seed held in the buffer ``eval_seed`` (not part of the
    ``state_dict``), which :func:`seed_evaluation` sets. ``temperature`` and ``uniform_share`` make
    training explore keys that the sketch does not favour; evaluation draws without them.

    Under ``torch.utils.checkpoint`` take ``use_reentrant=False``; the reentrant kind runs the
    forward pass without gradients, so no sketch loss can be collected from it.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, divides E. Heads are E / H wide.
        num_samples: K, keys per query and index head.
        sketch_dim: S, width of the sketch.
        num_kv_heads: H_kv, divides H. None: H.
        num_index_heads: H_i, sets of keys drawn per query, divides H. None: H.
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
        is_causal: key j is seen by query i if ``j <= i + (M - N)``.
        window: keys nearest the query that are always among its K.
        num_sinks: leading valid keys that are always among the K.
        dropout: probability of dropping an attention weight in training, in [0, 1).
        bias: whether projections have one. That of the sketch is on its query side only: on the key
            side it would add the same to a whole row.
        learning: any of the routes above; empty leaves the sketch as it is.
        distill_temperature: the distilled attention is the softmax of q . k * scale divided by it.
            Below 1 it is sharper than what the heads compute, so that fewer draws go to keys that
            hardly count: see docs/learning.md.
        distill_correction: distil the estimate of dense attention, as ``correction`` makes it,
            instead of attention restricted to the sample. None: ``correction``.
        batch_first: tokens are [B, N, E]; otherwise [N, B, E].
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        num_samples: K as above; :class:`SampleAnneal` changes it.
        dense: attend to every valid key instead of a sample; :class:`DenseWarmup` sets it.

    Raises:
        ValueError: sizes that do not divide, or a value out of its range, by name.
        TypeError: an argument of another type, by name.
    """

    in_proj_bias: Tensor | None
    sketch_proj_bias: Tensor | None
    # None without the "value" route, where nothing reads them.
    sketch_value_weight: Tensor
    sketch_out_weight: Tensor
    eval_seed: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_samples: int = 64,
        sketch_dim: int = 16,
        num_kv_heads: int | None = None,
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
        bias: bool = True,
        learning: Collection[str] = ("distill",),
        distill_temperature: float = 0.5,
        distill_correction: bool | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_index_heads = num_heads if num_index_heads is None else num_index_heads
        distill_correction = correction if distill_correction is None else distill_correction
        for name, size in {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "num_index_heads": num_index_heads,
            "sketch_dim": sketch_dim,
            "num_samples": num_samples,
        }.items():
            check_count(name, size, 1)
        check_count("window", window, 0)
        check_count("num_sinks", num_sinks, 0)
        for name, flag in {
            "correction": correction,
            "is_causal": is_causal,
            "bias": bias,
            "batch_first": batch_first,
            "distill_correction": distill_correction,
        }.items():
            check_flag(name, flag)
        for name, number in {
            "temperature": temperature,
            "distill_temperature": distill_temperature,
            "uniform_share": uniform_share,
            "dropout": dropout,
        }.items():
            check_number(name, number)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        for name, heads in {
            "num_kv_heads": num_kv_heads,
            "num_index_heads": num_index_heads,
        }.items():
            if num_heads % heads:
                raise ValueError(f"{name} must divide num_heads {num_heads}, got {heads}")
        for name, method_ in {"method": method, "eval_method": eval_method}.items():
            if method_ not in METHODS and (name, method_) != ("eval_method", None):
                raise ValueError(f"{name} must be one of {', '.join(METHODS)}, got {method_!r}")
        if not 0.0 <= uniform_share < 1.0:
            raise ValueError(f"uniform_share must be in [0, 1), got {uniform_share}")
        check_room(
            num_samples - _num_uniform(uniform_share, num_samples), window, num_sinks, is_causal
        )
        for name, value in {
            "temperature": temperature,
            "distill_temperature": distill_temperature,
        }.items():
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not isinstance(learning, Collection):
            raise TypeError(f"learning must be a collection, got {type(learning).__name__}")
        if isinstance(learning, str) or any(route not in LEARNING_ROUTES for route in learning):
            raise ValueError(f"learning must be a subset of {LEARNING_ROUTES}, got {learning!r}")
        if uniform_share > 0.0 and (correction or distill_correction):
            raise ValueError(
                "uniform_share must be 0 with correction or distill_correction, as uniform keys "
                f"have no inclusion probabilities, got {uniform_share}"
            )

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_index_heads = num_index_heads
        self.head_dim = embed_dim // num_heads
        self.num_samples = num_samples
        self.sketch_dim = sketch_dim
        self.method = method
        self.eval_method = eval_method
        self.correction = correction
        self.temperature = temperature
        self.uniform_share = uniform_share
        self.is_causal = is_causal
        self.window = window
        self.num_sinks = num_sinks
        self.dropout = dropout
        self.learning = tuple(route for route in LEARNING_ROUTES if route in learning)
        self.distill_temperature = distill_temperature
        self.distill_correction = distill_correction
        self.batch_first = batch_first
        self.dense = False
        self._sketch_loss: Tensor | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        kv_dim = num_kv_heads * self.head_dim
        value_route = "value" in self.learning
        self.in_proj_weight = parameter(embed_dim + 2 * kv_dim, embed_dim)
        self.register_parameter("in_proj_bias", parameter(embed_dim + 2 * kv_dim) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.sketch_proj_weight = parameter(2 * sketch_dim, embed_dim)
        self.register_parameter("sketch_proj_bias", parameter(sketch_dim) if bias else None)
        self.register_parameter(
            "sketch_value_weight", parameter(sketch_dim, embed_dim) if value_route else None
        )
        self.register_parameter(
            "sketch_out_weight", parameter(embed_dim, sketch_dim) if value_route else None
        )
        self.register_buffer(
            "eval_seed", torch.zeros(2, dtype=torch.int64, device=device), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.MultiheadAttention`` does; the sketch's likewise."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        # nn.MultiheadAttention keeps nn.Linear's own draw for the weight of out_proj.
        self.out_proj.reset_parameters()
        nn.init.xavier_uniform_(self.sketch_proj_weight)
        if "value" in self.learning:
            nn.init.xavier_uniform_(self.sketch_value_weight)
            nn.init.zeros_(self.sketch_out_weight)
        for zeros in (self.in_proj_bias, self.out_proj.bias, self.sketch_proj_bias):
            if zeros is not None:
                nn.init.zeros_(zeros)
        self.eval_seed.zero_()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool | None = None,
        indices: Tensor | None = None,
        sketch: tuple[Tensor, Tensor] | None = None,
        return_indices: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: [B, N, E], or [N, B, E] unless ``batch_first``, or [N, E] for one sequence.
            key: [B, M, E] in the layout of ``query``. None: ``query``.
            value: [B, M, E] in the layout of ``query``. None: ``key``.
            key_mask: bool [B, M], or [M] for one sequence, True where a key may be attended. (The
                ``key_padding_mask`` of ``nn.MultiheadAttention`` has the opposite sense.)
            is_causal: in place of the layer's own setting. None: that setting.
            indices: keys to attend to, int32 [B, H_i, N, K] with any H_i that divides H and any K,
                -1 in unused places, such as those that another layer has drawn. The masks are not
                applied to them, and this layer neither draws nor leaves a sketch loss. None: drawn.
            sketch: q_sketch [B, N, S] and k_sketch [B, M, S] to take in place of this layer's own,
                whose parameters are not used then (and get no gradient): what :meth:`sketch` of
                another layer gave, so that one sketch serves both. Every route of ``learning``
                reaches what these were made of. This layer still draws keys of its own, in
                evaluation once :func:`seed_evaluation` has told layers apart. None: its own.
            return_indices: also return the keys attended to.

        Returns:
            The shape and layout of ``query``; with ``return_indices`` also the indices, int32
            [B, H_i, N, K], batch first and batched always; drawn ones are ascending, -1 in unused
            places.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        if indices is not None and self.correction:
            raise ValueError(
                "indices must be None with correction=True: how likely each was to be drawn is not "
                "known, got a Tensor"
            )
        if self.dense and (indices is not None or return_indices):
            raise ValueError(
                "indices must be None and return_indices False while dense: no keys are sampled"
            )
        tokens, keys, values, key_mask = self._inputs(query, key, value, key_mask)
        is_causal = self.is_causal if is_causal is None else is_causal
        check_flag("is_causal", is_causal)
        masks: _Masks = {"is_causal": is_causal, "key_mask": key_mask}
        q, k, v = self._project(tokens, keys, values)
        learned_sketch = None
        if sketch is None:
            q_sketch, k_sketch = self._sketch(tokens.detach(), keys.detach())
        else:
            q_sketch, k_sketch = self._check_sketch(sketch, tokens, keys)
        if "bias" in self.learning or "value" in self.learning:
            # The same sketch once more, now part of the function that the trunk is trained through.
            learned_sketch = self._sketch(tokens, keys) if sketch is None else sketch
        scored_sketch = learned_sketch if "bias" in self.learning else None

        distills = self.training and "distill" in self.learning and indices is None
        if self.training and indices is not None:
            self._keep_loss(None)
        log_inclusion = None
        dropout_p = self.dropout if self.training else 0.0
        if self.dense:
            out = _dense_attention(q, k, v, scored_sketch, dropout_p, masks)
        else:
            seed = ops.draw_seed(query.device) if self.training else self.eval_seed
            temperature = self.temperature if self.training else 1.0
            sketch_scale = 1 / (math.sqrt(self.sketch_dim) * temperature)
            num_uniform = 0
            if self.training:
                num_uniform = _num_uniform(self.uniform_share, self.num_samples)
            sampling: dict[str, Any] = {
                "num_index_heads": self.num_index_heads,
                "method": self.method if self.training else self.eval_method or self.method,
                "window": self.window,
                "num_sinks": self.num_sinks,
                "seed": seed,
                **masks,
            }
            # The projection interleaves heads; rows of one head side by side are faster to gather.
            q, k, v = (x.contiguous() for x in (q, k, v))
            if indices is None and (
                distills
                or return_indices
                or scored_sketch is not None
                or num_uniform > 0
                or sampling["method"] == "dealt"
                or needs_grad(q, k, v)
            ):
                indices, log_inclusion = sample_keys(
                    q_sketch,
                    k_sketch,
                    self.num_samples - num_uniform,
                    correction=self.correction or (distills and self.distill_correction),
                    scale=sketch_scale,
                    **sampling,
                )
                if num_uniform > 0:
                    num_keys = k_sketch.shape[1]
                    indices = add_uniform_keys(indices, num_keys, num_uniform, **masks)
            if indices is None:
                out = ops.sampled_attention(
                    q,
                    k,
                    v,
                    q_sketch,
                    k_sketch,
                    self.num_samples,
                    correction=self.correction,
                    dropout_p=dropout_p,
                    sketch_scale=sketch_scale,
                    **sampling,
                )
            else:
                correction = log_inclusion if self.correction else None
                bias = _logit_bias(scored_sketch, indices, correction)
                out = ops.gather_attention(
                    q, k, v, indices, bias=bias, dropout_p=dropout_p, seed=seed
                )
        if distills:
            correction = log_inclusion if self.distill_correction else None
            self._keep_loss(
                self._distill_loss(q, k, q_sketch, k_sketch, indices, correction, masks)
            )

        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if learned_sketch is not None and "value" in self.learning:
            out = out + self._sketch_output(*learned_sketch, values, masks)
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out if indices is None or not return_indices else (out, indices)

    def sketch(self, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's sketch of tokens, for another layer's ``forward(..., sketch=...)``.

        The other layer's loss of the route "distill" reaches what these are made of: detach the
        tokens if it is to move the sketch only, as it does within a layer.

        Args:
            query, key: as in :meth:`forward`.

        Returns:
            q_sketch [B, N, S] and k_sketch [B, M, S], batch first and batched always.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        tokens, keys, _, _ = self._inputs(query, key, None, None)
        return self._sketch(tokens, keys)

    def _inputs(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens, keys and values [B, length, E] and the key mask [B, M] of the arguments.

        What is one tensor stays one: it is projected at once.
        """
        tokens = self._tokens("query", query)
        keys = tokens if key is None or key is query else self._tokens("key", key)
        if value is None or value is key:
            values = keys
        else:
            values = tokens if value is query else self._tokens("value", value)
        if len(keys) != len(tokens):
            raise ValueError(
                f"key must have the batch size of query, {len(tokens)}, got {len(keys)}"
            )
        if values.shape != keys.shape:
            raise ValueError(
                f"value must have the batch size and length of key, {list(keys.shape[:2])}, "
                f"got {list(values.shape[:2])}"
            )
        if key_mask is not None:
            check_key_mask(key_mask, keys.shape[:2] if query.dim() == 3 else keys.shape[1:2])
            key_mask = key_mask.view(keys.shape[:2])
        return tokens, keys, values, key_mask

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """The argument ``name`` as [B, length, E]."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise TypeError(f"{name} must be a plain tensor with a mask, got a nested tensor")
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{name} must be [batch, length, {self.embed_dim}] or [length, {self.embed_dim}] "
                f"(batch_first={self.batch_first}), got {list(x.shape)}"
            )
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D] and k, v [B, H_kv, M, D]."""
        kv_dim = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, kv_dim, kv_dim]
        if key is query and value is query:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = torch.split(projected, sizes, dim=-1)
        else:
            bias = self.in_proj_bias
            biases = (None,) * 3 if bias is None else torch.split(bias, sizes)
            weights = torch.split(self.in_proj_weight, sizes)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _sketch(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """q_sketch [B, N, S] and k_sketch [B, M, S]."""
        q_weight, k_weight = self.sketch_proj_weight.chunk(2)
        return F.linear(query, q_weight, self.sketch_proj_bias), F.linear(key, k_weight)

    def _check_sketch(
        self, sketch: tuple[Tensor, Tensor], query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The argument ``sketch`` of the forward pass, whose tokens are [B, length, E]."""
        if not (isinstance(sketch, tuple) and len(sketch) == 2):
            raise TypeError(f"sketch must be (q_sketch, k_sketch), got {type(sketch).__name__}")
        for name, part, tokens in zip(("q_sketch", "k_sketch"), sketch, (query, key), strict=True):
            expected = (*tokens.shape[:2], self.sketch_dim)
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} of sketch must be a Tensor, got {type(part).__name__}")
            if part.shape != expected:
                raise ValueError(
                    f"{name} of sketch must be {list(expected)}, got {list(part.shape)}"
                )
            if part.device != tokens.device:
                raise ValueError(f"{name} of sketch must be on {tokens.device}, got {part.device}")
            if part.dtype != tokens.dtype and not torch.is_autocast_enabled(tokens.device.type):
                raise TypeError(f"{name} of sketch must be {tokens.dtype}, got {part.dtype}")
        return sketch

    def _sketch_output(
        self, q_sketch: Tensor, k_sketch: Tensor, value: Tensor, masks: _Masks
    ) -> Tensor:
        """The sketch as a head of its own, [B, N, E]."""
        v_sketch = F.linear(value, self.sketch_value_weight)
        q, k, v = (x.unsqueeze(1) for x in (q_sketch, k_sketch, v_sketch))
        return F.linear(dense_attention(q, k, v, **masks).squeeze(1), self.sketch_out_weight)

    def _distill_loss(
        self,
        q: Tensor,
        k: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        indices: Tensor | None,
        log_inclusion: Tensor | None,
        masks: _Masks,
    ) -> Tensor:
        """What the route "distill" minimises; ``indices`` are None while dense."""
        return ops.distill_loss(
            q,
            k,
            q_sketch,
            k_sketch,
            indices=indices,
            log_inclusion=log_inclusion,
            scale=1 / (math.sqrt(self.head_dim) * self.distill_temperature),
            **masks,
        )

    def _keep_loss(self, loss: Tensor | None) -> None:
        # Inside backward a checkpoint recomputes this call, whose loss was collected before.
        if torch.compiler.is_compiling() or not _inside_backward():
            self._sketch_loss = loss

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"num_samples={self.num_samples}, num_index_heads={self.num_index_heads}, "
            f"sketch_dim={self.sketch_dim}, method={self.method!r}, learning={self.learning}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A loss that nobody collected hangs on its graph and can be neither copied nor pickled.
        return {**self.__dict__, "_sketch_loss": None}


def _inside_backward() -> bool:
    # Private to torch. Without it a recomputed loss stays until the next pass replaces it.
    graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)
    return bool(graph_task_id() != -1)


def _num_uniform(share: float, num_samples: int) -> int:
    """That share of the places, rounded down but for the rounding of the product."""
    return math.floor(share * num_samples + 1e-9)


def _logit_bias(
    sketch: tuple[Tensor, Tensor] | None,
    indices: Tensor,
    log_inclusion: Tensor | None,
) -> Tensor | None:
    """What joins the logits of the drawn pairs, [B, H_i, N, K]: sketch scores, correction, both."""
    bias = None if log_inclusion is None else -log_inclusion
    if sketch is not None:
        q_sketch, k_sketch = sketch
        q_sketch = q_sketch.unsqueeze(1).expand(-1, indices.shape[1], -1, -1)
        scores = ops.gather_scores(q_sketch, k_sketch.unsqueeze(1), indices)
        bias = scores if bias is None else bias + scores
    return bias


def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sketch: tuple[Tensor, Tensor] | None,
    dropout_p: float,
    masks: _Masks,
) -> Tensor:
    """Attention to every valid key; the scores of ``sketch``, if given, join the logits."""
    scale = q.shape[-1] ** -0.5
    if sketch is not None:
        # q.k * scale + qs.ks * sketch_scale is one dot product of longer vectors: no N x M bias.
        q_sketch, k_sketch = (x.unsqueeze(1) for x in sketch)
        q_sketch = q_sketch * (q_sketch.shape[-1] ** -0.5 / scale)
        q = torch.cat([q, q_sketch.expand(-1, q.shape[1], -1, -1)], dim=-1)
        k = torch.cat([k, k_sketch.expand(-1, k.shape[1], -1, -1)], dim=-1)
    return dense_attention(q, k, v, dropout_p=dropout_p, scale=scale, **masks)


class SmartBirdEncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` with Smart Bird attention (arXiv 2108.09193).

    Takes its arguments and loads its ``state_dict``: sketch parameters are the only missing keys.
    With ``num_samples`` no less than the number of tokens it equals that layer in evaluation mode
    (unless ``"bias"`` is among the learning routes). It can be a layer of
    ``nn.TransformerEncoder``; give that ``enable_nested_tensor=False``, as this layer takes none.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
        norm_first, bias, device, dtype: as ``nn.TransformerEncoderLayer``.
        attention: any other keyword argument of :class:`SmartBirdAttention`, such as
            ``num_samples``. (Keys and sketches of another layer are given to ``self_attn`` only.)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise ValueError(
                    f"activation must be 'relu', 'gelu' or a callable, got {activation!r}"
                )
            activation = F.relu if activation == "relu" else F.gelu
        self.self_attn = SmartBirdAttention(
            d_model,
            nhead,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            **attention,
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass the tokens through the layer.

        Args:
            src: [N, B, E], or [B, N, E] with ``batch_first``, or [N, E] for one sequence.
            src_mask: None or the causal mask [N, N], boolean (True = not attended) or additive.
            src_key_padding_mask: [B, N], or [N] for one sequence, boolean (True = ignored) or
                additive (0 = kept, -inf = ignored).
            is_causal: attention is causal; as in PyTorch, a ``src_mask`` given along with it is
                taken to be the causal one without looking.

        Returns:
            The shape of ``src``.

        Raises:
            ValueError: a mask that says anything else, which sampled attention cannot honour; a
                ``src_mask`` without ``is_causal`` while compiling or exporting.
        """
        causal = self.self_attn.is_causal or is_causal
        if src_mask is not None and not is_causal:
            sequence_dim = 1 if src.dim() == 3 and self.self_attn.batch_first else 0
            _require_causal(src_mask, src.shape[sequence_dim])
            causal = True
        key_mask = None if src_key_padding_mask is None else _kept_keys(src_key_padding_mask)
        if self.norm_first:
            x = src + self._attend(self.norm1(src), key_mask, causal)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(src + self._attend(src, key_mask, causal))
        out: Tensor = self.norm2(x + self._feed_forward(x))
        return out

    def _attend(self, x: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        out: Tensor = self.dropout1(self.self_attn(x, key_mask=key_mask, is_causal=is_causal))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return out


def _require_causal(src_mask: Tensor, length: int) -> None:
    """Refuse a mask other than the causal one: it would have to be dropped."""
    # The comparison reads values, which a traced graph cannot branch on.
    if torch.compiler.is_compiling():
        raise ValueError(
            "src_mask must come with is_causal=True in a compiled or exported graph, which cannot "
            "compare it with the causal mask, got is_causal=False"
        )
    additive = src_mask
    if src_mask.dtype == torch.bool:
        additive = torch.zeros(src_mask.shape, device=src_mask.device)
        additive = additive.masked_fill(src_mask, -torch.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(
        length, device=additive.device, dtype=additive.dtype
    )
    if not additive.equal(causal):
        raise ValueError(
            f"src_mask must be None or the causal mask [{length}, {length}], as attention over "
            f"sampled keys can honour no other, got a {src_mask.dtype} mask {list(src_mask.shape)}"
        )


def _kept_keys(padding_mask: Tensor) -> Tensor:
    """PyTorch's padding mask (True or -inf = ignored) as a key mask (True = may be attended)."""
    if padding_mask.dtype == torch.bool:
        return ~padding_mask
    kept = padding_mask == 0
    # The check reads values, which a traced graph cannot branch on.
    if not torch.compiler.is_compiling() and not (kept | (padding_mask == -torch.inf)).all():
        raise ValueError(
            "src_key_padding_mask must be boolean, or hold 0 (kept) and -inf (ignored) only, "
            f"got other values in a {padding_mask.dtype} mask"
        )
    return kept


class _Schedule:
    """What changes in the layers of ``model`` over the first ``steps`` steps of a training."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        check_count("steps", steps, 0)
        self.model = model
        self.steps = steps
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

    Every :class:`SmartBirdAttention` of ``model`` attends to all valid keys, in training and in
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
        for _, layer in _attention_layers(self.model):
            layer.dense = self._steps_done < self.steps


class SampleAnneal(_Schedule):
    """Many sampled keys at first, fewer with each step of a training.

    After t calls of :meth:`step` every :class:`SmartBirdAttention` of ``model`` draws, in training
    and in evaluation, ``start * (K / start) ** (t / steps)`` keys, rounded, and from step ``steps``
    on K, the ``num_samples`` it had when this was made. Like a learning rate scheduler it has a
    ``state_dict`` to save and load.

    Args:
        model: holds the layers.
        start: ``num_samples`` of the first step, at least that of every layer.
        steps: training steps until every layer draws its own K, at least 0.

    Raises:
        ValueError: ``steps`` is negative, or ``start`` less than the ``num_samples`` of a layer.
        TypeError: ``steps`` or ``start`` is no int.
    """

    def __init__(self, model: nn.Module, start: int, steps: int) -> None:
        self._ends = [(layer, layer.num_samples) for _, layer in _attention_layers(model)]
        check_count("start", start, 1)
        most = max((end for _, end in self._ends), default=start)
        if start < most:
            raise ValueError(f"start must be at least num_samples={most}, got {start}")
        self.start = start
        super().__init__(model, steps)

    def state_dict(self) -> dict[str, int]:
        return {"start": self.start, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["start"]
        super().load_state_dict(state_dict)

    def _apply(self) -> None:
        left = max(1 - self._steps_done / self.steps, 0.0) if self.steps else 0.0
        for layer, end in self._ends:
            layer.num_samples = round(end * (self.start / end) ** left)


def sketch_loss(model: nn.Module) -> Tensor:
    """Collect and clear the sketch losses that the last training pass of ``model`` left.

    Add it to the training loss. Of a layer's parameters it reaches those of the sketch only; where
    a sketch was given to the layer, what made that. A layer that was called more than once since
    the last collection counts its last call.

    Args:
        model: holds :class:`SmartBirdAttention` layers, compiled or not.

    Returns:
        Scalar, the sum over layers; zero where no layer has a loss.
    """
    total = None
    for name, layer in _attention_layers(model):
        loss, layer._sketch_loss = layer._sketch_loss, None
        if loss is None:
            continue
        learns = torch.is_grad_enabled() and layer.sketch_proj_weight.requires_grad
        if learns and not loss.requires_grad:
            warnings.warn(
                f"{name or 'the layer'} ran without gradients, so its sketch loss cannot teach it "
                "(torch.no_grad, torch.utils.checkpoint with use_reentrant=True, or a given "
                "sketch that has no gradient?)",
                stacklevel=2,
            )
        total = loss if total is None else total + loss.to(total.device)
    if total is None:
        device = next((p.device for p in model.parameters()), None)
        total = torch.zeros((), device=device)
    return total


def seed_evaluation(model: nn.Module, seed: int) -> None:
    """Choose what the layers of ``model`` draw in evaluation mode: another ``seed``, another draw.

    Layers differ from each other in their draws, which those of a new model do not.
    """
    for position, (_, layer) in enumerate(_attention_layers(model)):
        layer.eval_seed.copy_(torch.tensor([seed, position]))


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, SmartBirdAttention]]:
    for name, module in model.named_modules():
        if isinstance(module, SmartBirdAttention):
            yield name, module

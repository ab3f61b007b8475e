"""Smart Bird attention (arXiv 2108.09193) as a layer that stands where PyTorch's own stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from smartbird._checks import (
    autocasts,
    can_look,
    check_count,
    check_flag,
    check_indices,
    check_inputs,
    check_keywords,
    check_sketches,
    default_index_heads,
)
from smartbird._visible import Visible
from smartbird.nn._layout import Layout, enter_indices, lay_out, leave_indices, pack
from smartbird.nn.sampled import (
    SampledAttention,
    SamplingOptions,
    attend_densely_by_sequence,
    check_kv_heads,
)
from smartbird.ops import gather_scores

LEARNING_ROUTES = ("distill", "bias", "value")
SKETCHES = ("layer", "kv", "head")

# Called with x [B, heads, length, width] and int64 positions, [length] or [B, length].
Rotary = Callable[[Tensor, Tensor], Tensor]


def _of_core(name: str) -> property:
    """An attribute that is that of ``core``."""

    def get(self: SmartBirdAttention) -> Any:
        return getattr(self.core, name)

    def put(self: SmartBirdAttention, value: Any) -> None:
        setattr(self.core, name, value)

    return property(get, put)


class CallOptions(TypedDict, total=False):
    """The keywords of :meth:`SmartBirdAttention.forward` but the last."""

    key_mask: Tensor | None
    query_mask: Tensor | None
    is_causal: bool | None
    indices: Tensor | None
    sketch: tuple[Tensor, Tensor] | None


class SmartBirdAttention(nn.Module):
    """Multi-head attention over keys that a low-dimensional sketch samples (arXiv 2108.09193).

    Takes the place of ``nn.MultiheadAttention`` and loads its ``state_dict`` with ``strict=False``
    where ``num_kv_heads == num_heads``: only the sketch parameters are missing from it. It differs
    in what it is called with: a ``key_mask`` has the opposite sense of ``key_padding_mask``, there
    are no attention weights to return, so that the output comes alone, and no masks [N, M].

    :class:`SampledAttention`, as the attribute ``core``, draws the keys and attends to them; this
    adds the projections of queries, keys, values and sketches. Which keys are drawn has no
    gradient, so the sketch learns by the routes named in ``learning``:

    - ``"distill"``: the loss of :class:`SampledAttention`, against the softmax of q . k over the
      drawn keys (without what the route ``"bias"`` adds, or the sketch would follow itself).
      :func:`smartbird.sketch_loss` collects it for the training loss, or it rides on the output
      with ``loss_weight``. It moves the sketch only: the tokens enter the sketch detached, since
      the trunk could otherwise lower this loss by making its attention easy to predict rather than
      useful.
    - ``"bias"``: the sketch score of a drawn pair is added to its attention logit.
    - ``"value"``: the sketch runs as a small attention head of its own over all keys; its output,
      projected up by a matrix that starts at zero, joins the layer's output.

    In evaluation mode the keys drawn for a sequence are a function of the sequence alone, to the
    last bit on a CPU: sketches are then projected by a kernel whose rounding of a row does not
    depend on how many rows there are. The other projections are left to BLAS, which rounds
    differently for few rows than for many, so the output is that function up to such rounding.

    Under ``torch.utils.checkpoint`` take ``use_reentrant=False`` or ``loss_weight``; the reentrant
    kind runs the forward pass without gradients, so no sketch loss can be collected from it. Under
    ``torch.compile`` around a checkpoint take ``loss_weight``.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, divides E. Heads are E / H wide.
        num_kv_heads: H_kv, divides H. None: H.
        sketch_dim: S, width of a sketch.
        num_sketches: ``"layer"``, one sketch for all heads; ``"kv"``, one for each key/value head;
            ``"head"``, one of the queries for each head and one of the keys for each key/value
            head.
        rotary: turns rows by their positions, before queries meet keys: called with q, k and the
            sketches as x [B, heads, length, width] and positions, int64 [length] or [B, length],
            gives the like of x. Widths are E / H and S. :class:`smartbird.nn.RotaryEmbedding` is
            one. None: nothing is turned.
        learning: any of the routes above; empty leaves the sketch as it is.
        bias: whether projections have one. That of the sketch is on its query side only: on the key
            side it would add the same to a whole row.
        batch_first: tokens are [B, N, E]; otherwise [N, B, E].
        device: of the parameters.
        dtype: of the parameters.
        sampling: how keys are drawn and distilled, the keyword arguments of
            :class:`SampledAttention`: ``num_samples``, ``method``, ``correction``, ``is_causal``,
            ``window``, ``dropout`` and others. ``num_index_heads`` defaults to H_kv, with
            ``num_sketches="head"`` to H.

    Attributes:
        core: the :class:`SampledAttention`.
        num_samples, is_causal, dense, eval_seed: those of ``core``.

    Raises:
        ValueError: sizes that do not divide, or a value out of its range, by name.
        TypeError: an argument of another type, by name.
    """

    in_proj_bias: Tensor | None
    sketch_proj_bias: Tensor | None
    # None without the "value" route, where nothing reads them.
    sketch_value_weight: Tensor
    sketch_out_weight: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        sketch_dim: int = 16,
        num_sketches: str = "layer",
        rotary: Rotary | None = None,
        learning: Collection[str] = ("distill",),
        bias: bool = True,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> None:
        super().__init__()
        check_keywords("SmartBirdAttention", sampling, SamplingOptions.__annotations__)
        self.embed_dim = check_count("embed_dim", embed_dim, 1)
        self.num_heads = check_count("num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.num_kv_heads = check_kv_heads(num_kv_heads, num_heads)
        self.head_dim = embed_dim // num_heads
        self.sketch_dim = check_count("sketch_dim", sketch_dim, 1)
        if num_sketches not in SKETCHES:
            raise ValueError(f"num_sketches must be one of {SKETCHES}, got {num_sketches!r}")
        self.num_sketches = num_sketches
        # H_s and H_ks.
        self.num_query_sketches, self.num_key_sketches = {
            "layer": (1, 1),
            "kv": (self.num_kv_heads, self.num_kv_heads),
            "head": (num_heads, self.num_kv_heads),
        }[num_sketches]
        self.rotary = rotary
        if rotary is not None:
            if not callable(rotary):
                raise TypeError(f"rotary must be callable, got {type(rotary).__name__}")
            widths = {"sketch_dim": sketch_dim, "embed_dim / num_heads": self.head_dim}
            for name, width in widths.items():
                if width % 2:
                    raise ValueError(f"{name} must be even with rotary, got {width}")
        if not isinstance(learning, Collection):
            raise TypeError(f"learning must be a collection, got {type(learning).__name__}")
        if isinstance(learning, str) or any(route not in LEARNING_ROUTES for route in learning):
            raise ValueError(f"learning must be a subset of {LEARNING_ROUTES}, got {learning!r}")
        self.learning = tuple(route for route in LEARNING_ROUTES if route in learning)
        self.batch_first = check_flag("batch_first", batch_first)
        bias = check_flag("bias", bias)
        num_index_heads = sampling.get("num_index_heads")
        if num_index_heads is None:
            num_index_heads = default_index_heads(self.num_kv_heads, self.num_query_sketches)
            sampling["num_index_heads"] = num_index_heads
        self.core = SampledAttention(
            num_heads,
            num_kv_heads=self.num_kv_heads,
            distill="distill" in self.learning,
            **sampling,
        )
        if num_index_heads % self.num_query_sketches:
            raise ValueError(
                f"num_index_heads must be a multiple of {self.num_query_sketches}, the sketches of "
                f"num_sketches={num_sketches!r}, got {num_index_heads}"
            )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        kv_dim = self.num_kv_heads * self.head_dim
        q_width = self.num_query_sketches * sketch_dim
        k_width = self.num_key_sketches * sketch_dim
        value_route = "value" in self.learning
        self.in_proj_weight = parameter(embed_dim + 2 * kv_dim, embed_dim)
        self.register_parameter("in_proj_bias", parameter(embed_dim + 2 * kv_dim) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.sketch_proj_weight = parameter(q_width + k_width, embed_dim)
        self.register_parameter("sketch_proj_bias", parameter(q_width) if bias else None)
        self.register_parameter(
            "sketch_value_weight", parameter(k_width, embed_dim) if value_route else None
        )
        self.register_parameter(
            "sketch_out_weight", parameter(embed_dim, q_width) if value_route else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.MultiheadAttention`` does; those of every sketch likewise."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        # nn.MultiheadAttention keeps nn.Linear's own draw for the weight of out_proj.
        self.out_proj.reset_parameters()
        # Xavier's bound of one sketch, however many there are.
        bound = math.sqrt(6 / (self.embed_dim + 2 * self.sketch_dim))
        nn.init.uniform_(self.sketch_proj_weight, -bound, bound)
        if "value" in self.learning:
            nn.init.xavier_uniform_(self.sketch_value_weight)
            nn.init.zeros_(self.sketch_out_weight)
        for zeros in (self.in_proj_bias, self.out_proj.bias, self.sketch_proj_bias):
            if zeros is not None:
                nn.init.zeros_(zeros)

    num_samples = _of_core("num_samples")
    is_causal = _of_core("is_causal")
    dense = _of_core("dense")
    eval_seed = _of_core("eval_seed")

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        return_indices: Literal[False] = ...,
        **options: Unpack[CallOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        return_indices: Literal[True],
        **options: Unpack[CallOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        return_indices: bool,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        is_causal: bool | None = None,
        indices: Tensor | None = None,
        sketch: tuple[Tensor, Tensor] | None = None,
        return_indices: bool = False,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``query`` to ``key`` and ``value``.

        What masks leave out is taken out before anything is computed: it costs nothing, changes
        nothing on whichever side it stands, and its output is zero.

        Args:
            query: [B, N, E], or [N, B, E] unless ``batch_first``, or [N, E] for one sequence, or a
                nested tensor [B, j, E] of layout ``torch.jagged``.
            key: [B, M, E] in the layout of ``query``. None: ``query``.
            value: [B, M, E] in the layout of ``query``. None: ``key``.
            key_mask: bool [B, M], or [M] for one sequence, True where a key may be attended. (The
                ``key_padding_mask`` of ``nn.MultiheadAttention`` has the opposite sense.)
            query_mask: bool [B, N], or [N], True where a query is real. None: all are, and where
                the keys are the queries those of ``key_mask``.
            is_causal: in place of the layer's own setting. None: that setting.
            indices: keys to attend to, int32 [B, H_i, N, K] with any H_i that divides H and any K,
                -1 in unused places, such as those that another layer has drawn. Keys that
                ``key_mask`` leaves out are none; causality is not applied to them. This layer
                neither draws nor leaves a sketch loss. None: drawn.
            sketch: q_sketch and k_sketch to take in place of this layer's own, whose parameters are
                not used then (and get no gradient): what :meth:`sketch` of another layer of the
                same sketches gave for tokens in the same layout, so that one sketch serves both.
                Every route of ``learning`` reaches what these were made of. This layer still draws
                keys of its own, in evaluation once :func:`smartbird.seed_evaluation` has told
                layers apart. None: its own.
            return_indices: also return the keys attended to.

        Returns:
            The shape and layout of ``query``; with ``return_indices`` also the indices, int32
            [B, H_i, N, K], batch first and batched always (nested where ``query`` is: [B, H_i, j,
            K]); drawn ones are ascending, -1 in unused places.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        if others:
            raise TypeError(_why_not_taken(next(iter(others))))
        context = self.core.context
        if context is not None:
            context.refuse(key_mask=key_mask, query_mask=query_mask)
        queries, keys = self._layouts(query, key, value, key_mask, query_mask)
        if context is not None and queries.offsets is not None:
            raise ValueError("query must not be nested under ContextParallel")
        tokens = queries.enter(query)
        key_tokens = tokens if keys is queries else keys.enter(query if key is None else key)
        if context is not None:
            context.check_local("query", tokens, 1)
            context.check_local("key", key_tokens, 1)
        value_tokens = key_tokens if value is None or value is key else keys.enter(value)
        visible = self.core.visible(
            tokens.shape[0],
            tokens.shape[1],
            key_tokens.shape[1],
            tokens.device,
            cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=keys.cu_seqlens,
            is_causal=is_causal,
        )
        q, k, v = self._project(tokens, key_tokens, value_tokens)
        given = None
        if sketch is not None:
            given = self._enter_sketch(sketch, queries, keys, tokens, key_tokens)
        judged = given or self._sketch(tokens.detach(), key_tokens.detach())
        learned = None
        if "bias" in self.learning or "value" in self.learning:
            # The same sketch once more, now part of the function that the trunk is trained through.
            learned = given or self._sketch(tokens, key_tokens)
        if self.rotary is not None:
            positions = self._positions(visible)
            q, k = self._turn((q, k), positions)
            judged = self._turn(judged, positions)
            learned = None if learned is None else self._turn(learned, positions)
        if not self.core.dense:
            # Projections interleave heads; rows of one head side by side are faster to gather, and
            # the backward pass gathers those of queries, too.
            k, v = k.contiguous(), v.contiguous()
            q = q.contiguous() if torch.is_grad_enabled() else q
        if indices is not None:
            check_indices(indices)
            indices = enter_indices(indices, queries, keys)
        out, held = self.core.attend(
            *check_inputs(q, k, v, *judged),
            visible,
            indices=indices,
            bias_sketch=check_sketches(*learned) if learned and "bias" in self.learning else None,
            need_indices=check_flag("return_indices", return_indices),
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if learned is not None and "value" in self.learning:
            out = out + self._sketch_output(*learned, value_tokens, visible)
        out = queries.leave(out)
        if held is None or not return_indices:
            return out
        return out, leave_indices(held, queries, keys, visible)

    if TYPE_CHECKING:
        __call__ = forward

    def sketch(self, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's sketches of tokens, for another layer's ``forward(..., sketch=...)``.

        The other layer's loss of the route "distill" reaches what these are made of: detach the
        tokens if it is to move the sketch only, as it does within a layer. They are not turned by
        ``rotary`` yet.

        Args:
            query, key: as in :meth:`forward`.

        Returns:
            q_sketch [B, N, S] and k_sketch [B, M, S], or [B, H_s, N, S] and [B, H_ks, M, S] unless
            ``num_sketches`` is ``"layer"``; batch first and batched always. Of nested tokens B is 1
            and the lengths are totals.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        queries, keys = self._layouts(query, key, None, None, None)
        tokens = queries.enter(query)
        key_tokens = tokens if key is None or key is query else keys.enter(key)
        q_sketch, k_sketch = self._sketch(tokens, key_tokens)
        if self.num_sketches == "layer":
            return q_sketch.squeeze(1), k_sketch.squeeze(1)
        return q_sketch, k_sketch

    def _layouts(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
    ) -> tuple[Layout, Layout]:
        """How queries and keys lie, after checks of what they are; one object if they are one."""
        queries = lay_out("query", query, self.in_proj_weight, self.batch_first)
        itself = key is None or key is query
        key = query if key is None else key
        keys = queries if itself else lay_out("key", key, self.in_proj_weight, self.batch_first)
        _check_like("key", key, keys, "query", query, queries, whole=False)
        if value is not None and value is not key:
            values = lay_out("value", value, self.in_proj_weight, self.batch_first)
            _check_like("value", value, values, "key", key, keys, whole=True)
        if key_mask is None and query_mask is None:
            return queries, keys
        for name, mask in (("key_mask", key_mask), ("query_mask", query_mask)):
            if mask is not None and queries.offsets is not None:
                raise ValueError(f"{name} must be None with a nested query, got a Tensor")
        (batch, num_queries), num_keys = queries.batch(query).shape[:2], keys.batch(key).shape[1]
        if not queries.batched:
            # of one sequence: [N] and [M]
            query_mask, key_mask = map(_of_one_sequence, (query_mask, key_mask))
        if itself and query_mask is None:
            query_mask = key_mask
        packed_queries, packed_keys = pack(
            *(queries, keys, query_mask, key_mask),
            *((batch, num_queries), (batch, num_keys), query.device),
        )
        return packed_queries, packed_keys

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
        q, k, v = (_heads(x, x.shape[-1] // self.head_dim) for x in (q, k, v))
        return q, k, v

    def _sketch(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """q_sketch [B, H_s, N, S] and k_sketch [B, H_ks, M, S]."""
        project = F.linear if self.training or query.device.type != "cpu" else _linear_by_row
        width = self.num_query_sketches * self.sketch_dim
        q_weight, k_weight = self.sketch_proj_weight.tensor_split([width])
        q_sketch = project(query, q_weight, self.sketch_proj_bias)
        k_sketch = project(key, k_weight)
        return (
            _heads(q_sketch, self.num_query_sketches),
            _heads(k_sketch, self.num_key_sketches),
        )

    def _enter_sketch(
        self,
        sketch: tuple[Tensor, Tensor],
        queries: Layout,
        keys: Layout,
        tokens: Tensor,
        key_tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The argument ``sketch`` of the forward pass as :meth:`_sketch` would give it."""
        if not (isinstance(sketch, tuple) and len(sketch) == 2):
            raise TypeError(f"sketch must be (q_sketch, k_sketch), got {type(sketch).__name__}")
        entered = []
        for name, part, layout, x, count in (
            ("q_sketch", sketch[0], queries, tokens, self.num_query_sketches),
            ("k_sketch", sketch[1], keys, key_tokens, self.num_key_sketches),
        ):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} of sketch must be a Tensor, got {type(part).__name__}")
            one = self.num_sketches == "layer"
            batch, length = layout.size(x)
            expected = (batch, *(() if one else (count,)), length, self.sketch_dim)
            if part.shape != expected:
                raise ValueError(
                    f"{name} of sketch must be {list(expected)}, got {list(part.shape)}"
                )
            if part.device != x.device:
                raise ValueError(f"{name} of sketch must be on {x.device}, got {part.device}")
            if part.dtype != x.dtype and not autocasts(x.device.type):
                raise TypeError(f"{name} of sketch must be {x.dtype}, got {part.dtype}")
            part = part.unsqueeze(1) if one else part
            entered.append(part if layout.packing is None else layout.packing.pack(part))
        return entered[0], entered[1]

    def _positions(self, visible: Visible) -> tuple[Tensor, Tensor]:
        """Of queries and keys, int64 [N] and [M], or [T] within their sequences."""
        if self.core.context is not None:
            here = self.core.context.positions(visible.device)
            return here, here
        keys = torch.arange(visible.num_keys, device=visible.device)
        if visible.cu_seqlens_q is None:
            offset = visible.num_keys - visible.num_queries
            return torch.arange(visible.num_queries, device=visible.device) + offset, keys
        keys = visible.places(keys.int()[None, None, None]).flatten().long()
        return visible.query_positions()[0], keys

    def _turn(
        self, queries_and_keys: tuple[Tensor, Tensor], positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """By ``rotary``, which is given."""
        assert self.rotary is not None
        q, k = map(self.rotary, queries_and_keys, positions)
        return q, k

    def _sketch_output(
        self, q_sketch: Tensor, k_sketch: Tensor, value: Tensor, visible: Visible
    ) -> Tensor:
        """The sketches as heads of their own, [B, N, E]."""
        v_sketch = _heads(F.linear(value, self.sketch_value_weight), self.num_key_sketches)
        out = attend_densely_by_sequence(
            q_sketch, k_sketch, v_sketch, visible, dropout_p=0.0, scale=self.sketch_dim**-0.5
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.sketch_out_weight)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, sketch_dim={self.sketch_dim}, num_sketches={self.num_sketches!r}, "
            f"learning={self.learning}"
        )


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * width] as [B, heads, N, width]."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def _linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` that rounds a row of x [B, N, E] as if it were alone, on a CPU.

    BLAS does not: it has other kernels for few rows than for many. Rows times rows of a weight are
    scores of pairs, here of all pairs.
    """
    outputs = torch.arange(weight.shape[0], dtype=torch.int32, device=x.device)
    outputs = outputs.expand(x.shape[0], 1, x.shape[1], -1)
    weights = weight.expand(x.shape[0], 1, -1, -1)
    out = gather_scores(x.unsqueeze(1), weights, outputs, scale=1.0).squeeze(1)
    return out if bias is None else out + bias.to(out.dtype)


def _of_one_sequence(mask: Tensor | None) -> Tensor | None:
    return mask.unsqueeze(0) if isinstance(mask, Tensor) else mask


_INSTEAD = {
    "key_padding_mask": "give key_mask=~key_padding_mask, True where a key may be attended",
    "attn_mask": "attention over sampled keys can honour no mask [N, M]: give is_causal=True for "
    "the causal one, key_mask for padding",
    "need_weights": "no attention weights are made and the output comes alone: leave it out; "
    "return_indices=True returns the keys attended to",
    "average_attn_weights": "no attention weights are made: leave it out",
}


def _why_not_taken(name: str) -> str:
    said = f"SmartBirdAttention.forward() got an unexpected keyword argument {name!r}"
    return (
        f"{said}, which nn.MultiheadAttention has: {_INSTEAD[name]}" if name in _INSTEAD else said
    )


def _check_like(
    name: str,
    x: Tensor,
    layout: Layout,
    like_name: str,
    like: Tensor,
    like_layout: Layout,
    *,
    whole: bool,
) -> None:
    """Refuse ``x`` of another batch size, with ``whole`` also of other lengths, than ``like``."""
    if (layout.offsets is None) != (like_layout.offsets is None):
        raise TypeError(f"{name} must be nested if and only if {like_name} is")
    if layout.offsets is None or like_layout.offsets is None:
        have, want = (list(each.shape[:2]) for each in (layout.batch(x), like_layout.batch(like)))
    elif whole and can_look(layout.offsets):
        have, want = (each.diff().tolist() for each in (layout.offsets, like_layout.offsets))
    else:
        have, want = [x.shape[0]], [like.shape[0]]
    if not whole:
        have, want = have[:1], want[:1]
    if have != want:
        what = "batch size and length" if whole else "batch size"
        raise ValueError(f"{name} must have the {what} of {like_name}, {want}, got {have}")
